"""What flows between blocks: where it is read in a student and in its teacher, and which points of it are
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from workbench.compress.distillation.projection import layer_map
from workbench.compress.pruning.prunable_units import find_blocks
from workbench.errors import CompressionError
from workbench.tasks.base import Items
from workbench.util.hooks import of_this_thread


@dataclass(frozen=True)
class Pair:
    """A block of the student and the block of the teacher whose output is its aim, by name."""

    student: str
    teacher: str


def paired_blocks(student: nn.Module, dense: nn.Module, teacher: nn.Module, *, last: bool) -> list[Pair]:
    """Return which blocks belong together, in the lists of blocks that both have under one name.

    With `last` only the last of each list.

    `dense` is what the student was made from: its lists are found there, since factors and removed heads hide
    what they are.

    Raises:
        CompressionError: no list of blocks in common.
    """
    mine, theirs = find_blocks(dense), find_blocks(teacher)
    pairs = []
    for name in mine:
        if name in theirs:
            lengths = (len(list(model.get_submodule(name).children())) for model in (student, teacher))
            matches = layer_map(*lengths)
            pairs += [
                Pair(f"{name}.{own}", f"{name}.{aim}") for own, aim in (matches[-1:] if last else matches)
            ]
    if not pairs:
        raise CompressionError(
            "hidden states cannot be aligned: the student's blocks are in"
            f" {', '.join(mine) or 'no list that is known'}, the teacher's in"
            f" {', '.join(theirs) or 'no list that is known'}; use align='none', or a teacher of the same"
            " family"
        )
    return pairs


@contextmanager
def captured(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that holds, after a forward pass, what each of the named blocks passes on."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:  # noqa: ARG001  torch calls it so
            outputs[name] = out if isinstance(out, Tensor) else out[0]

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(of_this_thread(keep(name))).remove)
        yield outputs


def points(states: Tensor, items: Items) -> Tensor:
    """Return states as float32 [points, width]: tokens or frames that count, or the pixels of an image.

    states: [items, tokens, width] or [items, channels, rows, columns]. A token counts where its label does;
    where states are not aligned with labels, where the attention mask says so; where that is not aligned
    either, always.
    """
    if states.ndim == 4:
        return states.float().movedim(1, -1).flatten(0, 2)
    if states.ndim != 3:
        return states.float().flatten(0, -2)
    counted = which(states.shape[1], items)
    return states.float().flatten(0, 1) if counted is None else states[counted].float()


def which(length: int, items: Items) -> Tensor | None:
    """Return which of `length` tokens or frames of each item count, bool [N, length]; None for all."""
    mask = items.inputs.get("attention_mask")
    if items.labels.ndim == 2 and items.labels.shape[1] == length:
        return items.labels != -100
    if (
        mask is not None and mask.ndim == 2 and mask.shape[1] % length == 0
    ):  # an encoder of sound makes one frame of a few
        return mask[:, :: mask.shape[1] // length] != 0
    return None


def count_points(states: Tensor, counted_points: Tensor, items: Items, whole: Items) -> Tensor | float:
    """Return how many points a whole batch has, of which `items` are a part with `states` and the points
    `counted_points`.
    """
    counted = which(states.shape[1], whole) if states.ndim == 3 else None
    return len(counted_points) / len(items) * len(whole) if counted is None else counted.sum()


def check_points(pair: Pair, student: Tensor, teacher: Tensor) -> None:
    """Refuse states [points, width] that cannot be compared point by point."""
    if len(student) != len(teacher):
        raise CompressionError(
            f"hidden states cannot be aligned: {pair.student!r} passes on {len(student)} points where"
            f" {pair.teacher!r} of the teacher has {len(teacher)}; use align='none', or a teacher that reads"
            " inputs as finely"
        )
