"""Weights on an affine grid: small integer codes, a scale per group and, if asymmetric, a zero point per
group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """weight[o, i] = (codes[o, i] - zero[o, g]) * scale[o, g], with g = i // group_size.

    `codes` uint8 [outputs, inputs] below 2^bits; `scale` [outputs, groups] ([1, 1]: one for the whole
    tensor), float16 where its range allows, else float32; `zero_point` uint8, shaped as `scale`, or None for
    the symmetric grid, whose zero is 2^(bits - 1). Zero is always on the grid, so that pruned weights stay
    exactly zero. All may have one more dimension in front: layers of one shape together. Other forms:
    `workbench.formats.stored_forms`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        """Return the number of consecutive inputs that share a scale."""
        return self.codes.shape[-1] // self.scale.shape[-1]

    @property
    def overhead_bits(self) -> int:
        """Return the bits that scales and zero points take."""
        return 8 * self.scale.nbytes + (0 if self.zero_point is None else self.zero_point.numel() * self.bits)

    @property
    def zeros(self) -> Tensor:
        """Return the zero points as float32 [outputs, groups], or a scalar for a symmetric grid."""
        if self.zero_point is None:
            return torch.tensor(float(1 << (self.bits - 1)), device=self.scale.device)
        return self.zero_point.float()

    def dequantize(self) -> Tensor:
        """Return the weights as float32 [outputs, inputs]: the same multiplication everywhere, so the same
        bits.
        """
        grouped = self.codes.unflatten(-1, (self.scale.shape[-1], -1)).float()
        zeros = self.zeros if self.zero_point is None else self.zeros.unsqueeze(-1)
        weights: Tensor = (grouped - zeros) * self.scale.float().unsqueeze(-1)
        return weights.flatten(-2)

    def snap(self, matrix: Tensor) -> Grid:
        """Return the same grid with the codes nearest to `matrix` (float32 [outputs, inputs]).

        Scales do not move.
        """
        return Grid(
            nearest_codes(matrix, self.scale, self.zero_point, self.bits),
            self.scale,
            self.zero_point,
            self.bits,
        )


def nearest_codes(matrix: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the nearest codes, uint8 [..., outputs, inputs], of a float32 matrix for scales [..., outputs,
    groups].
    """
    zeros = 1 << (bits - 1) if zero_point is None else zero_point.float().unsqueeze(-1)
    codes = torch.round(matrix.unflatten(-1, (scale.shape[-1], -1)) / scale.float().unsqueeze(-1)) + zeros
    return codes.clamp_(0, (1 << bits) - 1).to(torch.uint8).flatten(-2)
