"""A few rows of one layer's weight with what calibration says about them: what tables of errors are made
from.

An error is relative: t^2 = sum_o f_o (D M D^T)_oo / sum_o f_o (W M W^T)_oo, with W the weight [outputs,
inputs], D what a step changes in it, M = E[x x^T] of the layer's inputs and f_o how much the loss feels
output o (diagonal Fisher information).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.calibration.passes import Gradients
from workbench.modules.layer import Layer

WEIGHTS = 8192  # of one layer that are looked at, in whole rows
FEWEST_ROWS = 8
DAMPING = 0.01  # of second moments that are inverted, of their mean diagonal: the default of GPTQ


@dataclass(frozen=True)
class LayerSample:
    """What is looked at of one layer: `weight` and gradients [r, inputs] of some `rows` (int64 [r]), `felt`
    [r], `moment` [inputs, inputs].
    """

    layer: Layer
    weight: Tensor
    mean: Tensor
    square: Tensor
    felt: Tensor
    moment: Tensor
    rows: Tensor

    @property
    def energy(self) -> Tensor:
        """Return the energy that the sampled outputs carry, as the loss feels it: a float32 scalar."""
        return weighed(self.weight, self)


def sample(layer: Layer, gradients: Gradients, moment: Tensor) -> LayerSample:
    """Return the sample of a layer: rows spread evenly over its outputs. moment: of its inputs, [inputs,
    inputs].
    """
    matrix = layer.matrix()
    rows, columns = matrix.shape
    taken = min(rows, max(FEWEST_ROWS, WEIGHTS // columns))
    index = torch.linspace(0, rows - 1, taken, device=matrix.device).round().long()
    felt = gradients.square[index].sum(1) / moment.diagonal().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return LayerSample(
        layer, matrix[index], gradients.mean[index], gradients.square[index], felt, moment, index
    )


def weighed(errors: Tensor, about: LayerSample) -> Tensor:
    """Return sum_o f_o (D M D^T)_oo of errors D [..., r, inputs], as [...]."""
    return ((((errors @ about.moment) * errors).sum(-1)) * about.felt).sum(-1)


def relative(errors: Tensor, about: LayerSample) -> Tensor:
    """Return errors as shares of the layer's energy, [0, 1] beyond rounding, shaped as they are.

    0 where it carries nothing.
    """
    return torch.where(
        about.energy > 0,
        errors / about.energy.clamp_min(torch.finfo(torch.float32).tiny),
        torch.zeros_like(errors),
    )


def conditional(moment: Tensor, columns: Tensor | None = None) -> Tensor:
    """Return the energy of each input that is left once those after it have made up for it, float32 [inputs]:
    1 / d^2 of the Cholesky factor. `moment` is [inputs, inputs]; `columns` [inputs] is the order, None as
    they stand.
    """
    size = len(moment)
    order = torch.arange(size, device=moment.device) if columns is None else columns
    damped = moment[order][:, order].double()
    damped = damped + (DAMPING * damped.diagonal().mean() + torch.finfo(torch.float32).tiny) * torch.eye(
        size, dtype=torch.float64, device=moment.device
    )
    lower = torch.linalg.cholesky_ex(damped.flip(0, 1)).L.flip(
        0, 1
    )  # M = U U^T with U upper: input j once those after it are known
    left = torch.empty(size, dtype=torch.float64, device=moment.device)
    left[order] = lower.diagonal().square()
    return left.float()
