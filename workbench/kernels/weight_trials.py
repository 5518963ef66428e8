"""Whether the kernels of `weight_passes` are used: tried once on a device, against the plain operations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from workbench.formats.affine import Grid
from workbench.kernels import magnitudes, weight_passes
from workbench.kernels.selection import keep_fewer, spread
from workbench.util.device import why_no_triton
from workbench.util.fast_path import FastPath, attempted, with_triton

ALIGNED = 16  # bytes, so that many weights are read by one instruction
MOST = 2**31 - 2**13  # weights of a layer: places are 32-bit numbers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def suited(*stacks: Sequence[Tensor]) -> bool:
    """Return whether the kernels read these tensors: on one device where they are right for the first one's
    dtype, contiguous, aligned.
    """
    tensors = [tensor for stack in stacks for tensor in stack]
    device, dtype = tensors[0].device, tensors[0].dtype
    if not all(
        tensor.device == device
        and tensor.is_contiguous()
        and tensor.data_ptr() % ALIGNED == 0
        and 0 < tensor.numel() <= MOST
        for tensor in tensors
    ):
        return False
    return not refused(device, dtype)


@cache
def refused(device: torch.device, dtype: torch.dtype) -> str:
    """Return why the kernels are not used for weights of a dtype on a device, "" if they are.

    Compiles and tries them at the first call.
    """
    if reason := why_no_triton(device):
        return reason
    if dtype not in DTYPES:
        return f"no kernel reads {dtype}"
    return attempted(lambda: trial(device, dtype))


def failed(device: torch.device, dtype: torch.dtype) -> str:
    """Return why the kernels are not used though this machine has them and they read the dtype, "" else."""
    return "" if why_no_triton(device) or dtype not in DTYPES else refused(device, dtype)


def trial(device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernel gives other bits than the plain operations, "" if none does.

    On weights with many ties, zeros and both signs.
    """
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randint(-40, 41, (2, 96, 96), generator=generator) / 64).to(device, dtype)
    scale, zero = (
        torch.rand(2, 96, 3, generator=generator).to(device) / 16 + 0.01,
        torch.full((2, 96, 3), 3, dtype=torch.uint8, device=device),
    )
    plain = Grid(torch.empty(0), scale, zero, 3).snap(weights.float())
    rounded, codes = weight_passes.to_grid(list(weights.unbind()), scale, zero, 3)
    if not (
        torch.equal(codes, plain.codes) and torch.equal(torch.stack(rounded), plain.dequantize().to(dtype))
    ):
        return f"rounding {dtype} weights gives other bits than the plain operations"
    grids = [Grid(code, own, offset, 3) for code, own, offset in zip(codes, scale, zero, strict=True)]
    changes = weight_passes.changes(
        weight_passes.survey(list(weights.unbind()), rounded, masks=None, grids=grids)
    )
    if any(
        change.wrong or change.zeros != int((now == 0).sum())
        for change, now in zip(changes, rounded, strict=True)
    ):
        return f"looking over {dtype} weights counts otherwise than the plain operations"
    return (
        trial_of_scales(weights)
        or trial_of_rows(weights)
        or (trial_of_masks(weights) if dtype.itemsize == 2 else "")
    )


def trial_of_scales(weights: Tensor) -> str:
    """Return the fault of the search for scales, "" if there is none."""
    groups = weights.float().unflatten(2, (-1, 32))
    low, high = weight_passes.extremes(list(weights.unbind()), 32)
    if not (torch.equal(low, groups.amin(3).clamp_max(0)) and torch.equal(high, groups.amax(3).clamp_min(0))):
        return f"the ranges of {weights.dtype} weights are not those of the plain operations"
    scales = torch.stack([(high - low + 0.01) / (7 + place) for place in range(6)])
    errors = (
        (groups - (groups / scales.unsqueeze(-1)).round().clamp(-4, 3) * scales.unsqueeze(-1)).square().sum(4)
    )
    chosen = errors.gather(0, weight_passes.search(list(weights.unbind()), scales, None, 3))
    return (
        ""
        if bool((chosen <= 1.0001 * errors.amin(0) + 1e-9).all())
        else f"the scales found for {weights.dtype} weights are not the best ones"
    )


def trial_of_rows(weights: Tensor) -> str:
    """Return the fault of pruning row by row, "" if there is none."""
    layers, rows, columns = weights.shape
    norms = (1 + torch.arange(layers * columns, device=weights.device) % 5).view(layers, columns) / 4
    scores = (weights.float().abs() * norms.unsqueeze(1)).flatten(0, 1)
    removed = [rows * 40 + 7, 5]
    kept = keep_fewer(scores, [count for total in removed for count in spread(total, rows)]).view_as(weights)
    pruned, masks = weight_passes.prune_rows(list(weights.unbind()), norms, removed)
    if torch.equal(masks, kept) and torch.equal(torch.stack(pruned), weights * kept):
        return ""
    return f"pruning rows of {weights.dtype} weights gives other bits than the plain operations"


def trial_of_masks(weights: Tensor) -> str:
    """Return the fault of pruning by counted magnitudes, "" if there is none."""
    keys = magnitudes.keys(weights.flatten(1)).long()
    below = torch.stack([torch.bincount(row, minlength=magnitudes.VALUES) for row in keys]).cumsum(1).int()
    removed = [weights[0].numel() // 3, 0]
    kept = magnitudes.keep(weights.flatten(1), below, removed).view_as(weights)
    pruned, masks = weight_passes.prune(list(weights.unbind()), *magnitudes.thresholds(below, removed))
    if torch.equal(masks, kept) and torch.equal(
        torch.stack(pruned).view(torch.int16), (weights * kept).view(torch.int16)
    ):
        return ""
    return f"pruning {weights.dtype} weights gives other bits than the plain operations"


WEIGHT_PASSES = FastPath(
    "one pass over weights (Triton)",
    "pruning, rounding and checking weights on a GPU",
    with_triton("workbench.kernels.triton_weights"),
    lambda device: next((reason for dtype in DTYPES if (reason := refused(device, dtype))), ""),
)
