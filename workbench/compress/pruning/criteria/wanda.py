"""Wanda: |w| ||x||, compared within each output row (Sun et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from workbench.compress.pruning.criterion import CRITERIA, Criterion
from workbench.compress.pruning.criterion.seen import Seen
from workbench.util.about import About


def scores(seen: Seen, seed: int) -> Tensor:  # noqa: ARG001  draws nothing
    """Return |w| * sqrt(E[x^2])."""
    return seen.weights.abs() * seen.input_norms().unsqueeze(-2)


WANDA = CRITERIA.register(
    Criterion(
        name="wanda",
        about=About(
            "criterion=wanda",
            "Sun et al. 2023",
            "second moments of every layer's inputs, one pass over calibration data",
            "a selection in each row",
            "moves no weight to make up for those that go",
        ),
        scores=scores,
        reads=frozenset({"moments"}),
        by_row=True,
        across="root of output error",
        units="norm",
        kernel="rows",
    )
)
