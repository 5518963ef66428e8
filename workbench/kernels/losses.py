"""Cross entropy and answers of rows of logits by one kernel that reads them once, where a GPU has Triton.

Whether it gives what the plain operations give is tried once on a device for each dtype.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.util.device import launching, why_no_triton
from workbench.util.fast_path import FastPath, attempted, with_triton

TILE = 4096  # logits that one program takes together


def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of each row (nats, float32, 0 where a label is -100) and the class of its
    largest logit, int64 [rows].

    Args:
        logits: [rows, classes], each row in line.
        labels: int64 [rows].
    """
    from workbench.kernels import triton_losses as kernels

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
            min(TILE, max(16, 1 << (classes - 1).bit_length())),
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
    """Return the fault of `losses` for logits of a dtype, "" if there is none."""
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
    with_triton("workbench.kernels.triton_losses"),
    lambda device: next(
        (reason for dtype in (torch.bfloat16, torch.float32) if (reason := losses_refused(device, dtype))), ""
    ),
)
