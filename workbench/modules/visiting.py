"""Layers of a streamed model on its device while they are worked with, and at home afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from workbench.modules.layer import Layer
from workbench.modules.offload import HOST, bring, moved, send_home, streams_to

FIELDS = ("mask", "grid", "rows", "columns")  # of a layer: what else of it takes memory


@contextmanager
def visiting(layers: Sequence[Layer]) -> Iterator[None]:
    """Within, streamed layers are on the device, masks and stored forms with them.

    After, whatever has become of them is at home.

    Layers that are not streamed, or are visiting already, are left where they are.
    """
    away = [layer for layer in layers if streams_to(layer.parameter) is not None]
    if not away:
        yield
        return
    device, pinned = cast("torch.device", streams_to(away[0].parameter)), away[0].parameter.is_pinned()
    bring(modules_of(away), device)
    before = [{name: getattr(layer, name) for name in FIELDS} for layer in away]
    there = [{name: moved(value, device) for name, value in fields.items()} for fields in before]
    for layer, fields in zip(away, there, strict=True):
        vars(layer).update(fields)
    modules = modules_of(away)
    try:
        yield
    finally:
        send_home([*modules, *modules_of(away)], pinned=pinned)
        for layer, home, fields in zip(away, before, there, strict=True):
            vars(layer).update(
                {
                    name: (
                        home[name]
                        if getattr(layer, name) is fields[name]
                        else moved(getattr(layer, name), HOST, pinned=pinned)
                    )
                    for name in FIELDS
                }
            )


def settle(model: nn.Module, fresh: Iterable[Layer]) -> None:
    """Take home the layers that a step made in the place of visiting ones, if the model is streamed."""
    if streams_to(model) is None:
        return
    layers, pinned = (
        list(fresh),
        next((tensor.is_pinned() for tensor in model.parameters() if streams_to(tensor) is not None), False),
    )
    send_home(modules_of(layers), pinned=pinned)
    for layer in layers:
        vars(layer).update({name: moved(getattr(layer, name), HOST, pinned=pinned) for name in FIELDS})


def modules_of(layers: Iterable[Layer]) -> list[nn.Module]:
    """Return the modules that hold layers' weights, and their parts."""
    return [
        part
        for layer in layers
        for module in (layer.module, *layer.others.values())
        for part in module.modules()
    ]
