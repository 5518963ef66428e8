"""What a pass over evaluation items costs in arithmetic: the one count from which floors are made."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workbench.tasks.base import Items, Task


def flop(task: Task, items: Items) -> int:
    """Return the floating-point operations of one pass over `items`, counted on the first of them: all
    products, attention over whole windows.

    A causal mask saves none here, although a kernel may skip half of attention's products: for a Llama of
    135M with windows of 512 that is 6% more than counting half. Items are taken to be as long as the first.
    """
    with (
        torch.no_grad(),
        sdpa_kernel([SDPBackend.MATH]),
        FlopCounterMode(display=False) as counter,
    ):  # the counter knows no shared keys and values in the others
        task.kind.logits(task.model, items[:1])
    return int(counter.get_total_flops()) * len(items)
