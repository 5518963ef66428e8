"""Keys and values of attention as bytes: small integers, a scale and a zero point for every group of a head's
numbers.

One row of bytes a token and head: the packed codes, then the scales (float16), then the zero points (uint8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.formats.bit_packing import unpack

HALF_MOST = 65504.0  # the largest float16


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored: `bits` a number, one scale for `group_size` consecutive numbers of a
    head (0: all of it).
    """

    bits: int
    group_size: int = 0

    def groups(self, head: int) -> int:
        """Return the number of groups of a head with so many numbers."""
        return head // (self.group_size or head)

    def row_bytes(self, head: int) -> int:
        """Return the bytes of one token and head, of keys or of values: codes, scales, zero points."""
        return self.code_bytes(head) + 3 * self.groups(head)

    def code_bytes(self, head: int) -> int:
        """Return the bytes of the codes of one token and head.

        A head whose numbers do not fill the last byte is padded.
        """
        return -(-head // 8) * self.bits

    def encode(self, values: Tensor) -> Tensor:
        """Return uint8 [..., row_bytes] of values [..., head], whose last dimension the group size divides.

        Zero is on every grid. A group with infinite or NaN values comes back as NaN.
        """
        head, most = values.shape[-1], (1 << self.bits) - 1
        grouped = values.detach().float().unflatten(-1, (self.groups(head), -1))
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        exact = (high - low) / most
        scale = torch.where(
            torch.isfinite(exact), exact.clamp_max(HALF_MOST), torch.full_like(exact, torch.nan)
        ).half()
        wide = torch.where(scale == 0, torch.ones_like(scale), scale).float()
        zero = (-low / wide).round_().clamp_(0, most)
        codes = (
            (grouped / wide.unsqueeze(-1))
            .round_()
            .add_(zero.unsqueeze(-1))
            .clamp_(0, most)
            .nan_to_num_(0)
            .to(torch.uint8)
            .flatten(-2)
        )
        return torch.cat(
            [self.packed(codes), scale.contiguous().view(torch.uint8), zero.nan_to_num_(0).to(torch.uint8)],
            -1,
        )

    def packed(self, codes: Tensor) -> Tensor:
        """Return codes [..., head] as bytes [..., code_bytes], as `workbench.formats.bit_packing` packs them,
        without waiting for the device.
        """
        if self.bits == 8:
            return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
        if self.bits == 4 and codes.shape[-1] % 8 == 0:  # the same bytes, quicker
            return codes[..., 0::2] | (codes[..., 1::2] << 4)
        padded = (
            torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.int64)
        )
        word = (padded << (torch.arange(8, device=codes.device) * self.bits)).sum(
            -1
        )  # eight codes fill exactly `bits` bytes
        split: Tensor = (word.unsqueeze(-1) >> (torch.arange(self.bits, device=codes.device) * 8)) & 0xFF
        return split.to(torch.uint8).flatten(-2)

    def decode(self, rows: Tensor, head: int) -> Tensor:
        """Return float32 [..., head] of rows that `encode` made."""
        width, groups = self.code_bytes(head), self.groups(head)
        scale = (
            rows[..., width : width + 2 * groups]
            .clone(memory_format=torch.contiguous_format)
            .view(torch.float16)
            .float()
        )
        zero = rows[..., width + 2 * groups :].float()
        codes = self.unpacked(rows[..., :width], head).float().unflatten(-1, (groups, -1))
        values: Tensor = (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        return values.flatten(-2)

    def unpacked(self, rows: Tensor, head: int) -> Tensor:
        """Return the codes [..., head] of bytes [..., code_bytes]."""
        if self.bits == 8:
            return rows[..., :head]
        if self.bits == 4 and head % 8 == 0:
            return torch.stack([rows & 15, rows >> 4], -1).flatten(-2)
        padded = head + -head % 8
        return unpack(rows.flatten(), self.bits, rows.shape[:-1].numel() * padded).view(
            *rows.shape[:-1], padded
        )[..., :head]
