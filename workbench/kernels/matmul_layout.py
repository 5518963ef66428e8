"""The layout that our GPU kernels read: 32 codes of one row, consecutive inputs, in exactly `bits` words of
32 bits.

A word holds 32 // bits whole codes, lowest bits first; the bits that are left over at the top of each word
hold the last codes of the unit, as one stream in the order of the words. Every width from 2 to 8 takes its
own bits and no more, and all but a few codes need one shift and one mask. Words of neighbouring rows lie side
by side, so that threads which take a row each read one line.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 32  # codes in a unit


def pack_units(codes: Tensor, bits: int) -> Tensor:
    """Return codes (uint8 [outputs, inputs], below 2^bits) as int32 [units, bits, outputs].

    The last unit is filled up with zeros.

    Raises:
        ValueError: bits outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: units hold codes of 2 to 8 bits")
    outputs, inputs = codes.shape
    whole = (
        torch.nn.functional.pad(codes, (0, -inputs % UNIT)).view(outputs, -1, UNIT).permute(1, 2, 0)
    )  # [units, 32, outputs]
    each, rest = divmod(UNIT, bits)
    words = torch.zeros(whole.shape[0], bits, outputs, dtype=torch.int64, device=codes.device)
    for place in range(each):
        words |= whole[:, place : each * bits : each].long() << (place * bits)
    for index in range(each * bits, UNIT):
        code = whole[:, index].long()
        for word, low, count, shift in pieces(index - each * bits, bits, rest):
            words[:, word] |= ((code >> shift) & ((1 << count) - 1)) << low
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def unpack_units(words: Tensor, bits: int, inputs: int) -> Tensor:
    """Return the codes that `pack_units` stored, uint8 [outputs, inputs]."""
    each, rest = divmod(UNIT, bits)
    wide = words.long() & 0xFFFFFFFF
    codes = torch.zeros(words.shape[0], UNIT, words.shape[2], dtype=torch.int64, device=words.device)
    for place in range(each):
        codes[:, place : each * bits : each] = (wide >> (place * bits)) & ((1 << bits) - 1)
    for index in range(each * bits, UNIT):
        for word, low, count, shift in pieces(index - each * bits, bits, rest):
            codes[:, index] |= ((wide[:, word] >> low) & ((1 << count) - 1)) << shift
    return codes.permute(2, 0, 1).flatten(1)[:, :inputs].to(torch.uint8).contiguous()


def pieces(number: int, bits: int, rest: int) -> list[tuple[int, int, int, int]]:
    """Return where the bits of the `number`-th left-over code lie: (word, lowest bit in it, how many, lowest
    bit in the code).
    """
    places = []
    start, end = number * bits, (number + 1) * bits
    while start < end:
        word, within = divmod(start, rest)
        count = min(rest - within, end - start)
        places.append((word, UNIT - rest + within, count, start - number * bits))
        start += count
    return places
