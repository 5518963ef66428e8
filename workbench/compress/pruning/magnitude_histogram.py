"""Magnitudes of 16-bit weights: there are so few different ones that counting them once answers every
sparsity.

The bits of |w| in bfloat16 or float16, read as an integer, are ordered as |w| is. How many weights of a layer
have each of the 32,768 values is counted once (128 KB a layer); the threshold of any sparsity, of one layer
or of all, is then looked up. Weights of 32 bits have too many values for this: there
`workbench.kernels.selection` looks for the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch, grouped, matrices_in_place
from workbench.compress.pruning.criteria import CRITERIA
from workbench.kernels import magnitudes
from workbench.kernels.magnitudes import VALUES
from workbench.modules.layer import Layer

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics
    from workbench.compress.pruning.options import Prune

MOST = 2**31 - 1  # weights of a layer: what the counts can hold


def countable(step: Prune, layers: Sequence[Layer]) -> bool:
    """Return whether all weights are judged by magnitudes that can be counted: 16 bits of one format, none
    taken by an earlier round.
    """
    formats = {layer.parameter.dtype for layer in layers}
    fit = all(layer.mask is None and layer.parameter.numel() <= MOST for layer in layers)
    return (
        CRITERIA[step.criterion].kernel == "magnitudes"
        and step.group is None
        and len(formats) == 1
        and formats <= {torch.float16, torch.bfloat16}
        and fit
    )


def counts(batch: Batch, statistics: Statistics) -> Tensor:
    """Return how many weights of each layer have at most each magnitude, int32 [layers, 32768].

    Kept for the next move where the weights are the dense model's.
    """

    def compute() -> Tensor:
        return torch.cat([counted(part) for part in grouped(batch.layers)])

    if not all(layer.pristine for layer in batch.layers):
        return compute()
    return statistics.once(
        ("magnitudes", tuple(layer.origin for layer in batch.layers)), compute, lasting=True, optional=True
    )


def counted(batch: Batch) -> Tensor:
    """Return how many weights of each layer have at most each magnitude, int32 [layers, 32768], of a batch
    that may be copied.
    """
    number = len(batch.layers)
    keys = (
        magnitudes.keys(batch.stored().flatten(1)).int()
        + VALUES * torch.arange(number, dtype=torch.int32, device=batch.layers[0].parameter.device)[:, None]
    )
    return torch.bincount(keys.flatten(), minlength=number * VALUES).view(number, VALUES).cumsum(1).int()


def below_threshold(
    layers: Sequence[Layer], statistics: Statistics, target: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many weights of each layer lie below the `target`-th smallest of all, and how many are equal
    to it.
    """
    tables = [
        (batch, counts(batch, statistics))
        for batch in grouped(layers, whole=matrices_in_place(layers) is not None)
    ]
    reached = torch.stack(
        [table.sum(0, dtype=torch.int64).to(tables[0][1].device) for _, table in tables]
    ).sum(0)
    place = int(torch.searchsorted(reached, torch.tensor(target, device=reached.device)))
    less: dict[str, int] = {}
    ties: dict[str, int] = {}
    for batch, table in tables:
        upto = table[:, place].tolist()
        before = table[:, place - 1].tolist() if place else [0] * len(upto)
        less |= {layer.name: count for layer, count in zip(batch.layers, before, strict=True)}
        ties |= {
            layer.name: end - start for layer, start, end in zip(batch.layers, before, upto, strict=True)
        }
    return less, ties
