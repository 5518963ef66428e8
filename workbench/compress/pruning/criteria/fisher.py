"""Fisher: the change of the loss to second order by the diagonal Fisher information, w^2 E[g^2] / 2 (LeCun et
al. 1990, Theis et al. 2018).
"""

from __future__ import annotations

from torch import Tensor

from workbench.compress.pruning.criterion import CRITERIA, Criterion
from workbench.compress.pruning.criterion.seen import Seen
from workbench.util.about import About


def scores(seen: Seen, seed: int) -> Tensor:  # noqa: ARG001  draws nothing
    """Return w^2 * E[g^2] / 2."""
    return seen.weights.square() * seen.squared_gradients() / 2


FISHER = CRITERIA.register(
    Criterion(
        name="fisher",
        about=About(
            "criterion=fisher",
            "LeCun et al. 1990; Theis et al. 2018",
            "squared gradients of the task's loss on calibration data",
            "a selection in each layer",
            "diagonal: weights are judged one by one",
        ),
        scores=scores,
        reads=frozenset({"gradients"}),
        by_row=False,
        across="as it is",
        units="sum",
    )
)
