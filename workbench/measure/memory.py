"""Peak memory of one forward pass: the weights as they are held, plus the most that activations took."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from workbench.tasks.base import Items, Kind


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, shared storage counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hide what the profiler's C++ side prints at every start and stop (torch 2.13)."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def peak_memory_bytes(kind: Kind, model: nn.Module, items: Items) -> int:
    """Return weights plus peak activations, bytes, of one pass over `items` on the device where they are.

    On a GPU the allocator's own counter; on a CPU the allocations that torch's profiler records.
    """
    held = unique_bytes([*model.parameters(), *model.buffers()])
    if items.labels.device.type == "cuda":
        with torch.no_grad():
            kind.logits(
                model, items[:1]
            )  # libraries take their workspace on the first call: it is not the model's
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            kind.logits(model, items)
        torch.cuda.synchronize()
        return held + torch.cuda.max_memory_allocated() - before
    with (
        torch.no_grad(),
        quiet_stderr(),
        profile(profile_memory=True) as profiler,
    ):
        kind.logits(model, items)
    recorded = profiler.kineto_results
    assert recorded is not None  # noqa: S101  for the type checker: the profiler has stopped
    held_now = peak = 0
    for event in recorded.events():  # in order of time
        if event.name() == "[memory]":
            held_now += event.nbytes()
            peak = max(peak, held_now)
    return held + peak
