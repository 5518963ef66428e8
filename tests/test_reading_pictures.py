"""Pictures as files hold them: what a model is given is what a person sees, or the file is refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from workbench.errors import DataError
from workbench.tasks import data
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION, PlainProcessor, image_items
from workbench.tasks.items import Reading

HEIGHT, WIDTH = 6, 10
CONFIG = {"num_channels": 1, "id2label": {"0": "cat", "1": "dog"}}
COLOURED = {**CONFIG, "num_channels": 3}
# How what is stored is turned to be shown, by the orientation of EXIF 2.3 (section 4.6.4)
SHOWN = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.swapaxes(np.rot90(x, 2), 0, 1),
    8: lambda x: np.rot90(x, 1),
}
STORED = {number: SHOWN[{6: 8, 8: 6}.get(number, number)] for number in SHOWN}  # the other way round


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def drawn(seed: int, *shape: int, top: int = 255, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top + 1, (HEIGHT, WIDTH, *shape), dtype)


def folder(tmp_path, write, count=4, suffix="png"):
    """Write pictures of two classes by `write(number, path)`."""
    for number in range(2 * count):
        path = tmp_path / "pictures" / ("cat", "dog")[number % 2] / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(number, path)
    return tmp_path / "pictures"


def load(where, config=CONFIG):
    reading = Reading(config, PlainProcessor(HEIGHT, WIDTH))
    return data.load(IMAGE_CLASSIFICATION, reading, where, IMAGE_CLASSIFICATION.sizes, progress=False)


def seen(loaded) -> set[bytes]:
    """Return every picture that was read, as bytes of [C, H, W] in 0 to 255."""
    roles = (loaded.evaluation, loaded.calibration, loaded.training)
    return {
        np.rint(pixels.numpy() * 255).astype(np.uint8).tobytes()
        for items in roles
        for pixels in items.inputs["pixel_values"]
    }


def wanted(pictures) -> set[bytes]:
    return {np.ascontiguousarray(np.atleast_3d(picture).transpose(2, 0, 1)).tobytes() for picture in pictures}


def one_read(path, channels=1) -> np.ndarray:
    """Return one picture as it is read, [C, H, W] in 0 to 255."""
    items = image_items([str(path)], [0], PlainProcessor(HEIGHT, WIDTH), channels)
    return np.rint(items.inputs["pixel_values"][0].numpy() * 255).astype(np.uint8)


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_pictures_are_turned_upright(tmp_path, orientation, suffix):
    upright = [drawn(seed, 3) for seed in range(8)]

    def write(number, path):
        image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright[number])))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))

    loaded = load(folder(tmp_path, write, suffix=suffix), COLOURED)
    assert seen(loaded) == wanted(upright)
    said = [note for note in loaded.notes if "EXIF" in note]
    assert said == (
        ["8 of 8 pictures are turned upright by their EXIF orientation"] if orientation > 1 else []
    )


def test_only_those_that_are_turned_are_counted(tmp_path):
    def write(number, path):
        image = Image.fromarray(drawn(number, 3))
        exif = image.getexif()
        exif[0x0112] = 3 if number < 3 else 1
        image.save(path, quality=100, exif=exif)

    assert any(
        "3 of 8 pictures are turned" in note
        for note in load(folder(tmp_path, write, suffix="jpg"), COLOURED).notes
    )


def tiff(
    path, pixels: np.ndarray, *, bits: int, sample: int = 1, white_is_zero: bool = False, big: bool = False
):
    """Write the smallest grey TIFF there is, as its specification says: header, tags, one strip."""
    order = ">" if big else "<"
    strip = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = {
        256: pixels.shape[1],
        257: pixels.shape[0],
        258: bits,
        259: 1,
        262: 0 if white_is_zero else 1,
        273: 8,
        277: 1,
        278: pixels.shape[0],
        279: len(strip),
        339: sample,
    }
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
        if tag in {256, 257, 273, 278, 279}
        else struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
        for tag, value in sorted(tags.items())
    )
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8 + len(strip))
    path.write_bytes(head + strip + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


def deep(seed: int, top: int) -> np.ndarray:
    return drawn(seed, top=top, dtype=np.uint16)


def pgm(path, pixels, top):
    path.write_bytes(f"P5 {WIDTH} {HEIGHT} {top}\n".encode() + pixels.astype(">u2").tobytes())


@pytest.mark.parametrize(
    ("suffix", "top", "write"),
    [
        ("png", 65535, lambda path, pixels: Image.fromarray(pixels).save(path)),
        ("tif", 65535, lambda path, pixels: tiff(path, pixels, bits=16)),
        ("tif", 65535, lambda path, pixels: tiff(path, pixels, bits=16, big=True)),
        ("tif", 65535, lambda path, pixels: tiff(path, 65535 - pixels, bits=16, white_is_zero=True)),
        ("pgm", 1023, lambda path, pixels: pgm(path, pixels, 1023)),
        ("pgm", 65535, lambda path, pixels: pgm(path, pixels, 65535)),
    ],
    ids=["png", "tiff", "big tiff", "white is zero", "pgm of 10 bits", "pgm"],
)
def test_deep_greys_are_scaled_by_their_depth(tmp_path, suffix, top, write):
    pictures = [deep(seed, top) for seed in range(8)]
    loaded = load(folder(tmp_path, lambda number, path: write(path, pictures[number]), suffix=suffix))
    mine = np.sort(np.stack([np.frombuffer(picture, np.uint8) for picture in seen(loaded)]).astype(int), 0)
    right = np.sort(
        np.stack([np.rint(picture.astype(float) * 255 / top) for picture in pictures]).reshape(8, -1), 0
    )
    assert np.abs(mine - right).max() <= 1
    assert any(note.startswith("8 of 8 pictures have more than 8 bits") for note in loaded.notes)


def test_deep_greys_of_which_a_sixteenth_is_used_are_said_to_be_dark(tmp_path):
    loaded = load(folder(tmp_path, lambda number, path: Image.fromarray(deep(number, 4095)).save(path)))
    assert any("8 of 8 pictures of more than 8 bits are almost black" in note for note in loaded.notes)


def test_deep_pictures_are_turned_too(tmp_path):
    upright, path = deep(0, 65535), tmp_path / "x.png"
    image = Image.fromarray(np.ascontiguousarray(STORED[6](upright)))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert np.array_equal(one_read(path)[0], np.rint(upright * (255 / 65535)).astype(np.uint8))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_reach_white(tmp_path, bits):
    levels, path = drawn(3, top=2**bits - 1), tmp_path / "x.png"
    packed = np.packbits(np.unpackbits(levels[..., None], axis=2)[..., -bits:].reshape(HEIGHT, -1), axis=1)
    png(path, packed, bits, kind=0)
    assert np.array_equal(one_read(path)[0], np.rint(levels * (255 / (2**bits - 1))).astype(np.uint8))


def png(path, packed: np.ndarray, bits: int, kind: int, *chunks: tuple[bytes, bytes], size=(WIDTH, HEIGHT)):
    """Write a PNG as its specification says: rows packed by hand, of a kind of colour."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    head = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    body = [chunk(b"IHDR", head), *(chunk(*named) for named in chunks), chunk(b"IDAT", zlib.compress(rows))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b""))


def test_palettes_with_transparency_are_read_by_their_colours(tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (16, 3), np.uint8)
    places = [drawn(seed, top=15) for seed in range(8)]

    def write(number, path):
        clear = bytes([0, 128, 255, 7]) if number < 5 else b"\xff" * 16
        png(path, places[number], 8, 3, (b"PLTE", colours.tobytes()), (b"tRNS", clear))

    loaded = load(folder(tmp_path, write), COLOURED)
    assert seen(loaded) == wanted([colours[place] for place in places])
    assert any(note.startswith("5 of 8 pictures have transparent parts") for note in loaded.notes)


@pytest.mark.parametrize("opaque", [True, False])
@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4)])
def test_transparency_is_left_out_and_said(tmp_path, mode, channels, opaque):
    pictures = [drawn(seed, channels) for seed in range(8)]
    for picture in pictures:
        picture[..., -1] = 255 if opaque else picture[..., -1]
    loaded = load(
        folder(tmp_path, lambda number, path: Image.fromarray(pictures[number], mode).save(path)),
        CONFIG if mode == "LA" else COLOURED,
    )
    assert seen(loaded) == wanted([picture[..., :-1] for picture in pictures])
    assert any("transparent" in note for note in loaded.notes) is not opaque


def test_inks_are_converted_and_said(tmp_path):
    inks = [drawn(seed, 4) for seed in range(8)]
    for picture in inks:
        picture[..., 3] = 0  # without black, each ink takes away its own light
    loaded = load(
        folder(tmp_path, lambda number, path: Image.fromarray(inks[number], "CMYK").save(path), suffix="tif"),
        COLOURED,
    )
    assert seen(loaded) == wanted([255 - picture[..., :3] for picture in inks])
    assert any(note.startswith("8 of 8 pictures are in the inks of a printer") for note in loaded.notes)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_moving_pictures_the_first_is_read(tmp_path, suffix):
    firsts = [np.full((HEIGHT, WIDTH, 3), 17 * number, np.uint8) for number in range(8)]

    def write(number, path):
        later = [Image.new("RGB", (WIDTH, HEIGHT), (200, number, 90)) for _ in range(2)]
        told = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(firsts[number]).save(path, save_all=True, append_images=later, **told)

    loaded = load(folder(tmp_path, write, suffix=suffix), COLOURED)
    assert seen(loaded) == wanted(firsts)
    assert any(note.startswith("8 of 8 pictures have several frames") for note in loaded.notes)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: Image.fromarray(drawn(0).astype(np.float32)).save(path),
            "holds floats whose range is not known",
        ),
        (
            lambda path: Image.fromarray(drawn(0).astype(np.float32) / 255).save(path),
            "save it with 8 or 16 bits",
        ),
        (lambda path: tiff(path, drawn(0).astype(np.int32), bits=32, sample=2), "holds integers whose range"),
        (lambda path: tiff(path, drawn(0).astype(np.int16), bits=16, sample=2), "holds integers whose range"),
        (lambda path: path.write_bytes(b""), "cannot be read as a picture"),
        (lambda path: path.write_bytes(b"no picture at all"), "cannot be read as a picture"),
    ],
)
def test_what_has_no_known_range_is_refused_by_its_file(tmp_path, write, message):
    where = folder(tmp_path, lambda number, path: Image.fromarray(drawn(number)).save(path), suffix="tif")
    write(where / "dog" / "5.tif")
    with pytest.raises(DataError, match=message) as caught:
        load(where)
    assert "dog/5.tif" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp", "bmp"])
def test_truncated_files_are_refused_by_name(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    where = folder(tmp_path, lambda number, path: Image.fromarray(noise).save(path), suffix=suffix)
    broken = where / "cat" / f"2.{suffix}"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(DataError, match=r"image item 1 \(.*cat/2") as caught:
        load(where, COLOURED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_bombs_are_refused_by_name(tmp_path, side):
    where = folder(tmp_path, lambda number, path: Image.fromarray(drawn(number)).save(path))
    png(where / "cat" / "0.png", np.zeros((1, 1), np.uint8), 8, 0, size=(side, side))
    with pytest.raises(DataError, match=r"cat/0.png\) has too many pixels .* make it smaller"):
        load(where)


# White and black in every mode of PIL that has a known range
ENDS = {
    **dict.fromkeys(("1", "L"), (255, 0)),
    **dict.fromkeys(("LA", "La"), ((255, 255), (0, 255))),
    **dict.fromkeys(("RGBA", "RGBa", "RGBX"), ((255, 255, 255, 255), (0, 0, 0, 255))),
    **dict.fromkeys(("YCbCr", "LAB"), ((255, 128, 128), (0, 128, 128))),
    "RGB": ((255, 255, 255), (0, 0, 0)),
    "HSV": ((0, 0, 255), (0, 0, 0)),
    "CMYK": ((0, 0, 0, 0), (0, 0, 0, 255)),
    "I;16": (65535, 0),
    "P": (1, 0),
    "PA": ((1, 255), (0, 255)),
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ENDS)
def test_white_is_white_and_black_is_black_in_every_mode(mode, channels):
    for colour, level in zip(ENDS[mode], (255, 0), strict=True):
        image = Image.new(mode, (WIDTH, HEIGHT), colour)
        if mode in {"P", "PA"}:
            image.putpalette([0, 0, 0, 255, 255, 255])
        pixels = image_items([image], [0], PlainProcessor(HEIGHT, WIDTH), channels).inputs["pixel_values"][0]
        assert len(pixels) == channels
        assert float((pixels[:3] * 255 - level).abs().max()) <= 2


def test_models_of_other_channels_are_refused(tmp_path):
    where = folder(tmp_path, lambda number, path: Image.fromarray(drawn(number)).save(path))
    with pytest.raises(DataError, match="pictures have 1, 3 or 4 channels, and this model takes 12"):
        load(where, {**CONFIG, "num_channels": 12})


def test_arrays_of_floats_are_no_pictures():
    with pytest.raises(DataError, match="an array of float64, and one of 8 bits"):
        image_items([np.ones((4, 4))], [0], PlainProcessor(4, 4), 1)


def test_other_files_of_a_folder_are_said(tmp_path):
    where = folder(tmp_path, lambda number, path: Image.fromarray(drawn(number)).save(path))
    (where / "cat" / "notes.txt").write_text("x")
    (where / "dog" / "9.heic").write_bytes(b"x")
    (where / ".hidden").mkdir()
    (where / ".hidden" / "9.png").write_bytes(b"x")
    assert "files of pictures that are no pictures are left out: .heic (1), .txt (1)" in load(where).notes
