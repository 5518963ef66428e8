"""Magnitude |w| (Han et al. 2015)."""

from __future__ import annotations

from torch import Tensor

from workbench.compress.pruning.criterion import CRITERIA, Criterion
from workbench.compress.pruning.criterion.seen import Seen
from workbench.util.about import About


def scores(seen: Seen, seed: int) -> Tensor:  # noqa: ARG001  draws nothing
    """Return |w|, [layers, outputs, inputs]."""
    return seen.weights.abs()


MAGNITUDE = CRITERIA.register(
    Criterion(
        name="magnitude",
        about=About(
            "criterion=magnitude",
            "Han et al. 2015",
            "nothing",
            "a selection in each layer",
            "sees weights only: falls behind where inputs differ in size",
        ),
        scores=scores,
        reads=frozenset(),
        by_row=False,
        across="as it is",  # Han et al. 2015, See et al. 2016
        units="norm",  # a group norm, as in Li et al. 2017
        kernel="magnitudes",
    )
)
