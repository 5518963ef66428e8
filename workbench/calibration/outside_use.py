"""What a model does with its layers besides calling them with one input: found by watching one item go
through.

Two layers in the place of one have a weight and a bias, but no stride, and take one input. A model that reads
its layer's stride, as MobileNetV2 does to pad as TensorFlow would, can only run with the layer itself.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.calibration.statistics import Statistics
from workbench.modules.layer import find_layers
from workbench.modules.offload import device_of
from workbench.modules.sharing import sharing_copy

if TYPE_CHECKING:
    from workbench.tasks.base import Task

CALL = "a call with more than one input"


def used_from_outside(statistics: Statistics) -> dict[str, frozenset[str]]:
    """Return, by layer, which of its attributes the dense model reads while it does not run, and `CALL` where
    it is given more than one input. Kept.
    """
    return statistics.once("used from outside", lambda: watched(statistics.task))


def watched(task: Task) -> dict[str, frozenset[str]]:
    """Return the answer of `used_from_outside` for one calibration item; the task's model is not changed."""
    model = sharing_copy(task.model).eval()
    device = device_of(task.model)
    seen: dict[str, set[str]] = {}
    for name, layer in find_layers(model)[0].items():
        for module in (layer.module, *layer.others.values()):
            watch(module, seen.setdefault(name, set()))
    with torch.no_grad():
        task.kind.logits(model, task.calibration[:1].to(device))
    return {name: frozenset(names) for name, names in seen.items()}


def watch(module: nn.Module, seen: set[str]) -> None:
    """Make a module note what is read of it by others, by giving it a class of its own kind."""
    kind: Any = type(module)
    state = threading.local()  # how deep in calls of the module

    def called(self: nn.Module, *given: Any, **named: Any) -> Any:
        state.depth = getattr(state, "depth", 0) + 1
        if len(given) + len(named) > 1:
            seen.add(CALL)
        try:
            return kind.__call__(self, *given, **named)
        finally:
            state.depth -= 1

    def read(self: nn.Module, name: str) -> Any:
        if not getattr(state, "depth", 0) and not name.startswith("_"):
            seen.add(name)
        return kind.__getattribute__(self, name)

    def attribute(self: nn.Module, name: str) -> Any:
        if not getattr(state, "depth", 0) and not name.startswith("_"):
            seen.add(name)
        return kind.__getattr__(self, name)

    module.__class__ = type(
        kind.__name__,
        (kind,),
        {
            "__call__": called,
            "__getattribute__": read,
            "__getattr__": attribute,
            "__module__": kind.__module__,
        },
    )
