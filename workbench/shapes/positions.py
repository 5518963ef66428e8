"""How often a model applies each of its weights to one item."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from workbench.modules.layer import find_layers
from workbench.tasks.base import Items, Task
from workbench.util.hooks import of_this_thread


def positions(task: Task, items: Items) -> dict[str, int]:
    """Return how often each weight is applied to the first of `items`: one forward pass with hooks.

    Of experts, which item reaches which one depends on the item: each layer counts as often as those of the
    same block do on average.
    """
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, given: Any) -> None:  # noqa: ARG001  torch calls it so
            output = given if isinstance(given, torch.Tensor) else given[0]  # of a router that returns more
            channels = output.shape[1] if output.ndim == 4 else output.shape[-1]
            counts[name] = output.numel() // channels

        return hook

    handles = [
        layer.module.register_forward_hook(of_this_thread(watch(name)))
        for name, layer in find_layers(task.model)[0].items()
    ]
    try:
        with torch.no_grad():
            task.kind.logits(task.model, items[:1])
    finally:
        for handle in handles:
            handle.remove()
    return counts
