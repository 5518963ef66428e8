"""Copies of a model that share its tensors: methods replace what they change, so that nothing else is copied.

A deep copy of a language model takes longer than compressing it, and holds every tensor twice.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn

from workbench.modules.offload import mark, replace_tensors
from workbench.util.fast_path import FastPath
from workbench.util.library_internals import COMPILED_CALL, SHARED, TABLES, children_of, lacks


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a model of new modules around the same parameters and buffers.

    Nobody may change those in place: `Layer.write` puts new parameters into their places, and whoever trains
    calls `own_parameters` first. A model whose modules hold other modules outside the module tree (in a list,
    or as a bound method) is copied whole, since sharing would tie both models together.
    """
    if not can_share(model):
        copied = copy.deepcopy(model)
        mark(copied)
        return copied
    return twin(model)


def can_share(model: nn.Module) -> bool:
    """Return whether all modules of a model are in its module tree."""
    return not any(holds_modules(module) for module in model.modules())


def twin(model: nn.Module, *, evaluating: bool = False) -> nn.Module:
    """Return new modules around the same parameters and buffers, in eval mode if so asked.

    Whatever else the modules hold is shared too.
    """
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        copied = copies[id(module)] = module.__class__.__new__(module.__class__)
        inside = vars(module)
        mine = vars(copied)
        mine.update(inside)
        for name in own_tables(tuple(inside)):
            if inside[name].__class__ is not bool:  # transformers has a flag with such a name
                mine[name] = inside[name].copy()
        mine.pop(COMPILED_CALL, None)
        if evaluating:
            mine["training"] = False
    for copied in copies.values():
        children = children_of(copied)
        children.update({name: copies[id(child)] for name, child in children.items() if child is not None})
    return copies[id(model)]


@cache
def own_tables(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return which attributes of a module are tables that a copy has of its own."""
    return tuple(name for name in names if name in TABLES or "hooks" in name)


def holds_modules(module: nn.Module) -> bool:
    """Return whether an ordinary attribute leads to a module, or a table is none that can be copied."""
    return any(
        leads_to_module(value)
        for name, value in vars(module).items()
        if name not in TABLES and "hooks" not in name
    )


def leads_to_module(value: Any) -> bool:
    """Return whether a value is a module, a method of one, a partial function over one, or a collection with
    one in it.
    """
    if isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module):
        return True
    if isinstance(value, dict):
        return any(map(leads_to_module, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(leads_to_module, value))
    bound = (
        (getattr(value, "func", None), *getattr(value, "args", ()), *getattr(value, "keywords", {}).values())
        if hasattr(value, "func") and hasattr(value, "keywords")
        else ()
    )
    return any(map(leads_to_module, bound))


def own_parameters(model: nn.Module) -> None:
    """Give a model parameters and buffers of its own, clones of those it has.

    What was shared within the model stays shared.
    """
    replace_tensors(model, lambda tensor: tensor.detach().clone())
    mark(model)


def tried(device: torch.device) -> str:
    """Return why a small model cannot be copied around its tensors, "" if it can."""
    model = nn.Sequential(nn.Linear(2, 2, device=device), nn.BatchNorm1d(2, device=device))
    copied = sharing_copy(model)
    if copied_whole(copied, model):
        return "its modules look as if they held others outside the module tree"
    apart = copied[0] is not model[0]  # type: ignore[index]
    same_names = copied.state_dict().keys() == model.state_dict().keys()
    return "" if apart and same_names else "a copy is not a model of its own"


def copied_whole(copied: nn.Module, model: nn.Module) -> bool:
    """Return whether a copy that was just made has tensors of its own."""
    return next(copied.parameters(), None) is not next(model.parameters(), None)


SHARED_COPIES = FastPath(
    "copies that share tensors",
    "every move: nothing is copied but what a method changes",
    lambda _device: lacks(SHARED),
    tried,
)
