"""GPTQ: round column by column, and let the columns that follow make up for the error of each.

Frantar et al. 2022. All layers of one shape go through the column loop together: the loop's length is the
number of inputs, whatever the number of layers. Scales are fitted before (static groups), so that activation
ordering only changes the order in which columns are worked through: groups stay contiguous, and what is
stored looks like any other grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.calibration.passes import full_precision
from workbench.compress.core.inverse import damping_warnings, inverted, scaled_moments
from workbench.compress.core.moments import by_source, second_moment_of
from workbench.compress.quantization.scales import Scales, Spec
from workbench.kernels import column_solver
from workbench.kernels.column_loops import Columns, round_columns
from workbench.kernels.column_solver import BLOCK
from workbench.modules.layer import Layer

if TYPE_CHECKING:
    from workbench.compress.core.context import Work

STRONGER = (
    1,
    10,
    100,
)  # times the damping that was asked for; the next only where a matrix cannot be inverted with the last


@dataclass(frozen=True)
class Order:
    """Of some layers: the columns in the order in which they are rounded, and how an error spreads over those
    that follow.

    `upper` [layers, inputs, inputs]: the upper Cholesky factor of (E[x x^T] + damping)^-1 in that order, each
    row divided by its diagonal; `columns` int64 [layers, inputs].
    """

    upper: Tensor
    columns: Tensor


def orders(layers: tuple[Layer, ...], work: Work, *, damping: float, by_activation: bool) -> Order:
    """Return the order and factor of each layer.

    Those of the dense model's inputs are kept for the next move.

    Raises:
        LayerSkipped: a second moment cannot be inverted even with strong damping; names the layer.
    """
    options = "gptq order", damping, by_activation
    located = by_source(
        layers,
        work,
        options,
        lambda fresh: factorised(fresh, work, damping=damping, by_activation=by_activation),
    )
    warn(layers, [stack.stronger[place] for stack, place in located], damping, work)
    return Order(
        torch.stack([stack.upper[place] for stack, place in located]),
        torch.stack([stack.columns[place] for stack, place in located]),
    )


@dataclass(frozen=True)
class RoundingFactors:
    """Of some second moments: what `Order` holds, and by how much the damping of each was raised."""

    upper: Tensor
    columns: Tensor
    stronger: tuple[int, ...]


def factorised(layers: list[Layer], work: Work, *, damping: float, by_activation: bool) -> RoundingFactors:
    """Return the orders of layers as they are now; raises as `orders`."""
    upper, columns, stronger = factorise(
        torch.stack([second_moment_of(layer, work) for layer in layers]),
        layers,
        damping=damping,
        by_activation=by_activation,
    )
    return RoundingFactors(upper, columns, tuple(stronger))


def factorise(
    moments: Tensor, layers: list[Layer], *, damping: float, by_activation: bool
) -> tuple[Tensor, Tensor, list[int]]:
    """Return (upper factors over their diagonals [layers, inputs, inputs], columns in order, int64 [layers,
    inputs], by how much the damping was raised) of some layers.

    Damping is a fraction of the mean diagonal over the inputs that are not always zero. A dead input gets
    that mean in its place, so that it neither disturbs the others nor is disturbed, and comes last.
    """
    scaled, _, _ = scaled_moments(moments)
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    places = torch.arange(moments.shape[1], device=moments.device).expand_as(diagonal)
    columns = diagonal.argsort(dim=1, descending=True, stable=True) if by_activation else places
    if by_activation:
        scaled = scaled.gather(1, columns.unsqueeze(2).expand_as(scaled)).gather(
            2, columns.unsqueeze(1).expand_as(scaled)
        )
    upper, used = inverted(scaled, layers, dampings(damping), "rounding='rtn'")
    return upper / upper.diagonal(dim1=-2, dim2=-1).unsqueeze(2), columns, [STRONGER[place] for place in used]


def dampings(damping: float) -> list[float]:
    """Return the dampings that are tried one after the other where `damping` was asked for."""
    return [times * damping for times in STRONGER]


def warn(layers: tuple[Layer, ...], stronger: list[int], damping: float, work: Work) -> None:
    """Say once which layers needed more damping, and which have seen fewer inputs than they have columns."""
    seen = [(work.statistics.rows(layer.origin), layer.shape[1]) for layer in layers]
    taken = [times * damping for times in stronger]
    said = damping_warnings("quantize", layers, taken, dampings(damping), seen)
    work.warnings += [warning for warning in said if warning not in work.warnings]


@torch.no_grad()
def solve(stack: Tensor, scales: Scales, order: Order, spec: Spec, masks: Tensor | None = None) -> Tensor:
    """Return the rounded weights, float32 [layers, outputs, inputs], each on the grid of `scales`.

    Zero where `masks` is False.

    stack: float32 weights. Every column is rounded as it stands when the loop reaches it; its error, times
    the row of the factor, is taken from the columns that follow, at once within a block of 128 and after it
    for all others.
    """
    places = order.columns.unsqueeze(1).expand_as(stack)
    weights = stack.gather(2, places)
    scale, zero = (
        None if part is None else in_order(part, places, spec) for part in (scales.scale, scales.zero)
    )
    kept = None if masks is None else masks.gather(2, places)
    rounded, by_kernel = (
        torch.empty_like(weights),
        spec.format.affine and column_solver.suited(weights),
    )
    with full_precision():
        for start in range(0, stack.shape[2], BLOCK):
            part = slice(start, start + BLOCK)
            if by_kernel:
                errors = column_solver.work_through(
                    weights, order.upper, rounded, start, column_solver.Target(kept, scale, zero, spec.bits)
                )
            else:
                errors = round_columns(
                    weights[:, :, part].clone(),
                    order.upper[:, part, part],
                    rounded[:, :, part],
                    Columns(
                        scale[:, :, part],  # type: ignore[index]
                        None if zero is None else zero[:, :, part],
                        None if kept is None else kept[:, :, part],
                        spec.bits,
                        spec.number_format,
                    ),
                )
            if start + BLOCK < stack.shape[2]:
                weights[:, :, start + BLOCK :] -= errors @ order.upper[:, part, start + BLOCK :]
    return torch.empty_like(rounded).scatter_(2, places, rounded)


def in_order(part: Tensor, columns: Tensor, spec: Spec) -> Tensor:
    """Return scales or zero points for each column in its order: [layers, outputs, inputs], or [layers,
    outputs or 1, 1 expanded] where all are one.
    """
    if part.shape[2] == 1:
        return part.expand(*part.shape[:2], columns.shape[2])
    return part.gather(2, columns // spec.group_size)
