"""Pictures as files hold them, made upright and of 8 bits a channel; what has no known range is refused."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import DataError
from workbench.tasks.reading.tally import Tally
from workbench.util.text import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of PIL, by the channels that a model is given
ORIENTATION, BITS, PHOTOMETRIC, WHITE_IS_ZERO = 0x0112, 258, 262, 0  # tags of TIFF, and of EXIF
FIRST_TO = {"LAB": "RGB", "La": "LA"}  # modes from which PIL has not every way
STILL = "MPO"  # a photograph with another one for depth or for the other eye, no moving picture
DEEP = {
    "PNG": 16,
    "PPM": 16,
    "JPEG2000": 16,
}  # bits of PIL's integers of these formats, whatever the file has
TURNED = "are turned upright by their EXIF orientation"
SCALED = "have more than 8 bits a pixel and are scaled to 8 by the depth of their files"
FIRST = "have several frames or pages, of which the first is read"
OPAQUE = "have transparent parts, which are read as if they were not: by the colours under them"
INKS = "are in the inks of a printer (CMYK), converted without a colour profile"
DARK = "of more than 8 bits are almost black: no pixel reaches a sixteenth of what their files can hold"


def shown(image: Any, channels: int, what: str, tally: Tally) -> Image:
    """Return a picture as a person sees it, in the mode for a model of 1, 3 or 4 channels.

    The first of several frames, turned by its EXIF orientation, of 8 bits a channel. `image` is what `opened`
    takes, `what` it is called in messages; `tally` counts what was done.

    Raises:
        DataError: a picture that cannot be read, has too many pixels, or whose range is not known.
    """
    from PIL import Image, ImageOps

    if channels not in MODES:
        raise DataError(f"pictures have 1, 3 or 4 channels, and this model takes {channels}")
    done: list[str] = []
    try:
        picture = opened(image)
        if getattr(picture, "n_frames", 1) > 1 and picture.format != STILL:
            done.append(FIRST)
        if picture.getexif().get(ORIENTATION, 1) in range(2, 9):  # a TIFF is turned as it is loaded
            done.append(TURNED)
        picture.load()
        top, inverted = depth(picture, what)
        picture = ImageOps.exif_transpose(picture)
        if top:
            picture = eight_bits(picture, top, done, inverted=inverted)
        upright = converted(picture, MODES[channels], done)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{what} has too many pixels to be a picture for a model ({one_line(error)}); make it smaller, or"
            " leave it out"
        ) from None
    except Exception as error:  # noqa: BLE001  decoders raise what they like; the user sees one line
        raise DataError(
            f"{what} cannot be read as a picture: {one_line(error) or type(error).__name__}"
        ) from None
    tally.add(*done)
    return upright


def opened(image: Any) -> Image:
    """Return a PIL picture from a picture, an array [H, W] or [H, W, C] of uint8, a path, or a dict with
    bytes or path.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") else image["path"]
    if isinstance(image, bytes | str | Path):  # whole, so that no file stays open
        return Image.open(BytesIO(image if isinstance(image, bytes) else Path(image).read_bytes()))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 and not (
        pixels.dtype.kind in "iu" and pixels.size and pixels.min() >= 0 and pixels.max() <= 255
    ):
        raise TypeError(f"an array of {pixels.dtype}, and one of 8 bits (uint8) is needed")
    return Image.fromarray(pixels.astype(np.uint8))


def name_of(image: Any, number: int) -> str:
    """Return the name of a picture in messages: its file, where it has one, and its place."""
    path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str | Path) else None
    return f"image item {number}" + (f" ({path})" if path else "")


def depth(picture: Image, what: str) -> tuple[int, bool]:
    """Return the largest value of a pixel of deep greys, and whether it is black; 0 for 8 bits and fewer.

    Raises:
        DataError: floats, or integers that may be negative or of 32 bits: their range is not known.
    """
    if not picture.mode.startswith(("I", "F")):
        return 0, False
    tags: Any = getattr(picture, "tag_v2", {})
    if picture.mode.startswith("I;16"):
        bits = int(tags[BITS][0]) if BITS in tags else 16
    elif picture.mode == "I" and picture.format in DEEP:
        bits = DEEP[picture.format]
    else:
        number = "floats" if picture.mode == "F" else "integers"
        raise DataError(
            f"{what} holds {number} whose range is not known (mode {picture.mode!r}); save it with 8 or 16"
            " bits a pixel, black as 0 and white as the most"
        )
    return 2**bits - 1, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def eight_bits(picture: Image, top: int, done: list[str], *, inverted: bool) -> Image:
    """Return deep greys from 0 to `top` as greys of 8 bits."""
    from PIL import Image

    pixels = np.asarray(picture).astype(np.float64)
    if inverted:
        pixels = top - pixels
    done.append(SCALED)
    if pixels.max() * 16 <= top:
        done.append(DARK)
    return Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8))


def converted(picture: Image, mode: str, done: list[str]) -> Image:
    """Return a picture in another mode of PIL, as its libraries convert it, noting what is lost."""
    if picture.mode == "CMYK":
        done.append(INKS)
    picture = picture.convert(FIRST_TO.get(picture.mode, picture.mode))
    if picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        picture = picture.convert("RGBA")  # as PIL asks for
    if mode != "RGBA" and see_through(picture):
        done.append(OPAQUE)
    return picture.convert(mode)


def see_through(picture: Image) -> bool:
    """Return whether any pixel is not opaque."""
    if "transparency" in picture.info and picture.mode in {"1", "L", "P", "RGB"}:
        picture = picture.convert("RGBA")
    if picture.mode not in {"RGBA", "LA", "PA", "La", "RGBa"}:
        return False
    return bool(np.asarray(picture)[..., -1].min() < 255)
