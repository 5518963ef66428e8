"""Criteria of pruning: what makes a weight unimportant. One registered record holds every fact of one.

The built-in ones are in `workbench.compress.pruning.criteria`, one file each. The same function scores the
weights that are removed and those from which a prediction is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from workbench.compress.pruning.criterion.seen import Seen, Statistic
from workbench.compress.pruning.criterion.trial import wrong_scores
from workbench.errors import RecipeError
from workbench.util.about import About
from workbench.util.registry import Registry


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
    """Refuse a criterion whose facts contradict one another, or are not those of its scores of two made-up
    layers (`workbench.compress.pruning.criterion.trial`).
    """
    draws = record.units == "draw"
    wrong = contradiction(record) or wrong_scores(
        record.scores, record.reads, record.kernel, makes_up=record.makes_up, draws=draws
    )
    if wrong:
        raise RecipeError(f"criterion {record.name!r} cannot be registered: {wrong}")


def contradiction(record: Criterion) -> str:
    """Return which facts contradict one another, "" if none do."""
    if record.reads - {"moments", "gradients"}:
        return f"reads={sorted(record.reads)} should be of 'moments' and 'gradients'"
    if record.makes_up and record.units is not None:
        return f"makes_up adjusts single weights, and units={record.units!r} takes out whole units"
    if record.kernel == "rows" and not record.by_row:
        return "kernel='rows' compares weights within their row, and by_row=False"
    if record.kernel == "magnitudes" and record.by_row:
        return "kernel='magnitudes' compares weights within their layer, and by_row=True"
    if record.kernel == "magnitudes" and record.across not in {None, "as it is"}:
        return f"kernel='magnitudes' compares layers as they are, and across={record.across!r}"
    return ""


CRITERIA: Registry[Criterion] = Registry("criterion", check)
