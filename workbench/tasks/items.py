"""Examples as tensors: what a model is given and what is wanted of it; and pools of them, made when taken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.errors import DataError
from workbench.tasks.columns import Raw, held_out, label_numbers, train_name, undecoded
from workbench.tasks.reading.texts import ReadColumns

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Items:
    """A materialised set of examples: model inputs by keyword, first dimension = item, and `labels` ([N] or
    [N, L]).

    `inputs` are what `model(**inputs)` takes (`pixel_values` [N, C, H, W]; `input_ids`, `attention_mask` [N,
    L]; two texts an item, [N, 2, L], for sentence similarity). Labels of -100 are not scored (the convention
    of torch's cross entropy).
    """

    inputs: Batch
    labels: Tensor

    def __post_init__(self) -> None:
        """Refuse tensors of different lengths."""
        lengths = {name: len(tensor) for name, tensor in {**self.inputs, "labels": self.labels}.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"inputs and labels differ in length: {lengths}")

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Items:
        """Return the items of a slice or of an index tensor."""
        return Items({name: tensor[index] for name, tensor in self.inputs.items()}, self.labels[index])

    def to(self, device: torch.device | str) -> Items:
        """Return the same items on `device`."""
        return Items(
            {name: tensor.to(device) for name, tensor in self.inputs.items()}, self.labels.to(device)
        )

    def batches(self, size: int) -> Iterator[Items]:
        """Iterate over consecutive batches of at most `size` items."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """Return one hash per item, of its inputs alone: two items with the same hash are the same
        example.
        """
        columns = [self.inputs[name].cpu().contiguous() for name in sorted(self.inputs)]
        return tuple(
            hashlib.sha256(b"".join(column[i].numpy().tobytes() for column in columns)).hexdigest()[:16]
            for i in range(len(self))
        )

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all items and labels, in order: 16 hexadecimal digits."""
        digest = hashlib.sha256("".join(self.fingerprints).encode())
        digest.update(self.labels.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ItemCounts:
    """The most items to use for each purpose: a kind's own, where it says how many, unless a user does."""

    evaluation: int
    calibration: int
    training: int

    def limited(
        self, evaluation: int | None = None, calibration: int | None = None, training: int | None = None
    ) -> ItemCounts:
        """Return the sizes given, these where None is.

        Raises:
            DataError: a size below 1.
        """
        given = {"evaluation": evaluation, "calibration": calibration, "training": training}
        for name, size in given.items():
            if size is not None and size < 1:
                raise DataError(f"{name}_items={size}: give at least 1")
        return replace(self, **{name: size for name, size in given.items() if size is not None})


@dataclass(frozen=True)
class Pool:
    """Items that are made when taken.

    `take` maps row numbers to `Items`; `mixed` says the rows are in random order already; `said` returns
    notes on those that were taken.
    """

    size: int
    take: Callable[[Sequence[int]], Items]
    mixed: bool = False
    said: Callable[[], tuple[str, ...]] = tuple

    def order(self, generator: np.random.Generator) -> list[int]:
        """Return every row number in the order to use them."""
        return list(range(self.size)) if self.mixed else [int(i) for i in generator.permutation(self.size)]


@dataclass(frozen=True)
class Reading:
    """How to turn raw rows into a model's items: its config.json and processor, and the length in tokens of a
    window, or of the longest text.
    """

    config: Mapping[str, Any]
    processor: Any  # tokenizer, image processor, or the processor of a speech model
    context: int | None = None


# Items to train on, those to evaluate on if they are held out, and notes
Pools = tuple[Pool, Pool | None, tuple[str, ...]]


def split_pools(raw: Raw, pool: Callable[[str], Pool]) -> tuple[Pool, Pool | None]:
    """Return the items to train on and those that are held out, if there are any: `pool` makes those of a
    split.
    """
    held_out_name = held_out(raw)
    train = pool(train_name(raw, held_out_name))
    return train, pool(held_out_name) if held_out_name else None


def labelled_pools(
    raw: Raw,
    config: Mapping[str, Any],
    find: Callable[[str, Any], tuple[ReadColumns, str]],
    make: Callable[[list[list[Any]], list[int], Sequence[int], ReadColumns], Items],
    said: Callable[[], tuple[str, ...]] = tuple,
) -> Pools:
    """Return classified things, one item a row, after checking every label.

    Args:
        raw: the rows.
        config: the model's config.json, with its classes.
        find: (name of the data, rows) -> the columns of things and that of labels.
        make: (things of each column, labels, their rows, their columns) -> items.
        said: notes on the things that were made.

    Raises:
        DataError: a missing column, or a label that is none of the classes.
    """
    notes: list[str] = []

    def pool(split: str) -> Pool:
        rows = raw.splits[split]
        chosen, label = find(raw.name, rows)
        labels, noted = label_numbers(rows, label, config, raw.name)
        if set(rows.column_names) != {"image", "label"}:  # those of a folder of pictures
            notes.extend(chosen.notes(label))
        notes.extend(noted)
        plain = rows
        for column in chosen.columns:
            plain = undecoded(plain, column)

        def take(index: Sequence[int]) -> Items:
            some = plain.select(list(index))
            things = [list(some[column]) for column in chosen.columns]
            return make(things, [labels[i] for i in index], index, chosen)

        return Pool(len(rows), take, said=said)

    return *split_pools(raw, pool), tuple(dict.fromkeys(notes))
