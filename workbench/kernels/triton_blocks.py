"""What lies between the products of a Llama-like block, one kernel each: RMS norm, silu(gate) * up, rotary
embedding.

Written as transformers writes them, with its roundings in its order; what it takes several passes over memory
for is read once. Import this module only where Triton is there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # in Python, where there is no CUDA library


@triton.jit(do_not_specialize=["rows"])
def rms_norm(x_ptr, weight_ptr, out_ptr, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write weight * (x / sqrt(mean(x^2) + eps)) of each row; x and out are [rows, width] in line."""
    row, place = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (place < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + place[None, :]
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scaled = x * tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
    weight = tl.load(weight_ptr + place, mask=place < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (weight[None, :] * scaled.to(kind).to(tl.float32)).to(kind), mask=inside)


@triton.jit
def gated(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Write silu(gate) * up, by the exponential that torch's own kernel calls."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    kind = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + (tl.exp(-gate) if INTERPRETED else libdevice.exp(-gate)))
    tl.store(out_ptr + place, (silu.to(kind).to(tl.float32) * up).to(kind), mask=inside)


@triton.jit
def turned(first, second, cos, sin, KIND: tl.constexpr):
    """Return first * cos + second * sin, each product rounded as the sum is."""
    return ((first * cos).to(KIND).to(tl.float32) + (second * sin).to(KIND).to(tl.float32)).to(KIND)


@triton.jit
def turn(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    block,
    rows,
    tokens,
    heads,
    x_item,
    x_head,
    x_token,
    out_item,
    out_head,
    out_token,
    cos_item,
    cos_token,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write x * cos + rotate_half(x) * sin of some rows, counted over heads first, then tokens, then
    items.
    """
    row, place = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (place < HALF)[None, :]
    head, token, item = row % heads, row // heads % tokens, (row // heads // tokens).to(tl.int64)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    angles = (item * cos_item + token * cos_token)[:, None] + place[None, :]
    at = x_ptr + (item * x_item + head * x_head + token * x_token)[:, None] + place[None, :]
    low, high = (
        tl.load(at, mask=inside, other=0.0).to(tl.float32),
        tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32),
    )
    cos_low, cos_high = (
        tl.load(cos_ptr + angles, mask=inside, other=0.0).to(tl.float32),
        tl.load(cos_ptr + angles + HALF, mask=inside, other=0.0).to(tl.float32),
    )
    sin_low, sin_high = (
        tl.load(sin_ptr + angles, mask=inside, other=0.0).to(tl.float32),
        tl.load(sin_ptr + angles + HALF, mask=inside, other=0.0).to(tl.float32),
    )
    to = out_ptr + (item * out_item + head * out_head + token * out_token)[:, None] + place[None, :]
    tl.store(to, turned(low, -high, cos_low, sin_low, kind), mask=inside)
    tl.store(to + HALF, turned(high, low, cos_high, sin_high, kind), mask=inside)


@triton.jit(do_not_specialize=["q_blocks", "items", "tokens", "q_heads", "k_heads"])
def rotary(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_blocks,
    items,
    tokens,
    q_heads,
    k_heads,
    q_item,
    q_head,
    q_token,
    k_item,
    k_head,
    k_token,
    q_out_item,
    q_out_head,
    q_out_token,
    k_out_item,
    k_out_head,
    k_out_token,
    cos_item,
    cos_token,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn queries and keys [items, heads, tokens, 2 HALF], their strides given, by cos and sin [items,
    tokens, 2 HALF]; the first `q_blocks` programs take the queries.
    """
    block = tl.program_id(0)
    if block < q_blocks:
        turn(
            q_ptr,
            cos_ptr,
            sin_ptr,
            q_out_ptr,
            block,
            items * tokens * q_heads,
            tokens,
            q_heads,
            q_item,
            q_head,
            q_token,
            q_out_item,
            q_out_head,
            q_out_token,
            cos_item,
            cos_token,
            HALF,
            ROWS,
            BLOCK,
        )
    else:
        turn(
            k_ptr,
            cos_ptr,
            sin_ptr,
            k_out_ptr,
            block - q_blocks,
            items * tokens * k_heads,
            tokens,
            k_heads,
            k_item,
            k_head,
            k_token,
            k_out_item,
            k_out_head,
            k_out_token,
            cos_item,
            cos_token,
            HALF,
            ROWS,
            BLOCK,
        )
