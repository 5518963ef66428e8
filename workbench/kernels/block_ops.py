"""Launches of the kernels of `triton_blocks`: tensors in, tensors out.

Sizes are chosen so that a thread holds 8 to 32 numbers.

Whoever calls them tries them first: see `losses_refused`, and `workbench.measure.evaluation.fused_blocks` for
those of blocks.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.util.device import launching, why_no_triton
from workbench.util.fast_path import FastPath, attempted, with_triton

TILE = 4096  # numbers that one program takes together
FLAT = 2048  # of a product, number by number
TURNED = 1024  # pairs of numbers that are turned together


def power_of_two(count: int) -> int:
    """Return the least power of two that is at least `count`, and at least 16."""
    return max(16, 1 << (count - 1).bit_length())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019).

    X [..., width] and weight [width] of one dtype.
    """
    from workbench.kernels import triton_blocks as kernels

    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    rows, block = x.numel() // width, power_of_two(width)
    together = max(1, min(TILE // block, 8))
    with launching(out.device):
        kernels.rms_norm[(-(-rows // together),)](
            x, weight, out, rows, width, eps, together, block, num_warps=max(4, min(16, block // 512))
        )
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; both of one shape and dtype."""
    from workbench.kernels import triton_blocks as kernels

    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with launching(out.device):
        kernels.gated[(-(-gate.numel() // FLAT),)](gate, up, out, gate.numel(), FLAT, num_warps=8)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return x * cos + rotate_half(x) * sin of queries and keys [items, heads, tokens, width].

    Cos and sin [items or 1, tokens, width].

    They may lie in any order of items, heads and tokens, and what is returned lies as they do.
    """
    from workbench.kernels import triton_blocks as kernels

    items, _, tokens, width = q.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    cos, sin = (part.contiguous().expand(items, tokens, width) for part in (cos, sin))
    outs, half = (torch.empty_like(q), torch.empty_like(k)), width // 2
    block = power_of_two(half)
    together = max(1, TURNED // block)
    blocks = [-(-x.numel() // (width * together)) for x in (q, k)]
    strides = [stride for x in (q, k, *outs) for stride in x.stride()[:3]]
    with launching(q.device):
        kernels.rotary[(sum(blocks),)](
            q,
            k,
            cos,
            sin,
            *outs,
            blocks[0],
            items,
            tokens,
            q.shape[1],
            k.shape[1],
            *strides,
            *cos.stride()[:2],
            half,
            together,
            block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return outs


def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of each row (nats, float32, 0 where a label is -100) and the class of its
    largest logit, int64 [rows].

    Args:
        logits: [rows, classes], each row in line.
        labels: int64 [rows].
    """
    from workbench.kernels import triton_blocks as kernels

    rows, classes = logits.shape
    loss, answers = (
        torch.empty(rows, dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.int64, device=logits.device),
    )
    with launching(loss.device):
        kernels.losses[(rows,)](
            logits,
            labels.contiguous(),
            loss,
            answers,
            classes,
            logits.stride(0),
            min(TILE, power_of_two(classes)),
            num_warps=4,
        )
    return loss, answers


@cache
def losses_refused(device: torch.device, dtype: torch.dtype) -> str:
    """Return why `losses` is not used for logits of a dtype on a device, "" if it is.

    Tried at the first call.
    """
    return why_no_triton(device) or attempted(lambda: trial_of_losses(device, dtype))


def losses_failed(device: torch.device, dtype: torch.dtype) -> str:
    """Return why `losses` is not used though this machine has it, "" else."""
    return "" if why_no_triton(device) else losses_refused(device, dtype)


def trial_of_losses(device: torch.device, dtype: torch.dtype) -> str:
    """Return what is wrong with `losses`, "" if nothing is."""
    logits = torch.randn(7, 5001, generator=torch.Generator().manual_seed(0)).mul_(4).to(device, dtype)
    labels = torch.tensor([0, 5000, 17, -100, 3, 4999, 4096], device=device)
    logits[1, 77], logits[1, 4200] = 99.0, 99.0  # two as large: the first is the answer
    loss, answers = losses(logits, labels)
    expected = F.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="none")
    right = torch.allclose(loss.double(), expected, rtol=1e-5, atol=1e-5) and torch.equal(
        answers.cpu(), logits.cpu().argmax(-1)
    )
    return "" if right else f"the losses of {dtype} logits are not those of the plain operations"


LOSSES = FastPath(
    "losses by one kernel (Triton)",
    "reading logits of a large vocabulary on a GPU",
    with_triton("workbench.kernels.triton_blocks"),
    lambda device: next(
        (reason for dtype in (torch.bfloat16, torch.float32) if (reason := losses_refused(device, dtype))), ""
    ),
)
