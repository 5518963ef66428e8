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

    `take` maps row numbers to `Items`; `mixed` says the rows are in random order already.
    """

    size: int
    take: Callable[[Sequence[int]], Items]
    mixed: bool = False

    def order(self, generator: np.random.Generator) -> list[int]:
        """Return every row number in the order to use them."""
        return list(range(self.size)) if self.mixed else [int(i) for i in generator.permutation(self.size)]


@dataclass(frozen=True)
class Reading:
    """How to turn raw rows into a model's items: its config.json and processor, and the window length in
    tokens.
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
    find: Callable[[str, Any], tuple[str, str]],
    make: Callable[[list[Any], list[int], Sequence[int], str], Items],
) -> Pools:
    """Return classified things, one item a row, after checking every label.

    Args:
        raw: the rows.
        config: the model's config.json, with its classes.
        find: (name of the data, rows) -> the columns of things and of labels.
        make: (things, labels, their rows, their column) -> items.

    Raises:
        DataError: a missing column, or a label that is none of the classes.
    """
    notes: list[str] = []

    def pool(split: str) -> Pool:
        rows = raw.splits[split]
        item, label = find(raw.name, rows)
        labels, said = label_numbers(rows, label, config, raw.name)
        notes.extend(note for note in said if note not in notes)
        plain = undecoded(rows, item)

        def take(index: Sequence[int]) -> Items:
            return make(list(plain.select(list(index))[item]), [labels[i] for i in index], index, item)

        return Pool(len(rows), take)

    return *split_pools(raw, pool), tuple(notes)
