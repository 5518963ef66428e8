"""Launches of the kernels of `triton_blocks`: tensors in, tensors out.

Sizes are chosen so that a thread holds 8 to 32 numbers.

Whoever calls them tries them first: see `workbench.measure.evaluation.fused_blocks`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.util.device import launching

TILE = 4096  # numbers that one program takes together
FLAT = 2048  # of a product, number by number
TURNED = 1024  # pairs of numbers that are turned together


def power_of_two(count: int) -> int:
    """Return the least power of two that is at least `count`, and at least 16."""
    return max(16, 1 << (count - 1).bit_length())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019).

    X [..., width] and weight [width] of one dtype.
    """
    from workbench.kernels import triton_blocks as kernels

    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    rows, block = x.numel() // width, power_of_two(width)
    together = max(1, min(TILE // block, 8))
    with launching(out.device):
        kernels.rms_norm[(-(-rows // together),)](
            x, weight, out, rows, width, eps, together, block, num_warps=max(4, min(16, block // 512))
        )
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; both of one shape and dtype."""
    from workbench.kernels import triton_blocks as kernels

    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with launching(out.device):
        kernels.gated[(-(-gate.numel() // FLAT),)](gate, up, out, gate.numel(), FLAT, num_warps=8)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return x * cos + rotate_half(x) * sin of queries and keys [items, heads, tokens, width].

    Cos and sin [items or 1, tokens, width].

    They may lie in any order of items, heads and tokens, and what is returned lies as they do.
    """
    from workbench.kernels import triton_blocks as kernels

    items, _, tokens, width = q.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    cos, sin = (part.contiguous().expand(items, tokens, width) for part in (cos, sin))
    outs, half = (torch.empty_like(q), torch.empty_like(k)), width // 2
    block = power_of_two(half)
    together = max(1, TURNED // block)
    blocks = [-(-x.numel() // (width * together)) for x in (q, k)]
    strides = [stride for x in (q, k, *outs) for stride in x.stride()[:3]]
    with launching(q.device):
        kernels.rotary[(sum(blocks),)](
            q,
            k,
            cos,
            sin,
            *outs,
            blocks[0],
            items,
            tokens,
            q.shape[1],
            k.shape[1],
            *strides,
            *cos.stride()[:2],
            half,
            together,
            block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return outs
