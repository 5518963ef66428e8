"""Where a model has whole blocks that may go, found by watching one item go through it.

A list of blocks is a list of modules in the module tree of which each hands the next one what it made: names
do not matter. A block may go if it gives hidden states of the shape that it was given, and holds parameters
of the same names as most blocks of its list: the only one with position biases, or without a norm, has a part
that the others do not play.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.modules.layer import holders_of
from workbench.util.hooks import of_this_thread

if TYPE_CHECKING:
    from workbench.tasks.base import Items, Kind


@dataclass(frozen=True)
class BlockLists:
    """Lists of blocks by name, with the places of the blocks that may go; why other lists of modules are
    none, and why single blocks stay, by name.
    """

    places: dict[str, list[int]]
    refused: dict[str, str]
    staying: dict[str, str]


@dataclass
class Calls:
    """What a module was given and what it made, call by call; held so that no two tensors have one id."""

    given: list[Tensor | None] = field(default_factory=list)
    made: list[Tensor | None] = field(default_factory=list)


def find_block_lists(model: nn.Module, kind: Kind, items: Items) -> BlockLists:
    """Return the lists of blocks of a model, from one item."""
    lists = {
        name: list(module.children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    }
    calls = watched(model, kind, items, [child for children in lists.values() for child in children])
    found, refused, staying = dict[str, list[int]](), dict[str, str](), dict[str, str]()
    whole = set[str]()
    for name, children in lists.items():
        seen = [calls[child] for child in children]
        if all(hasattr(child, "shortcut") for child in children):
            found[name] = [i for i, child in enumerate(children) if isinstance(child.shortcut, nn.Identity)]
        elif isinstance(model.get_submodule(name), nn.ModuleList) and all(map(holds_layers, children)):
            reason = why_no_list(seen)
            if reason:
                refused[name] = reason
                continue
            even = [i for i, one in enumerate(seen) if keeps_shape(one)]
            usual = usual_names(children[i] for i in even)
            found[name] = [i for i in even if names_of(children[i]) == usual]
            staying |= {
                f"{name}.{i}": unlike(children[i], usual) for i in even if names_of(children[i]) != usual
            }
            if len(even) == len(children):
                whole.add(name)
    kept = {name: places for name, places in found.items() if not superseded(name, found, whole)}
    return BlockLists({name: kept[name] for name in lists if name in kept}, refused, staying)


def superseded(name: str, found: Iterable[str], whole: set[str]) -> bool:
    """Return whether another list speaks for this one: one around it whose members may all go, or, where its
    own members may not all go, one within it.
    """
    if any(name.startswith(f"{other}.") for other in whole):
        return True
    return name not in whole and any(other.startswith(f"{name}.") for other in found)


def watched(
    model: nn.Module, kind: Kind, items: Items, modules: Iterable[nn.Module]
) -> dict[nn.Module, Calls]:
    """Return the calls of modules while one item goes through the model."""
    calls = {module: Calls() for module in modules}

    def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[module].given.append(states_given(given, named))

    def after(module: nn.Module, _given: tuple[Any, ...], _named: dict[str, Any], out: Any) -> None:
        calls[module].made.append(states_made(out))

    device = next(model.parameters()).device
    with ExitStack() as hooks, torch.no_grad():
        for module in calls:
            hooks.callback(module.register_forward_pre_hook(of_this_thread(before), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(of_this_thread(after), with_kwargs=True).remove)
        kind.logits(model, items[:1].to(device))
    return calls


def states_given(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """Return the hidden states that a module is given: its first tensor."""
    values = (*given[:1], named.get("hidden_states"), *given[1:], *named.values())
    return next((value for value in values if isinstance(value, Tensor)), None)


def states_made(out: Any) -> Tensor | None:
    """Return the hidden states that a module gives: its result, or the first part of it."""
    if isinstance(out, Tensor):
        return out
    values: Iterable[Any] = (
        out.values() if isinstance(out, dict) else out if isinstance(out, tuple | list) else ()
    )
    return next((value for value in values if isinstance(value, Tensor)), None)


def holds_layers(module: nn.Module) -> bool:
    """Return whether a module is more than one layer: it holds layers of its own."""
    return any(name for name in holders_of(module))


def why_no_list(seen: list[Calls]) -> str:
    """Return why modules of a list do not hand hidden states on from one to the next, "" if they do."""
    counts = {len(calls.given) for calls in seen}
    if 0 in counts or len(counts) > 1:
        return "not all of its modules are run for an item"
    for calls in seen:
        again = sum(same(given, made) for given, made in zip(calls.given[1:], calls.made, strict=False))
        if again:
            return (
                f"one block is run {again + 1} times in a row: its weights are shared over depths, so that"
                " no depth has weights of its own that could go"
            )
    for one, following in pairwise(seen):
        if not all(map(same, one.made, following.given)):
            return "what one of its modules gives is not what the next one is given"
    return ""


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two are the same tensor."""
    return (
        one is not None
        and other is not None
        and (one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape))
    )


def keeps_shape(calls: Calls) -> bool:
    """Return whether a module gives what it was given in shape."""
    return all(
        given is not None and made is not None and given.shape == made.shape
        for given, made in zip(calls.given, calls.made, strict=True)
    )


def names_of(module: nn.Module) -> frozenset[str]:
    """Return the names of a module's parameters."""
    return frozenset(name for name, _ in module.named_parameters())


def usual_names(modules: Iterable[nn.Module]) -> frozenset[str]:
    """Return the names that most modules have; of equally many the first."""
    counted = Counter(map(names_of, modules))
    return counted.most_common(1)[0][0] if counted else frozenset()


def unlike(module: nn.Module, usual: frozenset[str]) -> str:
    """Return why a block stays that is not like the others."""
    more, less = sorted(names_of(module) - usual), sorted(usual - names_of(module))
    parts = [f"it holds {more[0]}, which the others do not"] if more else []
    parts += [f"it lacks {less[0]}, which the others hold"] if less else []
    return " and ".join(parts)


def why_none(lists: BlockLists) -> str:
    """Return why a model has no blocks that may go, the reason of the longest list first."""
    if lists.places:
        return "its lists of blocks have one each"
    if lists.refused:
        name, reason = max(lists.refused.items(), key=lambda pair: ("shared" in pair[1], -len(pair[0])))
        return f"{name}: {reason}"
    return "no list of its modules hands hidden states on from one to the next"
