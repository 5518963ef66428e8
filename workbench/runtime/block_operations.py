"""Launches of the kernels of `triton_blocks`: tensors in, tensors out. Sizes are chosen so that a thread holds 8 to 32 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.device import launching

TILE = 4096  # numbers that one program takes together
FLAT = 2048  # of a product, number by number


def power_of_two(count: int) -> int:
    """Return the least power of two that is at least `count`, and at least 16."""
    return max(16, 1 << (count - 1).bit_length())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019); x [..., width] and weight [width] of one dtype."""
    from workbench.runtime import triton_blocks as kernels

    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    rows, block = x.numel() // width, power_of_two(width)
    together = max(1, min(TILE // block, 8))
    with launching(out.device):
        kernels.rms_norm[(-(-rows // together),)](x, weight, out, rows, width, eps, together, block, num_warps=max(4, min(16, block // 512)))
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; both of one shape and dtype."""
    from workbench.runtime import triton_blocks as kernels

    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with launching(out.device):
        kernels.gated[(-(-gate.numel() // FLAT),)](gate, up, out, gate.numel(), FLAT, num_warps=8)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return x * cos + rotate_half(x) * sin of queries and keys [items, heads, tokens, width]; cos and sin [items or 1, tokens, width]."""
    return rotated(q, cos, sin), rotated(k, cos, sin)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return one of them, laid out in memory as x is."""
    from workbench.runtime import triton_blocks as kernels

    items, heads, tokens, width = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = (part.expand(items, tokens, width) for part in (cos.contiguous(), sin.contiguous()))
    out, half = torch.empty_like(x), width // 2
    together = min(power_of_two(heads), max(1, FLAT // power_of_two(half)))
    with launching(out.device):
        kernels.rotary[items * tokens, -(-heads // together)](
            x, cos, sin, out, tokens, heads, *x.stride()[:3], *out.stride()[:3], *cos.stride()[:2], half, together, power_of_two(half), num_warps=4, enable_fp_fusion=False
        )
    return out
