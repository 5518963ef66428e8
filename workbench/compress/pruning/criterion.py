"""Criteria of pruning: what makes a weight unimportant. One registered record holds every fact of one.

The built-in ones are in `workbench.compress.pruning.criteria`, one file each. The same function scores the
weights that are removed and those from which a prediction is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from workbench.errors import RecipeError
from workbench.util.about import About
from workbench.util.registry import Registry

Statistic = Literal["moments", "gradients"]


class Seen(ABC):
    """What a criterion may look at: weights of layers of one shape, and what calibration says about them."""

    weights: Tensor  # float32 [layers, outputs, inputs]; not to be changed

    @abstractmethod
    def input_norms(self) -> Tensor:
        """Return sqrt(E[x_i^2]) of each layer's inputs, float32 [layers, inputs]; reads moments."""

    @abstractmethod
    def mean_gradients(self) -> Tensor:
        """Return E[g] of the loss by each weight, float32 [layers, outputs, inputs]; reads gradients."""

    @abstractmethod
    def squared_gradients(self) -> Tensor:
        """Return E[g^2] of the loss by each weight, float32 [layers, outputs, inputs]; reads gradients."""

    @abstractmethod
    def removal_errors(self) -> Tensor:
        """Return the squared output error of removing each weight once the weights after it have made up for
        it, w^2 / d^2, float32 [layers, outputs, inputs]; d is the diagonal of the Cholesky factor of the
        inverse second moment, and 0 is for inputs that are never read. Reads moments.
        """

    @abstractmethod
    def random(self, seed: int) -> Tensor:
        """Return numbers drawn from [0, 1), float32 [layers, outputs, inputs], by the seed and the layer."""


@dataclass(frozen=True)
class Criterion:
    """Every fact of one criterion. None means unknown: what needs the fact is refused, with the reason.

    scores: (what may be seen, the step's seed) -> importance, float32 >= 0 [layers, outputs, inputs], a new
        tensor; the least go.
    reads: which statistics of calibration data it looks at.
    by_row: whether weights are compared within their output row, or within their whole layer.
    across: what brings importance of several layers on one scale, for one threshold over all of them: nothing
        ("as it is"); dividing a squared error of the layer's outputs by their energy ("output error"); the
        same once it is squared ("root of output error").
    units: how weights' importance makes up that of a unit (a head, a neuron, a channel): the root of the sum
        of squares ("norm"), the sum ("sum"), or a draw for each unit ("draw").
    makes_up: whether the weights that stay are adjusted to make up for those that go (SparseGPT's solver).
    kernel: a faster way to the same selection: counting 16-bit magnitudes ("magnitudes"), or one pass over
        the rows of |w| times the inputs' norms ("rows"); "" for none.
    """

    name: str
    about: About
    scores: Callable[[Seen, int], Tensor]
    reads: frozenset[Statistic]
    by_row: bool
    across: Literal["as it is", "output error", "root of output error"] | None = None
    units: Literal["norm", "sum", "draw"] | None = None
    makes_up: bool = False
    kernel: Literal["", "magnitudes", "rows"] = ""

    @property
    def settled(self) -> bool:
        """Return whether one round removes what several do where nothing is trained between them."""
        return not self.reads and not self.makes_up

    @property
    def repeats(self) -> bool:
        """Return whether zeros can be chosen again from weights and second moments alone."""
        return self.reads <= {"moments"} and not self.makes_up and self.units != "draw"


def check(record: Criterion) -> None:
    """Refuse a criterion whose facts contradict one another."""
    if record.makes_up and record.units is not None:
        raise RecipeError(
            f"criterion {record.name!r} cannot be registered: makes_up adjusts single weights, and"
            f" units={record.units!r} takes out whole units"
        )
    unknown = record.reads - {"moments", "gradients"}
    if unknown:
        raise RecipeError(
            f"criterion {record.name!r} cannot be registered: reads={sorted(record.reads)} should be of"
            " 'moments' and 'gradients'"
        )


CRITERIA: Registry[Criterion] = Registry("criterion", check)
