"""The teacher's answers: computed when they are asked for, or once for each training item and kept within a
stated budget.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.distillation.hidden_states import SeenStates
from workbench.compress.distillation.teacher_tables import AnswerTable, DiskTable, MemoryTable
from workbench.tasks.base import Items
from workbench.util.hooks import of_this_thread

Compute = Callable[[Items], SeenStates]


@dataclass
class TeacherCache:
    """What a teacher shows for training items, in consecutive chunks of `chunk` items that are computed at
    first need; mutable.

    An item is always computed with the same neighbours, so that what is read does not depend on what was read
    before. Everything is kept in the type that the teacher computes in, on its device, or where a `folder` is
    given in files there: the same bits. Where `head` is given, what is kept is its input, the last hidden
    states, and logits are made from it again: `slice_last` leaves out the last position, as a language
    model's do.
    """

    compute: Compute
    training: Items
    chunk: int
    head: nn.Module | None = None
    slice_last: bool = False
    precision: torch.dtype | None = None  # of the head's arithmetic under autocast, None without it
    folder: Path | None = None
    by_item: bool = True  # whether all that is shown has one row for each item; else nothing can be kept
    tables: dict[str, AnswerTable] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)

    @torch.no_grad()
    def look_up(self, index: Tensor) -> SeenStates:
        """Return the teacher's answers to training items `index` (int64 [N], on the CPU).

        Raises:
            OSError: the disk is full; nothing is kept any more then.
        """
        try:
            for place in sorted(set((index // self.chunk).tolist()) - self.filled):
                self.fill(place)
        except OSError:
            self.tables.clear()  # gives the space back
            self.filled.clear()
            raise
        return self.unpacked({name: table.take(index) for name, table in self.tables.items()})

    def fill(self, place: int) -> None:
        """Compute one chunk."""
        start = place * self.chunk
        stop = min(start + self.chunk, len(self.training))
        for name, values in self.fitting(self.training[start:stop]).items():
            if name not in self.tables:
                rows = len(self.training)
                self.tables[name] = (
                    MemoryTable.like(values, rows)
                    if self.folder is None
                    else DiskTable.like(self.folder, values, rows)
                )
            self.tables[name].put(start, values)
        self.filled.add(place)

    def fitting(self, items: Items) -> dict[str, Tensor]:
        """Return the tensors to keep of the answers to some items, as `packed`; computed half by half where
        memory runs out.

        Raises:
            torch.OutOfMemoryError: not even one item fits.
        """
        try:
            return self.packed(items)
        except torch.OutOfMemoryError:
            if len(items) == 1:
                raise
        half = len(items) // 2
        first, second = self.fitting(items[:half]), self.fitting(items[half:])
        return {name: torch.cat([values, second[name]]) for name, values in first.items()}

    def packed(self, items: Items) -> dict[str, Tensor]:
        """Return the tensors to keep of the teacher's answers, [items, ...] by name: `logits` or `states`,
        and what is inside as `group/place`.
        """
        seen, states, _ = watched(self.compute, self.head, items)
        kept = {"logits": seen.logits} if states is None else {"states": states}
        return kept | {
            f"{name}/{place}": value
            for name, values in seen.inside.items()
            for place, value in enumerate(values)
        }

    def unpacked(self, kept: dict[str, Tensor]) -> SeenStates:
        """Return the teacher's answers from what `packed` kept."""
        logits = kept["logits"] if self.head is None else self.replay(kept["states"])
        inside: dict[str, list[Tensor]] = {}
        for name, values in kept.items():
            group, slash, _ = name.partition("/")
            if slash:
                inside.setdefault(group, []).append(values)
        return SeenStates(logits, {group: tuple(places) for group, places in inside.items()})

    def replay(self, states: Tensor) -> Tensor:
        """Return the logits [items, ..., classes] that the head makes of the states [items, ..., width] that
        it was given, in the arithmetic of then.
        """
        assert self.head is not None  # noqa: S101  for the type checker: states are kept only with a head
        mixed = self.precision is not None
        with torch.autocast(states.device.type, self.precision) if mixed else nullcontext():
            logits: Tensor = self.head(states)
        return logits[:, :-1] if self.slice_last else logits

    @property
    def nbytes(self) -> int:
        """Return the bytes that are held now, in memory or on disk."""
        return sum(table.nbytes for table in self.tables.values())


def watched(
    compute: Compute, head: nn.Module | None, items: Items
) -> tuple[SeenStates, Tensor | None, torch.dtype | None]:
    """Return a teacher's answers, the states that its output head was given ([N, L, width]), None without a
    head, and the type of the head's arithmetic where autocast chose one.
    """
    given: list[tuple[Tensor, torch.dtype | None]] = []

    def note(_head: nn.Module, args: tuple[Tensor, ...]) -> None:
        kind = args[0].device.type
        given.append((args[0], torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None))

    hook = None if head is None else head.register_forward_pre_hook(of_this_thread(note))
    try:
        seen = compute(items)
    finally:
        if hook is not None:
            hook.remove()
    states, precision = given[-1] if given else (None, None)
    return seen, states, precision


@torch.no_grad()
def teacher_cache(
    compute: Compute, teacher: nn.Module, training: Items, chunk: int
) -> tuple[TeacherCache, int]:
    """Return an empty cache of what `teacher` shows for `training`, and the bytes that it will take.

    Last hidden states are kept instead of logits where these are larger, as with a large vocabulary, and
    where the teacher's output head alone makes its logits from them (no scaling or capping after it): this is
    tried on one item.
    """
    head = output_layer(teacher)
    seen, states, precision = watched(compute, head, training[:1])
    shown = [value for values in seen.inside.values() for value in values]
    inside = sum(value.nbytes for value in shown)
    if states is not None and states.shape[0] == 1 and states.nbytes < seen.logits.nbytes:
        for slice_last in (False, True):
            cache = TeacherCache(compute, training, chunk, head, slice_last, precision)
            again = cache.replay(states)
            if again.shape == seen.logits.shape and torch.allclose(
                again.float(), seen.logits.float(), rtol=1e-3, atol=1e-3
            ):
                return cache, len(training) * (states.nbytes + inside)
    by_item = all(len(value) == 1 for value in (seen.logits, *shown))
    return TeacherCache(compute, training, chunk, by_item=by_item), len(training) * (
        seen.logits.nbytes + inside
    )


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the module that makes a language model's logits, None where it names none."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None
