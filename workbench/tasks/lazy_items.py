"""Items that are made when they are taken, and what is needed to make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from workbench.errors import DataError
from workbench.tasks.columns import Raw, held_out, train_name
from workbench.tasks.items import Items


@dataclass(frozen=True)
class Sizes:
    """The most items to use for each purpose: a kind's own, where it says how many, unless a user does."""

    evaluation: int
    calibration: int
    training: int

    def limited(
        self, evaluation: int | None = None, calibration: int | None = None, training: int | None = None
    ) -> Sizes:
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
