"""One block of the column loop of GPTQ and SparseGPT: each column is settled as it stands, and those that
follow make up for its error.

Rows know nothing of each other, so that a program takes some rows through all columns of the block without
leaving its registers. Import this module only where Triton is there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["part", "most"])
def work_through(
    weights_ptr,
    upper_ptr,
    scale_ptr,
    zero_ptr,
    kept_ptr,
    out_ptr,
    errors_ptr,
    rows,
    inputs,
    part,
    width,
    scale_layer,
    scale_row,
    scale_column,
    most,
    ROUND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what becomes of the columns from part * BLOCK on, `width` of them, and their errors float32
    [layers, rows, BLOCK].

    weights and out [layers, rows, inputs], upper [layers, inputs, inputs], all float32 in line; kept uint8
    like the weights. With ROUND a column goes to the nearest code, 0 to `most`, by scales float32 and zero
    points uint8 of the given strides, and its error is what that changes; without, weights that are not kept
    become 0, and the error is what they were, over the factor's diagonal.
    """
    layer, start = tl.program_id(1).to(tl.int64), part * BLOCK
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there, inside = row < rows, (row < rows)[:, None] & (column < width)[None, :]
    first = (layer * rows + row) * inputs + start
    block = tl.load(weights_ptr + first[:, None] + column[None, :], mask=inside, other=0.0)
    errors = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    scales = layer * scale_layer + row * scale_row + start * scale_column
    factor = upper_ptr + (layer * inputs + start) * inputs + start
    for place in range(width):
        weight = tl.sum(tl.where(column[None, :] == place, block, 0.0), axis=1)
        spread = tl.load(factor + place * inputs + column, mask=column < width, other=0.0)
        if ROUND:
            scale = tl.load(scale_ptr + scales + place * scale_column, mask=there, other=1.0)
            zero = (
                tl.load(zero_ptr + scales + place * scale_column, mask=there, other=0).to(tl.float32)
                if HAS_ZERO
                else (most + 1) * 0.5
            )
            steps = tl.minimum(tl.maximum(tl.div_rn(weight, scale), -1048576.0), 1048576.0)
            steps = (steps + 12582912.0) - 12582912.0  # to the nearest whole number, halves to even
            value = tl.minimum(tl.maximum(steps, -zero), most - zero) * scale
        else:
            value = weight
        if HAS_MASK:
            kept = tl.load(kept_ptr + first + place, mask=there, other=1)
            value = tl.where(kept != 0, value, 0.0)
        error = weight - value
        if not ROUND:
            error = tl.div_rn(error, tl.load(factor + place * inputs + place))
        block = tl.where(column[None, :] == place, value[:, None], block - error[:, None] * spread[None, :])
        errors = tl.where(column[None, :] == place, error[:, None], errors)
    tl.store(out_ptr + first[:, None] + column[None, :], block, mask=inside)
    tl.store(
        errors_ptr + ((layer * rows + row) * BLOCK)[:, None] + column[None, :], errors, mask=there[:, None]
    )
