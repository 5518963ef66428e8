"""Image classification: pictures in, one class out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.tasks import columns
from workbench.tasks.base import Items
from workbench.tasks.fashion_mnist import SLICE
from workbench.tasks.items import ItemCounts, Pools, Reading, labelled_pools
from workbench.tasks.likelihood import Choosing
from workbench.tasks.processors import FEATURE_FILES, load_from
from workbench.tasks.reading.pictures import name_of, shown
from workbench.tasks.reading.tally import Tally
from workbench.tasks.reading.texts import ReadColumns

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE = 3 * 128 * 128  # numbers of a picture, from which on few are run at once
Processor = Callable[..., Any]  # processor(images=[...], return_tensors="pt")["pixel_values"] is [N, C, H, W]


@dataclass(frozen=True)
class ImageClassification(Choosing):
    """One label per image; quality is accuracy."""

    name = "image classification"
    auto_class = "AutoModelForImageClassification"
    architectures = ("ForImageClassification", "ForImageClassificationWithTeacher")
    type_mapping = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    primary = "accuracy"
    distribution = "image"
    sizes = ItemCounts(2000, 512, 5000)
    latency_items = 16
    sensitivity_items = 256
    data_names = (SLICE,)
    default_data = ()
    files = FEATURE_FILES
    kv_cache = False
    behaviour = "classes"

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return why a head does not choose one class."""
        return columns.not_one_class(config)

    def processor(self, directory: Path, config: Mapping[str, Any]) -> Any:
        """Return the image processor of a folder, a `PlainProcessor` where it has no
        preprocessor_config.json.
        """
        if not (directory / "preprocessor_config.json").is_file():
            return plain_processor(config)
        from transformers.models.auto.image_processing_auto import (
            AutoImageProcessor,  # at the top it may ask for torchvision
        )

        # The same pixels with and without torchvision
        return load_from(directory, "preprocessor", AutoImageProcessor, backend="pil")

    def pools(self, reading: Reading, raw: columns.Raw, sizes: ItemCounts) -> Pools:  # noqa: ARG002
        """Return images, one item a row, after checking every label."""
        channels = int(reading.config.get("num_channels") or 3)

        tally = Tally("pictures")

        def make(
            images: list[list[Any]], labels: list[int], rows: Sequence[int], _read: ReadColumns
        ) -> Items:
            return image_items(images[0], labels, reading.processor, channels, rows=rows, tally=tally)

        return labelled_pools(raw, reading.config, columns.image_columns, make, tally.notes)

    def labels(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the classes."""
        return columns.classes(config)

    def batch_size(self, evaluation: Items, *, on_cpu: bool) -> int:
        """Return how many images are run at once."""
        if evaluation.inputs["pixel_values"][0].numel() > LARGE:
            return 16 if on_cpu else 64
        return 128 if on_cpu else 512

    def logits(self, model: nn.Module, items: Items) -> Tensor:
        """Return [N, classes] for `pixel_values` [N, C, H, W], which are cast to the type that the model
        computes in.
        """
        dtype = next(
            (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32
        )
        logits: Tensor = model(pixel_values=items.inputs["pixel_values"].to(dtype)).logits
        return logits


IMAGE_CLASSIFICATION = ImageClassification()


@dataclass(frozen=True)
class PlainProcessor:
    """What to do with pictures when a model has no preprocessor_config.json: resize, scale to [0, 1], nothing
    else.

    `height` and `width` in pixels. Called like a transformers image processor.
    """

    height: int
    width: int

    # As transformers calls it
    def __call__(
        self,
        images: Sequence[Image],
        return_tensors: str = "pt",  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return {"pixel_values": [N, C, H, W]} in float32."""
        pixels = [
            np.atleast_3d(np.asarray(image.resize((self.width, self.height), resample=2), np.float32)) / 255
            for image in images
        ]
        return {"pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()}


def plain_processor(config: Mapping[str, Any]) -> PlainProcessor:
    """Return the processor of a model that says nothing but its image size."""
    given = config.get("image_size") or 224
    height, width = given if isinstance(given, list | tuple) else (given, given)
    return PlainProcessor(height=int(height), width=int(width))


def grey_items(images: np.ndarray, labels: np.ndarray, mean: float, std: float) -> Items:
    """Return items of grey images: [N, H, W] uint8 -> `pixel_values` [N, 1, H, W] float32, (grey level -
    mean) / std.
    """
    pixels = (torch.from_numpy(images) / 255 - mean) / std
    return Items({"pixel_values": pixels.unsqueeze(1)}, torch.from_numpy(labels).long())


def image_items(
    images: Iterable[Any],
    labels: Sequence[int],
    processor: Processor,
    channels: int,
    *,
    rows: Sequence[int] | None = None,
    tally: Tally | None = None,
) -> Items:
    """Return items of PIL pictures (or of dicts with their bytes or path, as `datasets` gives them when
    undecoded), upright and of 8 bits; `tally` counts what was done to them.

    Raises:
        DataError: a picture that cannot be read or shown rightly, by its file and its place in the data
            (`rows`).
    """
    pixels = []
    counted = Tally("pictures") if tally is None else tally
    for index, image in enumerate(images):
        what = name_of(image, index if rows is None else rows[index])
        picture = shown(image, channels, what, counted)
        pixels.append(torch.as_tensor(processor(images=[picture], return_tensors="pt")["pixel_values"]))
    return Items({"pixel_values": torch.cat(pixels).float()}, torch.tensor(labels, dtype=torch.long))
