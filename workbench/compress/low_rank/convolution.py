"""Kernels of convolutions as smaller convolutions in a row: spatial (k x 1, then 1 x k) and Tucker-2 (1x1,
core, 1x1).

All numbers are float64 while they are worked on; `kernel` is [outputs, channels, height, width].
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.compress.low_rank.decompose import eigenvectors, leading, pseudo_inverse
from workbench.modules.factored import Form, Shape, carried

SWEEPS = 4  # of higher-order orthogonal iteration; the error hardly falls after the second


def convolution_factors(kernel: Tensor, form: Form, moment: Tensor | None) -> list[Tensor]:
    """Return the weights [outputs, inputs, height, width] of the factors of a kernel, in the order in which
    they are applied.

    With the second moment of the inputs' patches, [columns, columns], the last is refitted.
    """
    weights = (
        spatial(kernel, form.ranks[0])
        if form.kind == "spatial"
        else tucker2(kernel, form.ranks[0], form.ranks[1])
    )
    return weights if moment is None else refitted(kernel, weights, moment)


def spatial(kernel: Tensor, rank: int) -> list[Tensor]:
    """Return [r, c, h, 1] and [o, r, 1, w] with the least squared error of the kernel (Jaderberg et al. 2014,
    scheme 2).
    """
    outputs, channels, height, width = kernel.shape
    matrix = kernel.permute(1, 2, 0, 3).reshape(1, channels * height, outputs * width)
    basis = leading(matrix, None, rank)[0]  # [c * h, r]
    rest = basis.t() @ matrix[0]  # [r, o * w]
    scale = rest.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    first = (basis * scale).t().reshape(rank, channels, height, 1)
    return [
        first,
        (rest / scale.unsqueeze(1)).view(rank, outputs, width).transpose(0, 1).unsqueeze(2).contiguous(),
    ]


def tucker2(kernel: Tensor, inputs_rank: int, outputs_rank: int) -> list[Tensor]:
    """Return [ri, c, 1, 1], [ro, ri, h, w] and [o, ro, 1, 1], with ri and ro the ranks of inputs and outputs:
    HOSVD, then a few sweeps that improve each side given the other.
    """
    side_in = mode(kernel.transpose(0, 1), inputs_rank)  # [c, ri]
    side_out = mode(kernel, outputs_rank)  # [o, ro]
    for _ in range(SWEEPS):
        side_in = mode(torch.einsum("ochw,op->cphw", kernel, side_out), inputs_rank)
        side_out = mode(torch.einsum("ochw,cq->oqhw", kernel, side_in), outputs_rank)
    core = torch.einsum("ochw,cq,op->pqhw", kernel, side_in, side_out)
    return [
        side_in.t()[..., None, None].contiguous(),
        core.contiguous(),
        side_out[..., None, None].contiguous(),
    ]


def mode(tensor: Tensor, rank: int) -> Tensor:
    """Return the `rank` directions of the first dimension that carry most of a tensor: orthonormal columns,
    [size, rank].
    """
    flat = tensor.flatten(1)
    return eigenvectors(flat @ flat.t())[1][:, :rank]


def refitted(kernel: Tensor, weights: list[Tensor], moment: Tensor) -> list[Tensor]:
    """Return the factors with the last one replaced by the one of least error of the outputs, given those in
    front of it.
    """
    outputs, _, height, width = kernel.shape
    shape = Shape(outputs, kernel[0].numel(), (height, width), convolution=True)
    seen = carried(weights[:-1], shape)  # [inputs of the last, inputs of the layer]
    last = kernel.flatten(1) @ moment @ seen.t() @ pseudo_inverse(seen @ moment @ seen.t())
    return [*weights[:-1], last.view(weights[-1].shape)]
