"""Pack small unsigned integers into bytes, and back: b-bit codes take b bits each."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return `codes` (any shape, integers in [0, 2^bits)) as uint8 [ceil(n * bits / 8)], least significant
    bit first.

    Raises:
        ValueError: bits outside 1..8, or a code that does not fit.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: from 1 to 8 can be packed")
    flat = codes.flatten()
    for extreme in (
        (int(flat.min()), int(flat.max())) if flat.numel() else ()
    ):  # before the conversion below, which wraps around
        if not 0 <= extreme < 1 << bits:
            raise ValueError(f"code {extreme} does not fit in {bits} bits")
    flat = flat.to(torch.uint8)
    if bits == 8:
        return flat.clone()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))  # eight codes fill exactly `bits` bytes
    groups = flat.view(-1, 8).to(torch.int64)
    word = (groups << (torch.arange(8, device=flat.device) * bits)).sum(
        1
    )  # [n / 8], 8 * bits <= 56 bits used
    packed = (word.unsqueeze(1) >> (torch.arange(bits, device=flat.device) * 8)) & 0xFF
    return packed.to(torch.uint8).flatten()[: -(-codes.numel() * bits // 8)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes that `pack` wrote, uint8 [count].

    Raises:
        ValueError: bits outside 1..8, or a packed tensor of another length than `count` codes take.

    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: from 1 to 8 can be packed")
    expected = -(-count * bits // 8)
    if packed.numel() != expected:
        raise ValueError(f"{count} codes of {bits} bits take {expected} bytes; got {packed.numel()}")
    if bits == 8:
        return packed.clone()
    padded = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits).to(torch.int64)
    word = (padded << (torch.arange(bits, device=packed.device) * 8)).sum(1)
    codes = (word.unsqueeze(1) >> (torch.arange(8, device=packed.device) * bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten()[:count]
