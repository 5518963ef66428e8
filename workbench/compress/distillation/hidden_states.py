"""What is inside a model while it answers: its logits, hidden states and attention maps, and which of a
student's stand for which of its teacher's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.distillation.losses import attention_loss, state_loss
from workbench.errors import CompressionError, RecipeError
from workbench.tasks.base import Items, Kind
from workbench.util.hooks import of_this_thread
from workbench.util.library_internals import attention_of

STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
MAPS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
PAIRS = re.compile(r"\d+:\d+(,\d+:\d+)*")

Pairs = dict[str, tuple[tuple[int, int], ...]]  # by group: (student's place, teacher's place)


@dataclass(frozen=True)
class SeenStates:
    """What one forward pass showed: `logits`, and by the names that transformers gives them, tuples of hidden
    states or attention maps.
    """

    logits: Tensor
    inside: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


def see(
    kind: Kind, model: nn.Module, items: Items, *, states: bool = False, maps: bool = False
) -> SeenStates:
    """Return the logits of a model that transformers made, with hidden states and attention maps where these
    are asked for.
    """
    if not states and not maps:
        return SeenStates(kind.logits(model, items))
    asked = {
        name: True
        for name, wanted in (("output_hidden_states", states), ("output_attentions", maps))
        if wanted
    }
    shown: list[Any] = []
    before = model.register_forward_pre_hook(
        of_this_thread(lambda _model, args, named: (args, {**named, **asked})), with_kwargs=True
    )
    after = model.register_forward_hook(of_this_thread(lambda _model, _args, output: shown.append(output)))
    try:
        logits = kind.logits(model, items)
    finally:
        before.remove()
        after.remove()
    names = [*STATES * states, *MAPS * maps]
    inside = {name: getattr(shown[-1], name, None) for name in names}
    return SeenStates(
        logits,
        {
            name: tuple(values)
            for name, values in inside.items()
            if values and all(isinstance(value, Tensor) for value in values)
        },
    )


@contextmanager
def showing_attention(*models: nn.Module) -> Iterator[None]:
    """Have models compute their attention maps in the open ("eager"); fused kernels keep none.

    What was set before comes back.
    """
    configs: list[Any] = [getattr(model, "config", None) for model in models]
    before = [attention_of(config) for config in configs]
    try:
        for model in models:
            switch(model, "eager")
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            switch(model, name)


def switch(model: nn.Module, attention: str | None) -> None:
    """Set how a transformers model computes attention, if it lets one."""
    change = getattr(model, "set_attn_implementation", None)
    if attention is not None and callable(change):
        change(attention)


def pair_up(
    student: SeenStates,
    teacher: SeenStates,
    layer_map: str,
    *,
    states: bool,
    maps: bool,
    names: tuple[str, str],
) -> Pairs:
    """Return which places of the student stand for which of the teacher, after checking that they can.

    Blocks are counted from 1; hidden state 0 is what the first block is given. Without a `layer_map` such as
    `1:2,2:4` (student's block : teacher's block), block l stands for round(l * teacher's blocks / student's
    blocks).

    Raises:
        CompressionError: a model shows none, or shapes differ, with the reason.
        RecipeError: the map names a block that is not there.
    """
    places: Pairs = {}
    for wanted, groups, option in ((states, STATES, "hidden_weight"), (maps, MAPS, "attention_weight")):
        if not wanted:
            continue
        what = "hidden states" if groups is STATES else "attention maps"
        shown = [name for name in groups if name in teacher.inside and name in student.inside]
        if not shown:
            which = names[0] if not any(name in student.inside for name in groups) else names[1]
            raise CompressionError(
                f"{which} gives no {what}, so {option} has nothing to compare: set {option}=0"
            )
        for name in shown:
            mine, yours = student.inside[name], teacher.inside[name]
            first = 1 if groups is STATES else 0  # place of block 1
            blocks = len(mine) - first, len(yours) - first
            pairs = tuple((a - 1 + first, b - 1 + first) for a, b in block_pairs(*blocks, layer_map, name))
            for a, b in pairs:
                check_shapes(
                    mine[a],
                    yours[b],
                    f"{name} of block {a + 1 - first} of the student",
                    f"block {b + 1 - first} of the teacher",
                    option,
                )
            places[name] = pairs
    return places


def block_pairs(
    student: int, teacher: int, layer_map: str, what: str = "hidden_states"
) -> tuple[tuple[int, int], ...]:
    """Return (student's block, teacher's block), both from 1; see `pair_up`.

    Raises:
        RecipeError: the map names a block that is not there.

    """
    if not layer_map:
        return tuple(
            (block, min(teacher, max(1, math.floor(block * teacher / student + 0.5))))
            for block in range(1, student + 1)
        )
    pairs = tuple((int(a), int(b)) for a, b in (pair.split(":") for pair in layer_map.split(",")))
    for a, b in pairs:
        if not (1 <= a <= student and 1 <= b <= teacher):
            raise RecipeError(
                f"layer_map={layer_map!r} pairs {a}:{b}, but {what} come from {student} blocks of the student"
                f" and {teacher} of the teacher, counted from 1"
            )
    return pairs


def check_shapes(mine: Tensor, yours: Tensor, what: str, other: str, option: str) -> None:
    """Refuse to compare tensors of different shapes."""
    if mine.shape[1:] != yours.shape[1:]:
        raise CompressionError(
            f"{what} are {tuple(mine.shape[1:])} an item and those of {other} {tuple(yours.shape[1:])}: they"
            f" cannot be compared where widths or heads were removed or differ; set {option}=0, or pair other"
            " blocks by layer_map"
        )


def inner_loss(
    student: SeenStates,
    teacher: SeenStates,
    pairs: Pairs,
    masks: Sequence[Tensor],
    *,
    hidden_weight: float,
    attention_weight: float,
    share: Callable[[Tensor], Tensor | float] = lambda _states: 1.0,
) -> Tensor:
    """Return hidden_weight * the mean distance of hidden states + attention_weight * that of attention maps,
    a scalar; each mean is over its pairs.

    `share` is of states or maps, what their distance is multiplied by: see `share_of`.
    """
    total = student.logits.new_zeros((), dtype=torch.float32)
    for weight, groups, distance in (
        (hidden_weight, STATES, state_loss),
        (attention_weight, MAPS, attention_loss),
    ):
        terms = [
            distance(student.inside[name][a], teacher.inside[name][b], masks) * share(teacher.inside[name][b])
            for name in groups
            if name in pairs
            for a, b in pairs[name]
        ]
        if terms and weight:
            total = total + weight * torch.stack(terms).mean()
    return total


def share_of(part: Items, whole: Items | None) -> Callable[[Tensor], Tensor | float]:
    """Return a function of states that gives the factor, a scalar, of their distance over a part of a batch,
    so that all parts, weighted by their labels, add up to that of the `whole` (None: it is it).
    """
    if whole is None:
        return lambda _states: 1.0
    labels = (part.labels != -100).sum() / (whole.labels != -100).sum()

    def share(states: Tensor) -> Tensor:
        shape = (
            (len(part), states.shape[-2] if states.ndim == 4 else states.shape[1])
            if states.ndim > 2
            else (len(part),)
        )
        mine, all_of_it = (
            [mask for mask in padding_masks(items) if mask.shape == (len(items), *shape[1:])]
            for items in (part, whole)
        )
        positions = (
            (mine[0] != 0).sum() / (all_of_it[0] != 0).sum() if mine else torch.tensor(len(part) / len(whole))
        )
        return positions.to(labels.device) / labels

    return share


def padding_masks(items: Items) -> tuple[Tensor, ...]:
    """Return the masks [N, L] that may say which tokens are padding: the items' own, and where their labels
    are not scored.
    """
    given = items.inputs.get("attention_mask")
    own = () if given is None else (given.flatten(0, -2),)
    return (*own, items.labels != -100) if items.labels.ndim == 2 else own
