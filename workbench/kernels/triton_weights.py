"""Passes over many weights of one shape at once on a GPU: a mask and what it leaves, rounding to a grid, what
became of each weight.

Import this module only where Triton is there. Every kernel takes tables of addresses (int64 [layers]), so
that layers lie where they are; weights are contiguous, of `size` elements each, on addresses that 16 divides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def named(dtype):
    """Return Triton's name of a dtype."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


@triton.jit
def address(table_ptr, layer, TYPE: tl.constexpr, ALIGNED: tl.constexpr = 16):
    """Return a layer's address from a table."""
    return tl.multiple_of(tl.load(table_ptr + layer).to(tl.pointer_type(TYPE)), ALIGNED)


@triton.jit
def count_ties(weights_ptr, threshold_ptr, ties_ptr, size, BLOCK: tl.constexpr):
    """Write ties [layers, blocks], int32: how many magnitudes of a block (16-bit numbers, their bits without
    the sign) equal the layer's threshold.
    """
    layer, block = tl.program_id(1), tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(
        address(weights_ptr, layer, tl.int16) + place, mask=place < size, other=-1
    )  # what lies outside is a NaN: no threshold
    equal = (bits & 0x7FFF).to(tl.int32) == tl.load(threshold_ptr + layer)
    tl.store(ties_ptr + layer * tl.num_programs(0) + block, tl.sum(equal.to(tl.int32), axis=0))


@triton.jit
def prune(
    weights_ptr, threshold_ptr, stay_ptr, ties_ptr, upto_ptr, out_ptr, mask_ptr, size, BLOCK: tl.constexpr
):
    """Write the mask (uint8 [layers, size]) of magnitudes above a threshold, and the weights with zeros for
    the others, which keep their sign.

    Of magnitudes equal to it the first `stay` [layers] stay: `ties` [layers, blocks] lie in a block, `upto`
    in it and those before. All int32. They are numbered only in the one block of a layer where some stay and
    some go: elsewhere that costs more than reading the weights.
    """
    layer, block = tl.program_id(1), tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    bits = tl.load(address(weights_ptr, layer, tl.int16) + place, mask=inside, other=-1)
    magnitude, threshold = (bits & 0x7FFF).to(tl.int32), tl.load(threshold_ptr + layer)
    at = layer * tl.num_programs(0) + block
    ties = tl.load(ties_ptr + at)
    room = tl.load(stay_ptr + layer) - (tl.load(upto_ptr + at) - ties)
    kept = (magnitude > threshold) | ((magnitude == threshold) & (room >= ties))
    if (room > 0) & (room < ties):
        equal = (magnitude == threshold).to(tl.int32)
        kept = kept | ((equal != 0) & (tl.cumsum(equal, axis=0) <= room))
    tl.store(address(out_ptr, layer, tl.int16) + place, tl.where(kept, bits, bits & -32768), mask=inside)
    tl.store(mask_ptr + layer.to(tl.int64) * size + place, kept.to(tl.uint8), mask=inside)


@triton.jit
def prune_rows(
    weights_ptr,
    norm_ptr,
    gone_ptr,
    guess_ptr,
    out_ptr,
    mask_ptr,
    rows,
    columns,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the masks (uint8 [rows, columns] each) of the largest |w| * norm (float32 [layers, columns]) of
    each row, and the weights that it leaves.

    gone [layers, 2], int32: how many go from each row, and from how many rows, the first, one more. guess
    [layers], float32: where the threshold is sought first, as a multiple of a row's mean. It is sought among
    the numbers' bits, which are ordered as the numbers are, until so many lie at it or above as stay, by
    counts of rows that stay in registers: from the guess on in growing steps until it is bracketed, then
    where the counts at both ends say (six or so in all for normal weights), then, for ties, by halves.
    """
    size: tl.constexpr = TYPE.primitive_bitwidth // 8
    raw: tl.constexpr = tl.int16 if size == 2 else tl.int32
    sign: tl.constexpr = -(1 << (8 * size - 1))
    layer = tl.program_id(1)
    row, place = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (place < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + place[None, :]
    stored = tl.load(address(weights_ptr, layer, raw) + at, mask=inside, other=0)
    norm = tl.load(
        norm_ptr + layer * columns + place[None, :] + row[:, None] * 0, mask=inside, other=0.0
    )  # not a line for all rows: that would be passed around
    score = tl.abs(stored.to(TYPE, bitcast=True).to(tl.float32)) * norm
    stay = columns - tl.load(gone_ptr + 2 * layer) - (row < tl.load(gone_ptr + 2 * layer + 1)).to(tl.int32)
    low, high = (
        stay * 0,
        stay * 0 + 0x7F800001,
    )  # at `low` and above lie `least`, as many as stay or more; at `high` and above `most`, fewer
    least, most = low + columns, low
    low, least = tl.where(stay == 0, high, low), tl.where(stay == 0, 0, least)
    middle = (tl.sum(score, axis=1) / columns * tl.load(guess_ptr + layer)).to(tl.int32, bitcast=True)
    step, turn = low, 0
    going = (least != stay) & (high - low > 1) & (row < rows)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        above = tl.sum(tl.where(score >= middle.to(tl.float32, bitcast=True)[:, None], 1.0, 0.0), axis=1).to(
            tl.int32
        )
        up, down = going & (above >= stay), going & (above < stay)
        low, least = tl.where(up, middle, low), tl.where(up, above, least)
        high, most = tl.where(down, middle, high), tl.where(down, above, most)
        going = going & (least != stay) & (high - low > 1)
        # a power of two (2**23 of these numbers) holds about a quarter of a row, where the numbers are dense
        step = tl.where(
            turn == 0, (tl.abs(above - stay) / columns * 33554432.0).to(tl.int32) + 16384, step * 2
        )
        share = (least - stay).to(tl.float32) / tl.maximum(least - most, 1).to(tl.float32)
        between = low + ((high - low).to(tl.float32) * tl.where(turn < 16, share, 0.5)).to(tl.int32)
        middle = tl.where(
            (high < 0x7F800001) | (turn >= 16),
            tl.where((low > 0) | (turn >= 16), between, high - step),
            low + step,
        )
        turn += 1
    exact = (least == stay) | (row >= rows)
    lowest = tl.where(exact, low, high).to(tl.float32, bitcast=True)[:, None]
    kept = score >= lowest
    if tl.min(exact.to(tl.int32), axis=0) == 0:
        equal = (score >= low.to(tl.float32, bitcast=True)[:, None]) & ~kept
        kept = kept | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= (stay - most)[:, None]))
    tl.store(address(out_ptr, layer, raw) + at, tl.where(kept, stored, stored & sign), mask=inside)
    tl.store(address(mask_ptr, layer, tl.uint8, 16 // size) + at, kept.to(tl.uint8), mask=inside)


@triton.jit
def extremes(
    weights_ptr, low_ptr, high_ptr, groups, size, TYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the smallest weight of each group of `size` in line, at most 0, and the largest, at least 0:
    float32 [layers, groups].
    """
    layer = tl.program_id(1)
    group, place = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (group < groups)[:, None] & (place < size)[None, :]
    weight = tl.load(
        address(weights_ptr, layer, TYPE) + group.to(tl.int64)[:, None] * size + place[None, :],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    out = layer.to(tl.int64) * groups + group
    tl.store(low_ptr + out, tl.min(weight, axis=1), mask=group < groups)
    tl.store(high_ptr + out, tl.max(weight, axis=1), mask=group < groups)


@triton.jit(do_not_specialize=["most"])
def search(
    weights_ptr,
    scale_ptr,
    zero_ptr,
    best_ptr,
    groups,
    size,
    candidates,
    step,
    most,
    TYPE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write which of the candidates rounds each group with the least squared error, the first of equal ones:
    int64 [layers, groups].

    scale float32 and zero uint8 are [candidates, layers, groups], `step` from one candidate to the next;
    codes are at most `most`.
    """
    layer = tl.program_id(1)
    group, place = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = group < groups
    inside = there[:, None] & (place < size)[None, :]
    weight = tl.load(
        address(weights_ptr, layer, TYPE) + group.to(tl.int64)[:, None] * size + place[None, :],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    at = layer.to(tl.int64) * groups + group
    best, least = tl.zeros((ROWS,), dtype=tl.int64), tl.full((ROWS,), float("inf"), dtype=tl.float32)
    for candidate in range(candidates):
        scale = tl.load(scale_ptr + candidate * step + at, mask=there, other=1.0)
        zero = (
            tl.load(zero_ptr + candidate * step + at, mask=there, other=0).to(tl.float32)
            if HAS_ZERO
            else 0.0 * scale + (most + 1) * 0.5
        )
        steps = (weight * (1.0 / scale)[:, None] + 12582912.0) - 12582912.0
        steps = tl.minimum(tl.maximum(steps, -zero[:, None]), (most - zero)[:, None])
        error = weight - steps * scale[:, None]
        error = tl.sum(error * error, axis=1)
        best = tl.where(error < least, candidate, best)
        least = tl.minimum(error, least)
    tl.store(best_ptr + at, best, mask=there)


@triton.jit(do_not_specialize=["most"])
def to_grid(
    weights_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    codes_ptr,
    size,
    groups,
    most,
    TYPE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the nearest codes (uint8 [layers, size], at most `most`) and the weights that they stand for.

    scale float32 and zero uint8 are [layers, groups]; GROUP weights in line share one. The operations are
    those of `workbench.formats.affine`, in their order: the same bits.
    """
    layer = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    weight = tl.load(address(weights_ptr, layer, TYPE) + place, mask=inside, other=0.0).to(tl.float32)
    group = layer.to(tl.int64) * groups + place // GROUP
    scale = tl.load(scale_ptr + group, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + group, mask=inside, other=0).to(tl.float32) if HAS_ZERO else (most + 1) * 0.5
    steps = tl.minimum(tl.maximum(tl.div_rn(weight, scale), -1048576.0), 1048576.0)
    steps = (steps + 12582912.0) - 12582912.0  # to the nearest whole number, halves to even
    code = tl.minimum(tl.maximum(steps + zero, 0.0), most * 1.0)
    tl.store(codes_ptr + layer.to(tl.int64) * size + place, code.to(tl.uint8), mask=inside)
    tl.store(address(out_ptr, layer, TYPE) + place, ((code - zero) * scale).to(TYPE), mask=inside)


@triton.jit(do_not_specialize=["most"])
def survey(
    dense_ptr,
    now_ptr,
    mask_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    found_ptr,
    size,
    most,
    TYPE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_GRID: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what a block of each layer's weights has become, float32 [layers, blocks, 4].

    The sums of squares of the dense weights and of the changes, the number of zeros, and that of weights that
    are infinite, NaN, not zero where the mask says so, or not what their codes, at most `most`, stand for.
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
    if HAS_GRID:
        code = tl.load(address(codes_ptr, layer, tl.uint8) + place, mask=inside, other=0).to(tl.float32)
        group = place // GROUP
        scale = tl.load(
            tl.load(scale_ptr + layer).to(tl.pointer_type(SCALE)) + group, mask=inside, other=1.0
        ).to(tl.float32)
        zero = (
            tl.load(tl.load(zero_ptr + layer).to(tl.pointer_type(tl.uint8)) + group, mask=inside, other=0).to(
                tl.float32
            )
            if HAS_ZERO
            else (most + 1) * 0.5
        )
        wrong = wrong | (((code - zero) * scale).to(TYPE).to(tl.float32) != now)
    out = found_ptr + (layer * tl.num_programs(0) + block) * 4
    tl.store(out, tl.sum(dense * dense, axis=0))
    tl.store(out + 1, tl.sum(change * change, axis=0))
    tl.store(out + 2, tl.sum((inside & (now == 0.0)).to(tl.float32), axis=0))
    tl.store(out + 3, tl.sum((inside & wrong).to(tl.float32), axis=0))
