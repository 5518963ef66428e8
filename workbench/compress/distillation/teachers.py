"""The teachers of a student: the dense model, others from the zoo, and what several of them say together."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor, nn

from workbench.compress.core.context import Work
from workbench.compress.distillation.aligned_states import captured
from workbench.compress.distillation.hidden_states import SeenStates
from workbench.compress.distillation.teacher_cache import Compute
from workbench.compress.distillation.teacher_outputs import check_finite
from workbench.errors import CompressionError, RecipeError
from workbench.modules.offload import device_of
from workbench.tasks.base import Items, Kind

DENSE = "dense"  # the name of the model that is being compressed


def names_of(teachers: str) -> list[str]:
    """Return the names in a comma-separated list.

    Raises:
        RecipeError: none, an empty one, or one twice.

    """
    names = [name.strip() for name in teachers.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise RecipeError(
            f"teachers={teachers!r} should name each teacher once, with commas between them: {DENSE!r} for"
            " the dense model, or models of the zoo, such as 'dense,fashion-cnn'"
        )
    return names


def loaded(names: list[str], work: Work) -> list[nn.Module]:
    """Return the teachers, each loaded once a bench.

    Raises:
        ModelError: see `workbench.zoo.teachers.load_teacher`.
        CompressionError: a teacher cannot run the student's items, answers in another shape, or with NaN.

    """
    models = [
        work.task.model
        if name == DENSE
        else work.statistics.once(("teacher", name), partial(other, name, work))
        for name in names
    ]
    items = work.task.calibration[:1].to(next(work.model.parameters()).device)
    with torch.no_grad():
        mine = work.task.kind.logits(work.model, items).shape
        for name, teacher in zip(names, models, strict=True):
            try:
                answer = work.task.kind.logits(teacher, items)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise CompressionError(
                    f"teacher {name!r} cannot read what {work.task.model_name!r} reads:"
                    f" {' '.join(str(error).split())[:200]}"
                ) from None
            if answer.shape != mine:
                raise CompressionError(
                    f"teacher {name!r} answers in the shape {list(answer.shape)}, the student in"
                    f" {list(mine)}: give a teacher with the same classes or vocabulary"
                )
            check_finite(name, answer)
    return models


def showing(kind: Kind, model: nn.Module, blocks: tuple[str, ...], *, answers: bool) -> Compute:
    """Return a function of items, which does not keep the model in memory, that shows its logits (none of
    each item without `answers`) and what `blocks` pass on.
    """
    there = weakref.ref(model)

    @torch.no_grad()
    def compute(items: Items) -> SeenStates:
        teacher = there()
        assert teacher is not None  # noqa: S101  for the type checker: whoever trains with a teacher holds it
        with captured(teacher, list(blocks)) as states:
            logits = kind.logits(teacher, items.to(device_of(teacher)))
        return SeenStates(
            logits if answers else logits[..., :0],
            {"aims": tuple(states[block] for block in blocks)} if blocks else {},
        )

    return compute


def other(name: str, work: Work) -> nn.Module:
    """Return a model of the zoo, on the student's device."""
    from workbench.zoo.teachers import load_teacher

    return load_teacher(name, work.task, next(work.model.parameters()).device)


def together(kind: Kind, answers: list[Tensor], temperature: float) -> Tensor:
    """Return the outputs [items, ...] of one teacher, or what stands for several: logits whose softmax at T
    is the mean of theirs; of vectors the mean direction.
    """
    if len(answers) == 1:
        return answers[0]
    return kind.together(torch.stack([answer.float() for answer in answers]), temperature)
