"""Teachers as a training asks them: their answers are computed at each step, or once, and kept within what is
allowed of memory and disk.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.compress.core.context import Work
from workbench.compress.distillation.hidden_states import SeenStates
from workbench.compress.distillation.teacher_cache import Compute, TeacherCache, teacher_cache
from workbench.compress.distillation.teacher_tables import disk_folder, free_bytes
from workbench.compress.training.plan import Drawn
from workbench.errors import CompressionError

MB = 2**20


@dataclass(frozen=True)
class Teacher:
    """Whom a training asks.

    `compute` shows what `model` answers, without gradients; `view` is all that this depends on besides model
    and items.

    `compute` may be kept longer than a training lasts: it must not hold a model that is not held anyway.
    """

    name: str
    model: nn.Module
    compute: Compute
    view: Hashable


@dataclass(frozen=True)
class Allowance:
    """Room for the answers to all training items, of all teachers together: MB (2**20 bytes) in memory, or
    else on disk; 0 and 0 keep nothing.

    The training asks for `steps` times `batch` items; `option` is how the names of both options begin.
    """

    memory_mb: int
    disk_mb: int
    steps: int
    batch: int
    option: str

    @property
    def given(self) -> str:
        """Return the options that the user gave, such as `teacher_cache_mb=5`, with the verb that follows."""
        given = [
            f"{name}={value}"
            for name, value in (
                (f"{self.option}_mb", self.memory_mb),
                (f"{self.option}_disk_mb", self.disk_mb),
            )
            if value
        ]
        return f"{' and '.join(given)} {'are' if len(given) > 1 else 'is'}"


@dataclass(frozen=True)
class Shelf:
    """What is kept of one teacher: whose answers these are, where they are read from, and the bytes that all
    of them take.
    """

    of: weakref.ref[nn.Module]
    cache: TeacherCache
    size: int

    def fits(self, teacher: Teacher, work: Work) -> bool:
        """Return whether these are this very model's answers to these very items: another one may have come
        under its name.
        """
        return self.of() is teacher.model and self.cache.training is work.task.training

    def emptied(self, *, on_disk: bool) -> Shelf:
        """Return an empty one for the same answers."""
        return dataclasses.replace(
            self,
            cache=dataclasses.replace(
                self.cache, folder=disk_folder() if on_disk else None, tables={}, filled=set()
            ),
        )


class Asked:
    """Teachers, and what is kept of their answers; call it with training items.

    What is kept does not depend on the recipe, on a temperature or on how several teachers are averaged: each
    one's answers are kept as they are, with the statistics of the task, and the next training finds them
    there. All that is kept so, also by earlier trainings, stays within what this one allows: what was used
    longest ago goes first.
    """

    def __init__(self, teachers: list[Teacher], work: Work, allowance: Allowance) -> None:
        """Find out whether the answers can be kept; why not is told in the warnings."""
        self.teachers, self.work, self.allowance = teachers, work, allowance
        self.shelves = self.found() if teachers and (allowance.memory_mb or allowance.disk_mb) else []

    def __call__(self, drawn: Drawn) -> list[SeenStates]:
        """Return each teacher's answers to training items: as they were kept, or computed now."""
        if self.shelves:
            try:
                return [shelf.cache.look_up(drawn.index) for shelf in self.shelves]
            except OSError as error:
                self.shelves = []
                self.work.warnings.append(
                    f"the teacher's answers can no longer be kept in {disk_folder()}:"
                    f" {error.strerror or error}; from here on they are computed at each step"
                )
        return [teacher.compute(drawn) for teacher in self.teachers]

    def check(self, answers: list[SeenStates], loss: Tensor) -> None:
        """Refuse a teacher whose answers are the reason that a loss is not finite.

        Raises:
            CompressionError: with its name.

        """
        if not torch.isfinite(loss):
            for teacher, seen in zip(self.teachers, answers, strict=True):
                check_finite(
                    teacher.name, seen.logits, *(state for states in seen.inside.values() for state in states)
                )

    def found(self) -> list[Shelf]:
        """Return the shelf of each teacher; none where keeping does not pay, or not all fit."""
        allowed, count = self.allowance, len(self.work.task.training)
        if allowed.steps * allowed.batch < count:
            return self.refused(
                f"not used: {allowed.steps} steps of {allowed.batch} items read fewer than the {count}"
                " training items"
            )
        statistics, task = self.work.statistics, self.work.task
        kept_before: dict[Hashable, Shelf] = (
            statistics.once("teachers' answers", dict) if statistics.task is task else {}
        )
        shelves = [self.shelf(kept_before, teacher, on_disk=False) for teacher in self.teachers]
        if any(not shelf.cache.by_item for shelf in shelves):
            return self.refused("not used: what the teacher shows has not one row for each item")
        size = sum(shelf.size for shelf in shelves)
        if size <= allowed.memory_mb * MB:
            return self.kept(kept_before, shelves, on_disk=False)
        if size > allowed.disk_mb * MB:
            return self.refused(
                f"too little for the teacher's answers to {count} training items, {-(-size // MB)} MB: they"
                " are computed at each step"
            )
        shelves = [self.shelf(kept_before, teacher, on_disk=True) for teacher in self.teachers]
        free, written = free_bytes(disk_folder()), sum(shelf.cache.nbytes for shelf in shelves)
        if size - written > free:
            self.work.warnings.append(
                f"{allowed.option}_disk_mb={allowed.disk_mb} is not used: the teacher's answers take"
                f" {-(-size // MB)} MB, and {disk_folder()} has {free // MB} MB free; they are computed at"
                " each step"
            )
            return []
        return self.kept(kept_before, shelves, on_disk=True)

    def refused(self, reason: str) -> list[Shelf]:
        """Say why nothing is kept."""
        self.work.warnings.append(f"{self.allowance.given} {reason}")
        return []

    def shelf(self, kept_before: dict[Hashable, Shelf], teacher: Teacher, *, on_disk: bool) -> Shelf:
        """Return the shelf of a teacher there, an empty one where there is none that fits, which is kept from
        now on.
        """
        key, elsewhere = ((place, teacher.name, teacher.view) for place in (on_disk, not on_disk))
        shelf = kept_before.get(key)
        if shelf is None or not shelf.fits(teacher, self.work):
            shelf = kept_before.get(elsewhere)
            if shelf is None or not shelf.fits(teacher, self.work):
                shelf = Shelf(
                    weakref.ref(teacher.model),
                    *teacher_cache(
                        teacher.compute, teacher.model, self.work.task.training, self.work.task.batch_size
                    ),
                )
            kept_before[key] = shelf = shelf.emptied(on_disk=on_disk)
        return shelf

    def kept(self, kept_before: dict[Hashable, Shelf], shelves: list[Shelf], *, on_disk: bool) -> list[Shelf]:
        """Return the shelves, kept from now on as those used last.

        What was used longest ago goes until the rest is within the allowance.
        """
        mine: dict[Hashable, Shelf] = {
            (on_disk, teacher.name, teacher.view): shelf
            for teacher, shelf in zip(self.teachers, shelves, strict=True)
        }
        others = {key: shelf for key, shelf in kept_before.items() if key not in mine}
        left = {
            place: megabytes * MB - sum(shelf.size for shelf in shelves) * (place == on_disk)
            for place, megabytes in ((False, self.allowance.memory_mb), (True, self.allowance.disk_mb))
        }
        staying: list[tuple[Hashable, Shelf]] = []
        for key, shelf in reversed(others.items()):
            place = shelf.cache.folder is not None
            left[place] -= shelf.cache.nbytes
            if left[place] >= 0:
                staying.append((key, shelf))
        kept_before.clear()
        kept_before.update([*reversed(staying), *mine.items()])  # what was used longest ago comes first
        return shelves


def check_finite(name: str, *answers: Tensor) -> None:
    """Refuse a teacher whose answers hold NaN or infinity.

    Raises:
        CompressionError: with its name.

    """
    for answer in answers:
        wrong = int((~torch.isfinite(answer)).sum())
        if wrong:
            raise CompressionError(
                f"teacher {name!r} answers with numbers that are not finite ({wrong} of {answer.numel()}):"
                " nothing can be learned from them; check its weights and the training items, or load it in"
                " float32"
            )
