"""From the name of some data to disjoint evaluation, calibration and training items.

The name is one of `workbench.tasks.sources.NAMES` (`fashion-mnist-slice`, `wikitext-2`, `wordsim353`, ...), a
hub data set (`owner/name`, or `owner/name:config`), a local file (.jsonl, .json, .csv, .tsv, .parquet, .txt)
or a folder of images. `workbench.tasks.sources` reads it, `workbench.tasks.columns` finds texts, images and
labels in it; this file splits it and keeps the parts apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.errors import DataError
from workbench.tasks import columns, sources
from workbench.tasks.base import Items
from workbench.tasks.fashion_mnist import LABELS, MEAN, SLICE, STD, slice_arrays
from workbench.tasks.image_classification import ImageClassification, grey_items, image_items
from workbench.tasks.language_modelling import CONTEXT, LanguageModelling, window_items, windows
from workbench.tasks.lazy_items import Pool, Reading, Sizes
from workbench.tasks.sentence_similarity import SentenceSimilarity, pair_pools
from workbench.tasks.speech_recognition import SpeechRecognition
from workbench.tasks.text_classification import MAX_TOKENS, TextClassification, text_items
from workbench.tasks.utterances import speech_pools

FEW = 16  # evaluation items below which a number says little
# Windows of text read for each window wanted, so that the ones picked are spread over the text
READ_AHEAD = 8


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
    reading: Reading,
    data: str | Path | Any,
    sizes: Sizes,
    *,
    seed: int = 0,
    offline: bool = False,
    progress: bool = True,
) -> Data:
    """Return the items of named data (or of a `datasets.Dataset` or `DatasetDict`) for a model.

    None: the default text.

    Where the data have a held-out split (test or validation) and a train split, evaluation items come from
    the first and the others from the second; else one shuffle by `seed` is cut in three. Items equal to an
    evaluation item are dropped from the others, and the notes say how many.

    Raises:
        DataError: no such data, data that do not fit the task, labels outside the model's classes, or too few
            items.
    """
    if str(data) == SLICE:
        return replace(
            _cut(SLICE, *_slice_pools(reading), sizes, seed),
            labels=columns.classes(reading.config),
        )
    read = (
        sources.DEFAULTS[reading.kind.name]
        if data is None and reading.kind.name in sources.DEFAULTS
        else partial(sources.read, data)
    )
    raw = read(offline=offline, progress=progress)
    train, held_out, notes = _pools(reading, raw, sizes)
    cut = _cut(raw.name, train, held_out, sizes, seed)
    chooses = isinstance(reading.kind, ImageClassification | TextClassification)
    return replace(
        cut, labels=columns.classes(reading.config) if chooses else (), notes=(*raw.notes, *notes, *cut.notes)
    )


def _pools(reading: Reading, raw: columns.Raw, sizes: Sizes) -> tuple[Pool, Pool | None, tuple[str, ...]]:
    """Return the items to train on, those to evaluate on if they are held out, and notes, as the kind reads
    rows.
    """
    if isinstance(reading.kind, LanguageModelling):
        return _window_pools(reading, raw, sizes)
    if isinstance(reading.kind, SentenceSimilarity):
        return pair_pools(reading, raw)
    if isinstance(reading.kind, SpeechRecognition):
        return speech_pools(reading, raw, sizes)
    return _row_pools(reading, raw)


def _cut(name: str, train: Pool, held_out: Pool | None, sizes: Sizes, seed: int) -> Data:
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
    count = min(sizes.calibration, len(kept) // 2)
    notes = []
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
    return Data(name, evaluation, kept[:count], kept[count:], notes=tuple(notes))


def _distinct(pool: Pool, order: list[int], wanted: int, held_out: set[str]) -> tuple[Items, int]:
    """Return up to `wanted` items of the pool that are not held out, and how many were dropped for that."""
    parts: list[Items] = []
    found, dropped, position = 0, 0, 0
    while found < wanted and position < len(order):
        rows = order[position : position + wanted - found]
        position += len(rows)
        items = pool.take(rows)
        keep = [i for i, name in enumerate(items.fingerprints) if name not in held_out]
        dropped += len(rows) - len(keep)
        found += len(keep)
        parts.append(items if len(keep) == len(rows) else items[torch.tensor(keep, dtype=torch.long)])
    if not parts:
        return pool.take([]) if pool.size == 0 else pool.take([0])[:0], dropped
    return (
        Items(
            {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs},
            torch.cat([part.labels for part in parts]),
        ),
        dropped,
    )


def _slice_pools(reading: Reading) -> tuple[Pool, Pool]:
    """Return the embedded Fashion-MNIST slice: 5,000 training and 2,000 test images, both balanced and in
    random order.
    """
    size, channels, classes = (
        reading.config.get("image_size", 28),
        reading.config.get("num_channels"),
        columns.classes(reading.config),
    )
    if not isinstance(reading.kind, ImageClassification) or (size, channels, len(classes)) != (
        28,
        1,
        len(LABELS),
    ):
        raise DataError(
            f"data {SLICE!r} are grey images of 28x28 in {len(LABELS)} classes for image"
            f" classification; this model does {reading.kind.name} (image size {size}, channels {channels},"
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


def _row_pools(reading: Reading, raw: columns.Raw) -> tuple[Pool, Pool | None, tuple[str, ...]]:
    """Return classified images or texts, one item a row, after checking every label."""
    find = columns.image_columns if isinstance(reading.kind, ImageClassification) else columns.text_columns
    held_out_name = columns.held_out(raw)
    notes: list[str] = []

    def pool(split: str) -> Pool:
        rows = raw.splits[split]
        item, label = find(raw.name, rows)
        labels, said = columns.label_numbers(rows, label, reading.config, raw.name)
        notes.extend(note for note in said if note not in notes)
        return Pool(
            len(rows), lambda index: _encode(reading, columns.undecoded(rows, item), item, labels, index)
        )

    train = pool(columns.train_name(raw, held_out_name))
    return train, pool(held_out_name) if held_out_name else None, tuple(notes)


def _encode(reading: Reading, rows: Any, item: str, labels: list[int], index: Sequence[int]) -> Items:
    """Return the items of some rows."""
    values = list(rows.select(list(index))[item])
    wanted = [labels[i] for i in index]
    if isinstance(reading.kind, ImageClassification):
        return image_items(values, wanted, reading.processor, int(reading.config.get("num_channels") or 3))
    for row, value in zip(index, values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"item {row} has {value!r} in column {item!r}; a text is needed")
    longest = min(
        MAX_TOKENS,
        reading.context or MAX_TOKENS,
        int(reading.config.get("max_position_embeddings") or MAX_TOKENS),
    )
    return text_items(values, wanted, reading.processor, longest)


def _window_pools(
    reading: Reading, raw: columns.Raw, sizes: Sizes
) -> tuple[Pool, Pool | None, tuple[str, ...]]:
    """Return windows of running text."""
    context = reading.context or min(
        CONTEXT,
        int(reading.config.get("max_position_embeddings") or reading.config.get("n_positions") or CONTEXT),
    )
    longest = reading.config.get("max_position_embeddings") or reading.config.get("n_positions")
    if context < 2 or (longest and context > longest):
        raise DataError(
            f"context={context}: a window needs at least 2 tokens"
            + (f" and at most the model's {longest}" if longest else "")
        )
    held_out_name = columns.held_out(raw)

    def pool(split: str, wanted: int) -> Pool:
        rows = raw.splits[split]
        texts = (text for text in rows[columns.text_column(raw.name, rows)] if text)
        ids = windows(texts, reading.processor, context, limit=READ_AHEAD * wanted)
        if not len(ids):
            raise DataError(
                f"data {raw.name!r} ({split}) hold less text than one window of {context} tokens: give more"
                " text or a smaller context"
            )
        return Pool(len(ids), lambda index: window_items(ids[torch.tensor(list(index), dtype=torch.long)]))

    rest = sizes.calibration + sizes.training
    train = pool(columns.train_name(raw, held_out_name), rest + (0 if held_out_name else sizes.evaluation))
    return (
        train,
        pool(held_out_name, sizes.evaluation) if held_out_name else None,
        (f"windows of {context} tokens",),
    )
