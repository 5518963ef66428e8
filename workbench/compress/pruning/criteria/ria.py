"""RIA: relative importance and activations (Zhang et al., Plug-and-Play, ICLR 2024).

A weight counts by its share of its row and of its column, so that no input or output loses all of its
weights, times the norm of its input to the power of a half.
"""

from __future__ import annotations

from torch import Tensor

from workbench.compress.pruning.criterion import CRITERIA, Criterion
from workbench.compress.pruning.criterion.seen import Seen
from workbench.util.about import About

POWER = 0.5  # of the input's norm: the paper's a


def scores(seen: Seen, seed: int) -> Tensor:  # noqa: ARG001  draws nothing
    """Return (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * E[x_j^2]^(1/4); 0 where a sum is 0."""
    size = seen.weights.abs()
    tiny = 1e-30
    by_output = size / size.sum(-1, keepdim=True).clamp_min(tiny)
    by_input = size / size.sum(-2, keepdim=True).clamp_min(tiny)
    return (by_output + by_input) * seen.input_norms().pow(POWER).unsqueeze(-2)


RIA = CRITERIA.register(
    Criterion(
        name="ria",
        about=About(
            "criterion=ria",
            "Zhang et al. 2024",
            "second moments of every layer's inputs, one pass over calibration data",
            "a selection in each layer",
            "moves no weight to make up for those that go; permutes no channels for n:m; one layer at a time",
        ),
        scores=scores,
        reads=frozenset({"moments"}),
        by_row=False,
    )
)
