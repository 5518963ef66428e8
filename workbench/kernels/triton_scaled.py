"""What surrounds a product of 8-bit numbers on a GPU: rounding its inputs, and scaling what comes out, one
kernel each.

Import this module only where Triton is there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_rows(
    x_ptr,
    smooth_ptr,
    fixed_ptr,
    codes_ptr,
    scale_ptr,
    inputs,
    most,
    SMOOTH: tl.constexpr,
    DYNAMIC: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the codes and the scale of one row of x: scale = max|x| / most, or the fixed one.

    Codes = x / scale, rounded and clamped.
    """
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < inputs
    x = tl.load(x_ptr + row * inputs + place, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        x = tl.div_rn(x, tl.load(smooth_ptr + place, mask=inside, other=1.0).to(tl.float32))
    if DYNAMIC:
        scale = tl.div_rn(tl.max(tl.abs(x), axis=0), most)
        scale = tl.where(scale > 0, tl.maximum(scale, 1.1754943508222875e-38), 1.0)
    else:
        scale = tl.load(fixed_ptr)
    x = tl.minimum(tl.maximum(tl.div_rn(x, scale), -most), most)
    if INTEGER:
        x = (x + 12582912.0) - 12582912.0  # to the nearest whole number, halves to even
    tl.store(codes_ptr + row * inputs + place, x.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def rescale(
    sums_ptr,
    input_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write out[item, row] = sums * input scale of the item * weight scale of the row + bias."""
    item = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    value = (
        tl.load(sums_ptr + item * rows + row, mask=inside, other=0).to(tl.float32)
        * tl.load(input_scale_ptr + item)
        * tl.load(weight_scale_ptr + row, mask=inside, other=0.0)
    )
    if BIAS:
        value += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + item * rows + row, value.to(out_ptr.dtype.element_ty), mask=inside)
