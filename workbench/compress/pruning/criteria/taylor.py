"""Taylor: the change of the loss to first order, |w E[g]| (Molchanov et al. 2019)."""

from __future__ import annotations

from torch import Tensor

from workbench.compress.pruning.criterion import CRITERIA, Criterion
from workbench.compress.pruning.criterion.seen import Seen
from workbench.util.about import About


def scores(seen: Seen, seed: int) -> Tensor:  # noqa: ARG001  draws nothing
    """Return |w * E[g]|."""
    return (seen.weights * seen.mean_gradients()).abs_()


TAYLOR = CRITERIA.register(
    Criterion(
        name="taylor",
        about=About(
            "criterion=taylor",
            "Molchanov et al. 2019",
            "gradients of the task's loss on calibration data",
            "a selection in each layer",
            "first order: the mean gradient of a trained model is near zero",
        ),
        scores=scores,
        reads=frozenset({"gradients"}),
        by_row=False,
        across="as it is",
        units="sum",
    )
)
