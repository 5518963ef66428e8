"""What lies between the products of a Llama-like block, one kernel each: RMS norm, silu(gate) * up, rotary embedding.

Written as transformers writes them, with its roundings in its order; what it takes several passes over memory for is read once.
Import this module only where Triton is there.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,import-not-found,import-untyped,untyped-decorator"
# ruff: noqa: ANN001, ANN201, N803, PLR0917  Triton compiles these functions: parameters that are compile-time constants are in capitals


@triton.jit
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
    """Write silu(gate) * up."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    kind = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate))
    tl.store(out_ptr + place, (silu.to(kind).to(tl.float32) * up).to(kind), mask=inside)


@triton.jit
def turned(first, second, cos, sin, KIND: tl.constexpr):
    """Return first * cos + second * sin, each product rounded as the sum is."""
    return ((first * cos).to(KIND).to(tl.float32) + (second * sin).to(KIND).to(tl.float32)).to(KIND)


@triton.jit
def rotary(
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens, heads,
    x_item, x_head, x_token, out_item, out_head, out_token, cos_item, cos_token,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write x * cos + rotate_half(x) * sin of one token: x and out [items, heads, tokens, 2 HALF], cos and sin [items, tokens, 2 HALF], strides given."""
    item, token = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    item = item.to(tl.int64)
    head, place = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (place < HALF)[None, :]
    kind: tl.constexpr = out_ptr.dtype.element_ty
    angles = item * cos_item + token * cos_token + place
    there = place < HALF
    cos_low, cos_high = tl.load(cos_ptr + angles, mask=there, other=0.0).to(tl.float32)[None, :], tl.load(cos_ptr + angles + HALF, mask=there, other=0.0).to(tl.float32)[None, :]
    sin_low, sin_high = tl.load(sin_ptr + angles, mask=there, other=0.0).to(tl.float32)[None, :], tl.load(sin_ptr + angles + HALF, mask=there, other=0.0).to(tl.float32)[None, :]
    at = x_ptr + item * x_item + token * x_token + head[:, None] * x_head + place[None, :]
    low, high = tl.load(at, mask=inside, other=0.0).to(tl.float32), tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = out_ptr + item * out_item + token * out_token + head[:, None] * out_head + place[None, :]
    tl.store(to, turned(low, -high, cos_low, sin_low, kind), mask=inside)
    tl.store(to + HALF, turned(high, low, cos_high, sin_high, kind), mask=inside)
