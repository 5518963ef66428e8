"""SparseGPT: what removing a weight costs once the weights after it have made up for it, which they then do
(Frantar & Alistarh 2023; the solver is in `workbench.compress.pruning.sparsegpt`).
"""

from __future__ import annotations

from torch import Tensor

from workbench.compress.pruning.criterion import CRITERIA, Criterion
from workbench.compress.pruning.criterion.seen import Seen
from workbench.util.about import About


def scores(seen: Seen, seed: int) -> Tensor:  # noqa: ARG001  draws nothing
    """Return w^2 / d^2, [layers, outputs, inputs], see `Seen.removal_errors`."""
    return seen.removal_errors()


SPARSEGPT = CRITERIA.register(
    Criterion(
        name="sparsegpt",
        about=About(
            "criterion=sparsegpt",
            "Frantar & Alistarh 2023",
            "second moments of every layer's inputs, one pass over calibration data, and their inverse"
            " factors",
            "a pass over all columns",
            "solves layers for the dense model's inputs, not one after another",
        ),
        scores=scores,
        reads=frozenset({"moments"}),
        by_row=False,
        across="output error",
        makes_up=True,
    )
)
