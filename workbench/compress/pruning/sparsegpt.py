"""SparseGPT: remove weights column by column, and let the columns that follow make up for each.

Frantar & Alistarh 2023. All layers of one shape go through the column loop together: the loop's length is the
number of inputs, whatever the number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.calibration.passes import full_precision
from workbench.compress.core.inverse import damping_warnings, inverted, scaled_moments
from workbench.compress.core.moments import by_source
from workbench.kernels import column_solver
from workbench.kernels.column_loops import Factor, remove_columns, saliency
from workbench.kernels.column_solver import BLOCK
from workbench.kernels.selection import keep_fewer, spread
from workbench.modules.layer import Layer

if TYPE_CHECKING:
    from workbench.compress.pruning.evidence import Evidence

DAMPING = (
    0.01,
    0.1,
    1.0,
)  # times the mean of the diagonal; the next only where a matrix cannot be inverted with the last


def inverse_factors(layers: tuple[Layer, ...], evidence: Evidence) -> Factor:
    """Return the factors of layers with equally many inputs.

    Those of the dense model's inputs are kept for the next move while there is room.

    Layers that read the same tensor share a factor.

    Raises:
        LayerSkipped: a second moment cannot be inverted even with strong damping; names the layer.
    """
    located = by_source(
        layers,
        evidence.work,
        "inverse factor",
        lambda fresh: factorised(fresh, evidence),
        None if evidence.dense else lambda _: None,
    )
    warn(layers, [stack.damping[place] for stack, place in located], evidence)
    return Factor(
        torch.stack([stack.upper[place] for stack, place in located]),
        torch.stack([stack.alive[place] for stack, place in located]),
    )


@dataclass(frozen=True)
class RemovalFactors:
    """Of some second moments: what `Factor` holds, and the damping of each."""

    upper: Tensor
    alive: Tensor
    damping: tuple[float, ...]


def factorised(layers: list[Layer], evidence: Evidence) -> RemovalFactors:
    """Return the factors of layers as they are now; raises as `inverse_factors`."""
    upper, alive, damping = factorise(torch.stack([evidence.moment(layer) for layer in layers]), layers)
    return RemovalFactors(upper, alive, tuple(damping))


def factorise(moments: Tensor, layers: list[Layer]) -> tuple[Tensor, Tensor, list[float]]:
    """Return (upper Cholesky factors of the damped inverses, which inputs are alive: bool [layers, inputs],
    the damping of each layer).

    Damping is 0.01 of the mean diagonal over the inputs that are not always zero; a dead input gets that mean
    in its place (the paper: 1), so that it neither disturbs the others nor is disturbed. A layer whose matrix
    cannot be inverted is tried again with ten times, then a hundred times the damping.
    """
    scaled, mean, alive = scaled_moments(moments)
    upper, used = inverted(scaled, layers, DAMPING, "criterion='magnitude'")
    return upper / mean.sqrt()[:, None, None], alive, [DAMPING[place] for place in used]


def warn(layers: tuple[Layer, ...], damping: list[float], evidence: Evidence) -> None:
    """Say once which layers needed more damping, and which have seen fewer inputs than they have columns."""
    seen = [(evidence.rows(layer), evidence.moment(layer).shape[0]) for layer in layers]
    said = damping_warnings("prune", layers, damping, DAMPING, seen)
    evidence.work.warnings += [warning for warning in said if warning not in evidence.work.warnings]


@torch.no_grad()
def solve(
    stack: Tensor, factor: Factor, removed: list[int], group: tuple[int, int] | None, masks: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (weights, masks), both [layers, outputs, inputs], with exactly `removed[i]` zeros in layer i, or
    n of m kept.

    stack: float32 weights, changed in place; so is `masks` (True: kept), whose removed weights stay removed.
    Unstructured: each column has a quota of removed // inputs weights, the first removed % inputs columns one
    more; a block of 128 columns removes the sum of its columns' quotas, wherever in the block they cost
    least. n:m: the mask of m columns is chosen when the loop reaches them, so a group sees the updates of all
    before it.
    """
    inputs = stack.shape[2]
    quotas = [spread(count, inputs) for count in removed]
    width = BLOCK if group is None else max(1, BLOCK // group[1]) * group[1]  # no group lies in two blocks
    by_kernel = group is None and column_solver.suited(stack)
    with full_precision():
        for start in range(0, inputs, width):
            end = min(start + width, inputs)
            block, kept = stack[:, :, start:end].clone(), masks[:, :, start:end]
            part = Factor(factor.upper[:, start:end, start:end].contiguous(), factor.alive[:, start:end])
            if group is None:
                kept[:] = keep_fewer(
                    saliency(block, part, kept).flatten(1), [sum(quota[start:end]) for quota in quotas]
                ).view_as(block)
            if by_kernel:
                errors = column_solver.work_through(
                    stack, factor.upper, stack, start, column_solver.Target(masks)
                )
            else:
                errors = remove_columns(block, part, kept, group)
                stack[:, :, start:end] = block * kept
            if end < inputs:
                stack[:, :, end:] -= errors @ factor.upper[:, start:end, end:]
    return stack, masks
