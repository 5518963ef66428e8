"""The column loops of GPTQ and SparseGPT within a block, in plain operations.

The kernel is compared with them, and they run where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.formats.number_formats import FORMATS
from workbench.kernels.selection import keep_of_groups


@dataclass(frozen=True)
class Columns:
    """What a block's columns are rounded to: scales and zero points (None: symmetric) [layers, outputs or 1,
    columns], and what stays.
    """

    scale: Tensor
    zero: Tensor | None
    kept: Tensor | None
    bits: int
    number_format: str  # as in `Quantize`

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """Return the least and the largest multiple of the scale, for an integer grid."""
        if not FORMATS[self.number_format].affine:
            return None
        below = (
            torch.full_like(self.scale, -(1 << (self.bits - 1)))
            if self.zero is None
            else self.zero.float().neg_()
        )
        return below, below + ((1 << self.bits) - 1)


def round_columns(block: Tensor, upper: Tensor, rounded: Tensor, to: Columns) -> Tensor:
    """Round the columns of a block one after the other, into `rounded`; changes `block`.

    Returns the errors [layers, outputs, columns].

    Few kernels a column: on a GPU the loop waits for their launches, not for their work.
    """
    errors = torch.empty_like(block)
    bounds, number_format = to.bounds(), FORMATS[to.number_format]
    for column in range(block.shape[2]):
        weights, scale = block[:, :, column], to.scale[:, :, column]
        steps = weights / scale
        if bounds is None:
            steps = number_format.decoded(number_format.encoded(steps))
        else:
            steps.round_().clamp_(bounds[0][:, :, column], bounds[1][:, :, column])
        values = torch.mul(steps, scale, out=rounded[:, :, column])
        if to.kept is not None:
            values.mul_(to.kept[:, :, column])
        error = torch.sub(weights, values, out=errors[:, :, column])
        block[:, :, column:].addcmul_(error.unsqueeze(2), upper[:, column : column + 1, column:], value=-1)
    return errors


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor U of (E[x x^T] + damping)^-1 of some layers, [layers, inputs, inputs], and
    which inputs are ever non-zero.
    """

    upper: Tensor
    alive: Tensor

    @property
    def diagonal(self) -> Tensor:
        """Return the diagonal of U, [layers, inputs]."""
        return self.upper.diagonal(dim1=-2, dim2=-1)


def remove_columns(block: Tensor, factor: Factor, kept: Tensor, group: tuple[int, int] | None) -> Tensor:
    """Zero the columns of a block one after the other, each made up for by those that follow.

    Changes `block`, and `kept` for n:m.

    Returns what was removed of each column over the factor's diagonal, [layers, outputs, columns]: what later
    blocks make up for.
    """
    errors = torch.empty_like(block)
    for column in range(block.shape[2]):
        if group is not None and column % group[1] == 0:
            chosen = slice(column, column + group[1])
            part = Factor(factor.upper[:, chosen, chosen], factor.alive[:, chosen])
            kept[:, :, chosen] = keep_of_groups(
                saliency(block[:, :, chosen], part, kept[:, :, chosen]), *group
            )
        error = torch.where(kept[:, :, column], 0, block[:, :, column]).div_(factor.diagonal[:, column, None])
        block[:, :, column:].addcmul_(
            error.unsqueeze(2), factor.upper[:, column : column + 1, column:], value=-1
        )
        errors[:, :, column] = error
    return errors


def saliency(weights: Tensor, factor: Factor, kept: Tensor) -> Tensor:
    """Return w^2 / d^2, what removing a weight costs once the columns after it are adjusted.

    0 for inputs never read, -1 for weights gone before.

    weights, kept: [layers, outputs, columns]; the factor's diagonal is that of these columns.
    """
    costs = (weights / factor.diagonal.unsqueeze(1)).square_().mul_(factor.alive.unsqueeze(1))
    return costs.masked_fill_(~kept, -1.0)
