"""Passes over many weights of one shape at once on a GPU: a mask and what it leaves, rounding to a grid, what became of each weight.

Import this module only where Triton is there. Every kernel takes tables of addresses (int64 [layers]), so that layers lie where
they are; weights are contiguous, of `size` elements each, on addresses that 16 divides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,import-not-found,import-untyped,untyped-decorator"
# ruff: noqa: ANN001, ANN201, N803, PLR0917  Triton compiles these functions: parameters that are compile-time constants are in capitals


def named(dtype):
    """Return Triton's name of a dtype."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


@triton.jit
def address(table_ptr, layer, TYPE: tl.constexpr):
    """Return a layer's address from a table."""
    return tl.multiple_of(tl.load(table_ptr + layer).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def count_ties(weights_ptr, threshold_ptr, ties_ptr, size, BLOCK: tl.constexpr):
    """Write ties [layers, blocks], int32: how many magnitudes of a block (16-bit numbers, their bits without the sign) equal the layer's threshold."""
    layer, block = tl.program_id(1), tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(address(weights_ptr, layer, tl.int16) + place, mask=place < size, other=-1)  # what lies outside is a NaN: no threshold
    equal = (bits & 0x7FFF).to(tl.int32) == tl.load(threshold_ptr + layer)
    tl.store(ties_ptr + layer * tl.num_programs(0) + block, tl.sum(equal.to(tl.int32), axis=0))


@triton.jit
def prune(weights_ptr, threshold_ptr, stay_ptr, before_ptr, out_ptr, mask_ptr, size, BLOCK: tl.constexpr):
    """Write the mask (uint8 [layers, size]) of magnitudes above a threshold, and the weights with zeros for the others, which keep their sign.

    Of magnitudes equal to it the first `stay` [layers] stay; `before` [layers, blocks] of them lie in earlier blocks. All int32.
    """
    layer, block = tl.program_id(1), tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    bits = tl.load(address(weights_ptr, layer, tl.int16) + place, mask=inside, other=-1)
    magnitude, threshold = (bits & 0x7FFF).to(tl.int32), tl.load(threshold_ptr + layer)
    equal = (magnitude == threshold).to(tl.int32)
    room = tl.load(stay_ptr + layer) - tl.load(before_ptr + layer * tl.num_programs(0) + block)
    kept = (magnitude > threshold) | ((equal != 0) & (tl.cumsum(equal, axis=0) <= room))
    tl.store(address(out_ptr, layer, tl.int16) + place, tl.where(kept, bits, bits & -32768), mask=inside)
    tl.store(mask_ptr + layer.to(tl.int64) * size + place, kept.to(tl.uint8), mask=inside)


@triton.jit
def to_grid(
    weights_ptr, scale_ptr, zero_ptr, out_ptr, codes_ptr, size, groups,
    TYPE: tl.constexpr, MOST: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the nearest codes (uint8 [layers, size], at most MOST) and the weights that they stand for.

    scale float32 and zero uint8 are [layers, groups]; GROUP weights in line share one. The operations are those of
    `workbench.runtime.grid`, in their order: the same bits.
    """
    layer = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    weight = tl.load(address(weights_ptr, layer, TYPE) + place, mask=inside, other=0.0).to(tl.float32)
    group = layer.to(tl.int64) * groups + place // GROUP
    scale = tl.load(scale_ptr + group, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + group, mask=inside, other=0).to(tl.float32) if HAS_ZERO else (MOST + 1) / 2
    steps = tl.minimum(tl.maximum(tl.div_rn(weight, scale), -1048576.0), 1048576.0)
    steps = (steps + 12582912.0) - 12582912.0  # to the nearest whole number, halves to even
    code = tl.minimum(tl.maximum(steps + zero, 0.0), MOST * 1.0)
    tl.store(codes_ptr + layer.to(tl.int64) * size + place, code.to(tl.uint8), mask=inside)
    tl.store(address(out_ptr, layer, TYPE) + place, ((code - zero) * scale).to(TYPE), mask=inside)


@triton.jit
def survey(
    dense_ptr, now_ptr, mask_ptr, codes_ptr, scale_ptr, zero_ptr, found_ptr, size,
    TYPE: tl.constexpr, SCALE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what a block of each layer's weights has become, float32 [layers, blocks, 4].

    The sums of squares of the dense weights and of the changes, the number of zeros, and that of weights that are infinite, NaN,
    not zero where the mask says so, or not what their codes stand for (BITS of 0: there are none).
    """
    layer, block = tl.program_id(1), tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    dense = tl.load(address(dense_ptr, layer, TYPE) + place, mask=inside, other=0.0).to(tl.float32)
    stored = tl.load(address(now_ptr, layer, TYPE) + place, mask=inside, other=0.0)
    now = stored.to(tl.float32)
    change = now - dense
    wrong = ~(tl.abs(now) < float("inf"))
    if HAS_MASK:
        kept = tl.load(address(mask_ptr, layer, tl.uint8) + place, mask=inside, other=1)
        wrong = wrong | ((kept == 0) & (now != 0.0))
    if BITS:
        code = tl.load(address(codes_ptr, layer, tl.uint8) + place, mask=inside, other=0).to(tl.float32)
        group = place // GROUP
        scale = tl.load(tl.load(scale_ptr + layer).to(tl.pointer_type(SCALE)) + group, mask=inside, other=1.0).to(tl.float32)
        zero = tl.load(tl.load(zero_ptr + layer).to(tl.pointer_type(tl.uint8)) + group, mask=inside, other=0).to(tl.float32) if HAS_ZERO else 0.0 + (1 << (BITS - 1))
        wrong = wrong | (((code - zero) * scale).to(TYPE).to(tl.float32) != now)
    out = found_ptr + (layer * tl.num_programs(0) + block) * 4
    tl.store(out, tl.sum(dense * dense, axis=0))
    tl.store(out + 1, tl.sum(change * change, axis=0))
    tl.store(out + 2, tl.sum((inside & (now == 0.0)).to(tl.float32), axis=0))
    tl.store(out + 3, tl.sum((inside & wrong).to(tl.float32), axis=0))
