"""Random: the baseline that every other criterion should beat."""

from __future__ import annotations

from torch import Tensor

from workbench.compress.pruning.criterion import CRITERIA, Criterion
from workbench.compress.pruning.criterion.seen import Seen
from workbench.util.about import About


def scores(seen: Seen, seed: int) -> Tensor:
    """Return numbers in [0, 1) from the step's seed and the layer's name."""
    return seen.random(seed)


RANDOM = CRITERIA.register(
    Criterion(
        name="random",
        about=About(
            "criterion=random",
            "baseline",
            "nothing",
            "a selection in each layer",
            "what every other criterion should beat",
        ),
        scores=scores,
        reads=frozenset(),
        by_row=False,
        across="as it is",
        units="draw",
    )
)
