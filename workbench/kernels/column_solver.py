"""The column loop of GPTQ and SparseGPT within a block, by one kernel where a GPU has Triton: the loop waits
for no launches.

Sums are those of the plain loops but for their last digits (products are fused with what they are taken
from), so that a weight between two codes may now and then go to the other one. Whether the kernel does what
the loops do is tried once on a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from workbench.kernels.column_loops import Columns, Factor, remove_columns, round_columns
from workbench.util.device import launching, why_no_triton
from workbench.util.fast_path import FastPath, attempted, with_triton

BLOCK = 128  # columns worked through before the rest of the matrix hears of them
ROWS = 32  # of a program
ALIKE = 0.99  # of a trial's weights: the others lie between two codes


@dataclass(frozen=True)
class Target:
    """What columns go to: scales float32 and zero points uint8 (None: symmetric) [layers, outputs or 1,
    inputs], codes of `bits`; `scale` None: zeros where not kept.
    """

    kept: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    bits: int = 0


def suited(weights: Tensor) -> bool:
    """Return whether the kernel takes these weights: float32 on a device where it does what it should."""
    return weights.dtype == torch.float32 and weights.is_contiguous() and not refused(weights.device)


def work_through(weights: Tensor, upper: Tensor, out: Tensor, start: int, to: Target) -> Tensor:
    """Settle up to BLOCK columns from `start` on, in `out`, which may be the weights.

    Return their errors, [layers, outputs, columns].

    Args:
        weights: float32 [layers, outputs, inputs], in line, as `out`.
        upper: factors, float32 [layers, inputs, inputs]; of rounding each row over its diagonal.
        out: takes the values of these columns.
        start: the first column, a multiple of BLOCK.
        to: what they become; masks bool [layers, outputs, inputs].
    """
    from workbench.kernels import triton_columns as kernels

    layers, rows, inputs = weights.shape
    width = min(BLOCK, inputs - start)
    errors = torch.empty(layers, rows, BLOCK, dtype=torch.float32, device=weights.device)
    scale, zero = (
        None if part is None else part.expand(layers, rows, inputs) for part in (to.scale, to.zero)
    )
    if zero is not None and scale is not None and zero.stride() != scale.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    kept = None if to.kept is None else to.kept.contiguous().view(torch.uint8)
    strides = (0, 0, 0) if scale is None else scale.stride()
    with launching(weights.device):
        kernels.work_through[-(-rows // ROWS), layers](
            weights,
            upper.contiguous(),
            weights if scale is None else scale,
            weights if zero is None else zero,
            weights if kept is None else kept,
            out,
            errors,
            rows,
            inputs,
            start // BLOCK,
            width,
            *strides,
            (1 << to.bits) - 1,
            scale is not None,
            zero is not None,
            kept is not None,
            ROWS,
            BLOCK,
            num_warps=8,
        )
    return errors[:, :, :width]


@cache
def refused(device: torch.device) -> str:
    """Return why the kernel is not used on a device, "" if it is; compiles and tries it at the first call."""
    if reason := why_no_triton(device):
        return reason
    return attempted(lambda: trial(device))


def failed(device: torch.device) -> str:
    """Return why the kernel is not used though this machine has it, "" else."""
    return "" if why_no_triton(device) else refused(device)


def trial(device: torch.device) -> str:
    """Return the fault that a trial shows, "" if there is none: small layers rounded and pruned by the kernel
    and by the plain loops.
    """
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 40, 96, generator=draw).to(device)
    upper = (0.1 * torch.randn(2, 96, 96, generator=draw)).triu(1).to(device) + torch.eye(96, device=device)
    scale, zero = (
        (0.3 + torch.rand(2, 40, 96, generator=draw)).to(device),
        torch.full((2, 40, 96), 3, dtype=torch.uint8, device=device),
    )
    kept = (torch.rand(2, 40, 96, generator=draw) < 0.6).to(device)
    for zeros, masks in ((zero, None), (None, kept)):
        rounded, plain = torch.empty_like(weights), torch.empty_like(weights)
        errors = work_through(weights, upper, rounded, 0, Target(masks, scale, zeros, 3))
        expected = round_columns(weights.clone(), upper, plain, Columns(scale, zeros, masks, 3, "integer"))
        if not (alike(rounded, plain) and alike(errors, expected)):
            return "rounding columns gives other weights than the plain loop"
    block = weights.clone()
    errors = work_through(weights, upper, rounded, 0, Target(kept))
    expected = remove_columns(block, Factor(upper, kept[:, 0]), kept, None)
    return (
        ""
        if alike(rounded, block * kept) and alike(errors, expected)
        else "pruning columns gives other weights than the plain loop"
    )


COLUMNS = FastPath(
    "columns by one kernel (Triton)",
    "GPTQ and SparseGPT on a GPU",
    with_triton("workbench.kernels.triton_columns"),
    refused,
)


def alike(values: Tensor, expected: Tensor) -> bool:
    """Return whether almost all numbers of two tensors of one shape agree to rounding."""
    return float(torch.isclose(values, expected, rtol=1e-3, atol=1e-4).float().mean()) >= ALIKE
