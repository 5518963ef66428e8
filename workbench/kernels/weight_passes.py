"""One kernel for what would be many on a GPU: pruning, rounding and looking over all weights of one shape,
each read once.

Every function takes contiguous weights of one shape and dtype, wherever they lie, and gives the bits of the
plain operations of `magnitudes`, `formats.affine` and `layer_report` (sums of squares: those up to their last
digits). Whether the kernels do so on this device is tried once, before they are used (`weight_trials`); where
they do not, or Triton is missing, the plain operations are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from workbench.formats.affine import Grid
from workbench.util.device import launching, placed

BLOCK = 4096  # weights that one program reads
ROW = 1024  # of those that one warp searches for a threshold
WARPS = 8
WIDEST = 2**14  # inputs of a row that one program holds


@dataclass(frozen=True)
class Change:
    """What a weight has become: `squares` and `errors` are the sums of the dense weights' squares and of the
    squared changes.

    `zeros` counts exact zeros; `wrong` weights that are infinite or NaN, or break the promise of a mask or a
    grid.
    """

    squares: float
    errors: float
    zeros: int
    wrong: int


def table(tensors: Sequence[Tensor]) -> Tensor:
    """Return where tensors lie, int64 [tensors] on their device, without waiting for it."""
    return placed([tensor.data_ptr() for tensor in tensors], torch.int64, tensors[0].device)


def prune(weights: list[Tensor], threshold: Tensor, stay: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return (the weights with zeros for what went, masks bool [layers, *shape]) of 16-bit weights.

    Ties go to the first.

    Args:
        weights: finite, of one shape and 16-bit dtype.
        threshold: of each layer, int [layers, 1]: magnitudes above it stay, as the integers that
            `magnitudes.keys` makes of them.
        stay: how many of those equal to it stay, int [layers, 1].
    """
    from workbench.kernels import triton_weights as kernels

    size, device = weights[0].numel(), weights[0].device
    grid = -(-size // BLOCK), len(weights)
    fresh = [torch.empty_like(weight) for weight in weights]
    masks = torch.empty(len(weights), *weights[0].shape, dtype=torch.bool, device=device)
    ties = torch.empty(len(weights), grid[0], dtype=torch.int32, device=device)
    where, edge = table(weights), threshold.int()
    with launching(device):
        kernels.count_ties[grid](where, edge, ties, size, BLOCK, num_warps=WARPS)
    upto = ties.cumsum(1, dtype=torch.int32)
    with launching(device):
        kernels.prune[grid](
            where,
            edge,
            stay.int(),
            ties,
            upto,
            table(fresh),
            masks.view(torch.uint8),
            size,
            BLOCK,
            num_warps=WARPS,
        )
    return fresh, masks


def prune_rows(weights: list[Tensor], norms: Tensor, removed: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Return (the weights with zeros for what went, masks bool [layers, outputs, inputs]): the smallest |w| *
    norm of each row go.

    Args:
        weights: finite matrices of one shape, at most `WIDEST` inputs.
        norms: of the inputs, float32 [layers, inputs], at least 0.
        removed: how many weights of each layer go: the same number from each of its rows, or one more from
            the first ones.
    """
    from workbench.kernels import triton_weights as kernels

    rows, columns = weights[0].shape
    fresh = [torch.empty_like(weight) for weight in weights]
    masks = torch.empty(len(weights), rows, columns, dtype=torch.bool, device=norms.device)
    gone = placed([number for total in removed for number in divmod(total, rows)], torch.int32, norms.device)
    guesses = placed([guess(total / weights[0].numel()) for total in removed], torch.float32, norms.device)
    together, block, shared, registers = searched(columns, weights[0].itemsize)
    with launching(norms.device):
        kernels.prune_rows[-(-rows // together), len(weights)](
            table(weights),
            norms.contiguous(),
            gone,
            guesses,
            table(fresh),
            table(list(masks.unbind())),
            rows,
            columns,
            kernels.named(weights[0].dtype),
            together,
            block,
            num_warps=shared,
            maxnreg=registers,
        )
    return fresh, masks


def searched(columns: int, itemsize: int) -> tuple[int, int, int, int | None]:
    """Return the tile of `prune_rows` (rows, places of a row), how many warps share it, and the registers of
    a thread: few, so that many programs hide each other's waiting.

    A thread has 32 weights, 64 of the longest rows. `itemsize`: bytes of a weight; of 4 the compiler finds
    the registers itself (None).
    """
    together, block = tile(columns, ROW)
    shared = max(1, min(8, block // ROW))
    return together, block, shared, together * block // (16 * shared) if itemsize == 2 else None


def guess(share: float) -> float:
    """Return the magnitude that this share of a normal distribution lies below, as a multiple of its mean
    magnitude.
    """
    return NormalDist().inv_cdf((1 + min(share, 0.9999)) / 2) / math.sqrt(2 / math.pi)


def tile(columns: int, most: int = BLOCK) -> tuple[int, int]:
    """Return how many rows of so many weights one program takes, one or `most` weights, and how many places
    it has for each: powers of two.
    """
    block = max(16, 1 << (columns - 1).bit_length())
    return max(1, most // block), block


def warps(block: int) -> int:
    """Return how many warps share a tile: 32 weights a thread at most."""
    return max(4, min(16, block // 1024))


def extremes(weights: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Return the least weight of each group, at most 0, and the largest, at least 0: float32 [layers,
    outputs, groups]. `size`: inputs of a group, up to `WIDEST`.
    """
    from workbench.kernels import triton_weights as kernels

    rows, columns = weights[0].shape
    low, high = (torch.empty(len(weights), rows, columns // size, device=weights[0].device) for _ in range(2))
    together, block = tile(size)
    groups = low[0].numel()
    with launching(low.device):
        kernels.extremes[-(-groups // together), len(weights)](
            table(weights),
            low,
            high,
            groups,
            size,
            kernels.named(weights[0].dtype),
            together,
            block,
            num_warps=warps(block),
        )
    return low, high


def search(weights: list[Tensor], scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Return which of the candidates rounds each group of weights with the least squared error, int64 [1,
    layers, outputs, groups]; of equal ones the first.

    Args:
        weights: finite matrices of one shape.
        scales: positive, float32 [candidates, layers, outputs, groups], of at most `WIDEST` inputs a group.
        zeros: zero points, uint8 shaped as `scales`, None for a symmetric grid.
        bits: of a code.
    """
    from workbench.kernels import triton_weights as kernels

    best = torch.empty(1, *scales.shape[1:], dtype=torch.int64, device=scales.device)
    groups, scales, zeros = (
        scales[0, 0].numel(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
    )
    size = weights[0].numel() // groups
    together, block = tile(size)
    with launching(best.device):
        kernels.search[-(-groups // together), len(weights)](
            table(weights),
            scales,
            scales if zeros is None else zeros,
            best,
            groups,
            size,
            len(scales),
            scales[0].numel(),
            (1 << bits) - 1,
            kernels.named(weights[0].dtype),
            zeros is not None,
            together,
            block,
            num_warps=warps(block),
        )
    return best


def to_grid(
    weights: list[Tensor], scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[list[Tensor], Tensor]:
    """Return (the weights as they are on the grid, in their dtype, codes uint8 [layers, *shape]).

    Args:
        weights: finite matrices of one shape.
        scale: positive, float32 [layers, outputs, groups] or [layers, 1, 1].
        zero: zero points, uint8 shaped as `scale`, None for a symmetric grid.
        bits: of a code, up to 8.

    """
    from workbench.kernels import triton_weights as kernels

    size, groups = weights[0].numel(), scale[0].numel()
    fresh = [torch.empty_like(weight) for weight in weights]
    codes = torch.empty(len(weights), *weights[0].shape, dtype=torch.uint8, device=scale.device)
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    with launching(codes.device):
        kernels.to_grid[-(-size // BLOCK), len(weights)](
            table(weights),
            scale,
            scale if zero is None else zero,
            table(fresh),
            codes,
            size,
            groups,
            (1 << bits) - 1,
            kernels.named(weights[0].dtype),
            size // groups,
            zero is not None,
            BLOCK,
            num_warps=WARPS,
        )
    return fresh, codes


def survey(
    dense: list[Tensor], now: list[Tensor], masks: list[Tensor] | None, grids: list[Grid] | None
) -> Tensor:
    """Return sums over each weight, float64 [layers, 4] on the device, for `changes`: squares, squared
    changes, zeros, wrong ones; waits for nothing.

    Args:
        dense: the weights as they were.
        now: as they are, of the same shape and dtype.
        masks: bool, True where a weight was kept; None without.
        grids: of one kind, whose codes the weights must be; None without.
    """
    from workbench.kernels import triton_weights as kernels

    size, first = now[0].numel(), grids[0] if grids else None
    blocks = -(-size // BLOCK)
    sums = torch.empty(len(now), blocks, 4, device=now[0].device)
    here = table(now)
    tables = [here] * 4  # in the place of what is not there: never read
    if masks is not None:
        tables[0] = table(masks)
    if grids and first is not None:
        tables[1:3] = table([grid.codes for grid in grids]), table([grid.scale for grid in grids])
        tables[3] = (
            here
            if first.zero_point is None
            else table([grid.zero_point for grid in grids if grid.zero_point is not None])
        )
    with launching(sums.device):
        kernels.survey[blocks, len(now)](
            table(dense),
            here,
            *tables,
            sums,
            size,
            0 if first is None else (1 << first.bits) - 1,
            kernels.named(now[0].dtype),
            kernels.named(torch.float32 if first is None else first.scale.dtype),
            first is not None,
            1 if first is None else size // first.scale.numel(),
            masks is not None,
            first is not None and first.zero_point is not None,
            BLOCK,
            num_warps=WARPS,
        )
    return sums.sum(1, dtype=torch.float64)


def changes(sums: Tensor) -> list[Change]:
    """Return the changes that the sums of `survey`, float64 [layers, 4], say; waits for the device once."""
    return [
        Change(squares, errors, int(zeros), int(wrong)) for squares, errors, zeros, wrong in sums.tolist()
    ]
