"""From the name of some data to disjoint evaluation, calibration and training items.

The name is one of `workbench.tasks.sources.NAMES` (`fashion-mnist-slice`, `wikitext-2`, `wordsim353`, ...), a
hub data set (`owner/name`, or `owner/name:config`), a local file (.jsonl, .json, .csv, .tsv, .parquet, .txt)
or a folder of images. `workbench.tasks.sources` reads it, `workbench.tasks.columns` finds texts, images and
labels in it; this file splits it and keeps the parts apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.errors import DataError
from workbench.tasks import columns, sources
from workbench.tasks.base import Items, Kind
from workbench.tasks.fashion_mnist import LABELS, MEAN, SLICE, STD, slice_arrays
from workbench.tasks.image_classification import grey_items
from workbench.tasks.items import ItemCounts, Pool, Reading

FEW = 16  # evaluation items below which a number says little


@dataclass(frozen=True)
class Data:
    """What a task is measured, calibrated and trained on; no item of `evaluation` is in the others."""

    name: str
    evaluation: Items
    calibration: Items
    training: Items
    labels: tuple[str, ...] = ()  # class names, if the task has classes
    notes: tuple[str, ...] = ()


def load(
    kind: Kind,
    reading: Reading,
    data: str | Path | Any,
    sizes: ItemCounts,
    *,
    seed: int = 0,
    offline: bool = False,
    progress: bool = True,
) -> Data:
    """Return the items of named data (or of a `datasets.Dataset` or `DatasetDict`) for a model.

    None: the kind's default data.

    Where the data have a held-out split (test or validation) and a train split, evaluation items come from
    the first and the others from the second; else one shuffle by `seed` is cut in three. Items equal to an
    evaluation item are dropped from the others, and the notes say how many.

    Raises:
        DataError: no such data, data that do not fit the task, labels outside the model's classes, or too few
            items.
    """
    if str(data) == SLICE:
        cut = _cut(SLICE, *_slice_pools(kind, reading), sizes, seed)
        said = (*cut.notes, *unused_context(kind, reading, cut))
        return replace(cut, labels=kind.labels(reading.config), notes=said)
    raw = (
        sources.first_of(kind.default_data, offline=offline, progress=progress)
        if data is None and kind.default_data
        else sources.read(data, offline=offline, progress=progress)
    )
    train, held_out, notes = kind.pools(reading, raw, sizes)
    cut = _cut(raw.name, train, held_out, sizes, seed)
    cut = replace(cut, labels=kind.labels(reading.config))
    said = (*one_class(cut), *unused_context(kind, reading, cut))
    return replace(cut, notes=(*raw.notes, *notes, *cut.notes, *said))


def _cut(name: str, train: Pool, held_out: Pool | None, sizes: ItemCounts, seed: int) -> Data:
    """Take evaluation, calibration and training items, disjoint, in seeded random order."""
    generator = np.random.default_rng(seed)
    total = train.size + (held_out.size if held_out else 0)
    if total < 3:
        raise DataError(
            f"data {name!r} hold {total} items; at least 3 are needed, to evaluate, to calibrate and to train"
        )
    if held_out is None:
        order = train.order(generator)
        count = min(sizes.evaluation, len(order) // 2)
        evaluation, rest = train.take(order[:count]), order[count:]
    else:
        rows = [int(i) for i in generator.permutation(held_out.size)]
        evaluation, rest = held_out.take(rows[: sizes.evaluation]), train.order(generator)
    if not len(evaluation):
        raise DataError(f"data {name!r} hold no evaluation items: the held-out split is empty")
    kept, dropped = _distinct(train, rest, sizes.calibration + sizes.training, set(evaluation.fingerprints))
    if len(kept) < 2:
        raise DataError(
            f"data {name!r} leave {len(kept)} items to calibrate and train on ({dropped} dropped as copies of"
            " evaluation items); 2 are needed"
        )
    count = calibrating(len(kept), sizes)
    notes = [*train.said(), *(held_out.said() if held_out else ())]
    if dropped:
        notes.append(
            f"{dropped} items of {name} were dropped from calibration and training: they are also in the"
            " evaluation data"
        )
    if len(evaluation) < FEW:
        notes.append(
            f"only {len(evaluation)} evaluation items in {name}: differences will be inside the noise; {FEW}"
            " or more are advised"
        )
    training = kept[count : count + sizes.training]
    return Data(name, evaluation, kept[:count], training, notes=tuple(dict.fromkeys(notes)))


def calibrating(count: int, sizes: ItemCounts) -> int:
    """Return how many of the items that were found are to calibrate on, the others are to train on: as many
    as were asked for where there are enough for both, else at most half, or all that training leaves.
    """
    return min(sizes.calibration, max(count // 2, count - sizes.training))


def unused_context(kind: Kind, reading: Reading, data: Data) -> tuple[str, ...]:
    """Return a note where a length in tokens was given to a kind whose items have none."""
    if reading.context is None or "input_ids" in data.evaluation.inputs:
        return ()
    return (f"context_length={reading.context} is not used: {kind.name} reads no texts",)


def one_class(data: Data) -> tuple[str, ...]:
    """Return a note on evaluation items that are all of one class."""
    classes = data.evaluation.labels.unique().tolist() if data.labels else []
    if len(classes) != 1:
        return ()
    note = (
        f"all {len(data.evaluation)} evaluation items are of one class, {data.labels[classes[0]]}: a model"
        " that always answers it is always right, and nothing is known of the others"
    )
    return (note,)


def _distinct(pool: Pool, order: list[int], wanted: int, held_out: set[str]) -> tuple[Items, int]:
    """Return up to `wanted` items of the pool that are not held out, and how many were dropped for that."""
    kept: list[Items] = []
    count, dropped, position = 0, 0, 0
    while count < wanted and position < len(order):
        rows = order[position : position + wanted - count]
        position += len(rows)
        items = pool.take(rows)
        keep = [i for i, name in enumerate(items.fingerprints) if name not in held_out]
        dropped += len(rows) - len(keep)
        count += len(keep)
        kept.append(items if len(keep) == len(rows) else items[torch.tensor(keep, dtype=torch.long)])
    if not kept:
        return pool.take([]) if pool.size == 0 else pool.take([0])[:0], dropped
    return (
        Items(
            {name: torch.cat([part.inputs[name] for part in kept]) for name in kept[0].inputs},
            torch.cat([part.labels for part in kept]),
        ),
        dropped,
    )


def _slice_pools(kind: Kind, reading: Reading) -> tuple[Pool, Pool]:
    """Return the embedded Fashion-MNIST slice: 5,000 training and 2,000 test images, both balanced and in
    random order.
    """
    size, channels, classes = (
        reading.config.get("image_size", 28),
        reading.config.get("num_channels"),
        columns.classes(reading.config),
    )
    if SLICE not in kind.data_names or (size, channels, len(classes)) != (28, 1, len(LABELS)):
        raise DataError(
            f"data {SLICE!r} are grey images of 28x28 in {len(LABELS)} classes for image"
            f" classification; this model does {kind.name} (image size {size}, channels {channels},"
            f" {len(classes)} classes)"
        )
    arrays = slice_arrays()

    def pool(split: str) -> Pool:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        return Pool(
            len(images),
            lambda rows: grey_items(images[list(rows)], labels[list(rows)], MEAN, STD),
            mixed=True,
        )

    return pool("training"), pool("evaluation")
