"""Items that are made when they are taken, and what is needed to make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.errors import DataError
from workbench.tasks.base import Items, Kind


@dataclass(frozen=True)
class Sizes:
    """The most items to use for each purpose."""

    evaluation: int
    calibration: int
    training: int

    @classmethod
    def of(
        cls,
        kind: Kind,
        evaluation: int | None = None,
        calibration: int | None = None,
        training: int | None = None,
    ) -> Sizes:
        """Return the sizes given, or the defaults: images and texts 2000 / 512 / 5000, windows of text and
        utterances 64 / 32 / 256.

        Raises:
            DataError: a size below 1.
        """
        defaults = (
            (64, 32, 256) if kind.latency_items == 1 else (2000, 512, 5000)
        )  # one item is a lot of work
        for name, given in zip(
            ("evaluation", "calibration", "training"), (evaluation, calibration, training), strict=True
        ):
            if given is not None and given < 1:
                raise DataError(f"{name}_items={given}: give at least 1")
        return cls(
            *(
                default if given is None else given
                for default, given in zip(defaults, (evaluation, calibration, training), strict=True)
            )
        )


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
    """How to turn raw rows into a model's items: its kind, config.json and processor, and the window length
    in tokens.
    """

    kind: Kind
    config: Mapping[str, Any]
    processor: Any  # tokenizer, image processor, or the processor of a speech model
    context: int | None = None
