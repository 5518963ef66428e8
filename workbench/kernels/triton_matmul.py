"""Products with packed weights on a GPU: the weights are read once, as they are packed, and unpacked in
registers.

Import this module only where Triton is there. The layout is that of `workbench.kernels.matmul_layout`: words
int32 [units, bits, rows], 32 consecutive inputs in a unit; scales [groups, rows]; zero points uint8 [groups,
rows] or none, which means 2^(bits - 1).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def field(words, LOW: tl.constexpr, BITS: tl.constexpr):
    """Return code * 2^(HELD - 149) as float32, HELD = LOW, less 12 for fields that do not end below bit 23:
    the code's bits, where they lie, are those of a denormal number.

    GPUs multiply those at full speed, so a code costs one mask; a shift is shared by all fields of the upper
    half of a word.
    """
    MASK: tl.constexpr = ((1 << BITS) - 1) << (LOW if LOW + BITS <= 23 else LOW - 12)
    held = words if LOW + BITS <= 23 else words >> 12
    return (held & MASK).to(tl.float32, bitcast=True)


@triton.jit
def lift(x, LOW: tl.constexpr, BITS: tl.constexpr):
    """Return x scaled so that its product with `field` is code * x * 2^-60: far from what float32 cannot
    hold.
    """
    FACTOR: tl.constexpr = 2.0 ** (89 - (LOW if LOW + BITS <= 23 else LOW - 12))
    return x * FACTOR


@triton.jit
def one_and(words, LOW: tl.constexpr, BITS: tl.constexpr):
    """Return 1 + code / 2^BITS as float32: the code as the first bits of the mantissa of 1.

    Quicker than a conversion.
    """
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    moved = words << (23 - BITS - LOW) if LOW + BITS <= 23 else words >> (LOW + BITS - 23)
    return ((moved & MASK) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def left_over(words, rest_code, WORD: tl.constexpr, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """Return `rest_code` with the bits of the NUMBER-th left-over code that lie in this word."""
    REST: tl.constexpr = 32 % BITS
    FIRST: tl.constexpr = max(WORD * REST, NUMBER * BITS)
    LAST: tl.constexpr = min(WORD * REST + REST, NUMBER * BITS + BITS)
    if LAST > FIRST:
        COUNT: tl.constexpr = LAST - FIRST
        rest_code |= ((words >> (32 - REST + FIRST - WORD * REST)) & ((1 << COUNT) - 1)) << (
            FIRST - NUMBER * BITS
        )
    return rest_code


@triton.jit(do_not_specialize=["units", "split"])
def one_row(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    part_ptr,
    lock_ptr,
    rows,
    inputs,
    units,
    units_a_group,
    stride,
    split,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Multiply one vector: out[row] = sum over inputs of x * weight.

    Programs share a block of rows `split` ways; the last one adds up.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mine = tl.program_id(1)
    EACH: tl.constexpr = 32 // BITS
    acc = tl.zeros((BLOCK_UNITS, BLOCK_ROWS), dtype=tl.float32)
    for step in tl.range(tl.cdiv(units, split * BLOCK_UNITS), num_stages=1):
        unit = (step * split + mine) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
        inside = (unit < units)[:, None] & (row < rows)[None, :]
        group = (unit // units_a_group)[:, None] * stride + row[None, :]
        scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
        zero = (
            tl.load(zero_ptr + group, mask=inside, other=0).to(tl.float32)
            if HAS_ZERO
            else 0.0 + (1 << (BITS - 1))
        )
        total = tl.zeros((BLOCK_UNITS,), dtype=tl.float32)
        part = tl.zeros((BLOCK_UNITS, BLOCK_ROWS), dtype=tl.float32)
        rest_0 = tl.zeros((BLOCK_UNITS, BLOCK_ROWS), dtype=tl.int32)
        rest_1, rest_2, rest_3 = rest_0, rest_0, rest_0
        for word in tl.static_range(BITS):
            packed = tl.load(
                words_ptr + (unit * BITS + word)[:, None] * stride + row[None, :], mask=inside, other=0
            )
            for place in tl.static_range(EACH):
                index = unit * 32 + word * EACH + place
                x = tl.load(x_ptr + index, mask=(unit < units) if EVEN else (index < inputs), other=0.0).to(
                    tl.float32
                )
                total += x
                part += field(packed, place * BITS, BITS) * lift(x, place * BITS, BITS)[:, None]
            if EACH * BITS < 32:
                rest_0 = left_over(packed, rest_0, word, 0, BITS)
                rest_1 = left_over(packed, rest_1, word, 1, BITS)
                rest_2 = left_over(packed, rest_2, word, 2, BITS)
                rest_3 = left_over(packed, rest_3, word, 3, BITS)
        for number in tl.static_range(32 - EACH * BITS):
            code = rest_0 if number == 0 else (rest_1 if number == 1 else (rest_2 if number == 2 else rest_3))
            index = unit * 32 + EACH * BITS + number
            x = tl.load(x_ptr + index, mask=(unit < units) if EVEN else (index < inputs), other=0.0).to(
                tl.float32
            )
            total += x
            part += field(code, 0, BITS) * lift(x, 0, BITS)[:, None]
        acc += scale * (part * 2.0**60 - total[:, None] * zero)
    result = tl.sum(acc, axis=0)
    if split == 1:
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=row < rows)
    else:
        tl.store(part_ptr + mine * rows + row, result, mask=row < rows)
        tl.debug_barrier()  # every thread's part is written before it is counted
        if tl.atomic_add(lock_ptr + tl.program_id(0), 1, sem="acq_rel") == split - 1:
            result = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
            for other in range(split):  # always in this order: the same bits every time
                result += tl.load(
                    part_ptr + other * rows + row, mask=row < rows, other=0.0, cache_modifier=".cg"
                )
            tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=row < rows)
            tl.store(lock_ptr + tl.program_id(0), 0)


@triton.jit(do_not_specialize=["count", "split"])
def some_rows(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    part_ptr,
    lock_ptr,
    count,
    rows,
    units,
    units_a_group,
    stride,
    split,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Multiply `count` vectors, out [count, rows]. x is [count, 32, units]: place within the unit first, so
    that a tile of units is read in line.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.program_id(2)
    EACH: tl.constexpr = 32 // BITS
    acc = tl.zeros((BLOCK, BLOCK_ROWS), dtype=tl.float32)
    for step in tl.range(tl.cdiv(units, split * BLOCK_UNITS), num_stages=1):
        unit = (step * split + mine) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
        inside = (unit < units)[:, None] & (row < rows)[None, :]
        group = (unit // units_a_group)[:, None] * stride + row[None, :]
        scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
        zero = (
            tl.load(zero_ptr + group, mask=inside, other=0).to(tl.float32)
            if HAS_ZERO
            else 0.0 + (1 << (BITS - 1))
        )
        slope, offset = scale * (1 << BITS), -scale * (zero + (1 << BITS))
        x_tile = x_ptr + (item * 32)[:, None] * units + unit[None, :]
        x_inside = (item < count)[:, None] & (unit < units)[None, :]
        rest_0 = tl.zeros((BLOCK_UNITS, BLOCK_ROWS), dtype=tl.int32)
        rest_1, rest_2, rest_3 = rest_0, rest_0, rest_0
        for word in tl.static_range(BITS):
            packed = tl.load(
                words_ptr + (unit * BITS + word)[:, None] * stride + row[None, :], mask=inside, other=0
            )
            for place in tl.static_range(EACH):
                x = tl.load(x_tile + (word * EACH + place) * units, mask=x_inside, other=0.0)
                weight = one_and(packed, place * BITS, BITS) * slope + offset
                acc = tl.dot(x, weight.to(x.dtype), acc)
            if EACH * BITS < 32:
                rest_0 = left_over(packed, rest_0, word, 0, BITS)
                rest_1 = left_over(packed, rest_1, word, 1, BITS)
                rest_2 = left_over(packed, rest_2, word, 2, BITS)
                rest_3 = left_over(packed, rest_3, word, 3, BITS)
        for number in tl.static_range(32 - EACH * BITS):
            code = rest_0 if number == 0 else (rest_1 if number == 1 else (rest_2 if number == 2 else rest_3))
            x = tl.load(x_tile + (EACH * BITS + number) * units, mask=x_inside, other=0.0)
            weight = one_and(code, 0, BITS) * slope + offset
            acc = tl.dot(x, weight.to(x.dtype), acc)
    place = item[:, None] * rows + row[None, :]
    wanted = (item < count)[:, None] & (row < rows)[None, :]
    if split == 1:
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=wanted)
    else:
        tl.store(part_ptr + mine * count * rows + place, acc, mask=wanted)
        tl.debug_barrier()
        lock = lock_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(lock, 1, sem="acq_rel") == split - 1:
            acc = tl.zeros((BLOCK, BLOCK_ROWS), dtype=tl.float32)
            for other in range(split):
                acc += tl.load(
                    part_ptr + other * count * rows + place, mask=wanted, other=0.0, cache_modifier=".cg"
                )
            tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=wanted)
            tl.store(lock, 0)


@triton.jit
def unpack(
    words_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    inputs,
    units_a_group,
    stride,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Write the weights of one unit and a block of rows, transposed: out [inputs, rows], each rounded once,
    as `Grid.dequantize`.
    """
    unit = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    group = (unit // units_a_group) * stride + row
    scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
    zero = (
        tl.load(zero_ptr + group, mask=inside, other=0).to(tl.float32)
        if HAS_ZERO
        else 0.0 + (1 << (BITS - 1))
    )
    EACH: tl.constexpr = 32 // BITS
    rest_0 = tl.zeros((BLOCK_ROWS,), dtype=tl.int32)
    rest_1, rest_2, rest_3 = rest_0, rest_0, rest_0
    for word in tl.static_range(BITS):
        packed = tl.load(words_ptr + (unit * BITS + word) * stride + row, mask=inside, other=0)
        for place in tl.static_range(EACH):
            index = unit * 32 + word * EACH + place + tl.zeros_like(row)
            value = ((packed >> (place * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
            tl.store(
                out_ptr + index.to(tl.int64) * rows + row,
                ((value - zero) * scale).to(out_ptr.dtype.element_ty),
                mask=inside & (index < inputs),
            )
        if EACH * BITS < 32:
            rest_0 = left_over(packed, rest_0, word, 0, BITS)
            rest_1 = left_over(packed, rest_1, word, 1, BITS)
            rest_2 = left_over(packed, rest_2, word, 2, BITS)
            rest_3 = left_over(packed, rest_3, word, 3, BITS)
    for number in tl.static_range(32 - EACH * BITS):
        code = rest_0 if number == 0 else (rest_1 if number == 1 else (rest_2 if number == 2 else rest_3))
        index = unit * 32 + EACH * BITS + number + tl.zeros_like(row)
        tl.store(
            out_ptr + index.to(tl.int64) * rows + row,
            ((code.to(tl.float32) - zero) * scale).to(out_ptr.dtype.element_ty),
            mask=inside & (index < inputs),
        )
