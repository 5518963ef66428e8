"""Distill: train the compressed model to answer like the dense one, keeping every promise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from workbench.compress.core.context import Work
from workbench.compress.distillation.hidden_states import (
    Pairs,
    SeenStates,
    inner_loss,
    padding_masks,
    pair_up,
    see,
    share_of,
    showing_attention,
)
from workbench.compress.distillation.losses import Divergence, divergence_loss
from workbench.compress.distillation.options import Distill
from workbench.compress.distillation.teacher_outputs import Allowance, Asked, Teacher, check_finite
from workbench.compress.method import TRAINING, Recovery
from workbench.compress.registry import METHODS
from workbench.compress.training.plan import Drawn, Plan, Trained, identity
from workbench.compress.training.trainer import train
from workbench.errors import CompressionError
from workbench.modules.layer import Layer
from workbench.tasks.base import Items, Kind, Losses

__all__ = ["Distill", "distill"]


@METHODS.register(
    Distill,
    title="temperature",
    shapes=lambda outline, _: outline,  # training moves values, not shapes
    errors=lambda _: Recovery(0.0, 1.0),  # how much comes back, no rule says
    strength=lambda temperature: 0.5 + 0.05 * math.log2(temperature),
    trains=lambda _: True,
    placed=lambda _: TRAINING,
    reads=lambda _: frozenset(),
    alone=False,
)
def distill(step: Distill, work: Work) -> Distill:
    """Train the free weights of `work.model`; targets limit which layers' weights may move.

    Returns the step as it was done.
    """
    work.check_targets(step)
    layers = [layer for layer in work.layers.values() if step.takes(*layer.names)]
    if not layers:
        raise CompressionError(f"{step!r} finds no layer that it can train: {', '.join(step.targets)}")
    if step.divergence != "forward" and work.task.kind.outputs != "distributions":
        raise CompressionError(
            f"divergence={step.divergence!r} compares distributions, and a model of {work.task.kind.name}"
            f" answers with {work.task.kind.outputs}: take divergence='forward'"
        )
    with showing_attention(work.model, work.task.model) if step.attention_weight else nullcontext():
        lesson = Lesson(step, work)
        plan = Plan(
            "distill",
            "distillation",
            f"lower learning_rate={step.learning_rate:g}",
            step.steps,
            step.learning_rate,
            step.distill_batch,
            step.seed,
            step.stop_at,
            accumulate=step.accumulate,
            look_every=step.look_every,
            checkpoint_every=step.checkpoint_every,
            identity=identity(step),
            widen=step.train_precision == "mixed",
        )
        trained = train(step, work, layers, plan, lesson.loss)
    if trained.ended:
        step = dataclasses.replace(
            step, stop_at=trained.steps
        )  # what was really done, and gives the same bits again
    report(step, work, layers, trained)
    return step


def report(step: Distill, work: Work, layers: list[Layer], trained: Trained) -> None:
    """Write into the report what was trained, and what a target left out."""
    outcome = f"distilled {trained.steps} steps at T={step.temperature:g}{trained.words()}"
    for layer in layers:
        work.took(step, layer, outcome)
    for name in work.left if step.everything else ():  # embeddings and shared weights learn too
        work.say(name, outcome if step.takes(name) else f"distill left out by target {step.excluded(name)!r}")
    for layer in work.layers.values():
        if step.excluded(*layer.names) is not None:
            work.say(layer, f"distill left out by target {step.excluded(*layer.names)!r}")


@dataclasses.dataclass(frozen=True)
class Eye:
    """How a model is looked at in a lesson: what it shows besides logits, and whether it computes in mixed
    precision.
    """

    kind: Kind
    states: bool
    maps: bool
    mixed: bool

    def see(self, model: nn.Module, items: Items) -> SeenStates:
        """Return the logits, states and maps that a model shows for items on its device."""
        with self.arithmetic():
            return see(self.kind, model, items, states=self.states, maps=self.maps)

    def arithmetic(self) -> AbstractContextManager[object]:
        """Return in what precision forward passes compute."""
        return torch.autocast("cuda", torch.bfloat16) if self.mixed else nullcontext()

    def teacher(self, model: nn.Module) -> Callable[[Items], SeenStates]:
        """Return a function of items that shows what a teacher answers, without gradients."""
        device = next(model.parameters()).device

        @torch.no_grad()
        def answers(items: Items) -> SeenStates:
            return self.see(model, items.to(device))

        return answers


class Lesson:
    """What a student is taught at each step: its teacher's answers, and how far it is from them."""

    def __init__(self, step: Distill, work: Work) -> None:
        """Check on one item that student and teacher can be compared, and find out whether the teacher's
        answers can be kept.

        Raises:
            CompressionError: hidden states or attention maps are asked for that are not there, or do not fit;
                the teacher answers with NaN.
            RecipeError: the layer map names a block that is not there.
        """
        self.step, self.work = step, work
        device = next(work.model.parameters()).device
        mixed = step.train_precision == "mixed"
        self.eye = Eye(
            work.task.kind, step.hidden_weight > 0, step.attention_weight > 0, mixed and device.type == "cuda"
        )
        self.teacher = self.eye.teacher(work.task.model)
        self.pairs = self.fitting()
        check_finite(work.task.model_name, self.teacher(work.task.training[:1]).logits)
        teacher = Teacher(
            work.task.model_name,
            work.task.model,
            self.teacher,
            (self.eye.states, self.eye.maps, self.eye.mixed),
        )
        self.asked = Asked(
            [teacher],
            work,
            Allowance(
                step.teacher_cache_mb,
                step.teacher_cache_disk_mb,
                step.steps,
                step.distill_batch,
                "teacher_cache",
            ),
        )
        if mixed and not self.eye.mixed:
            work.warnings.append(
                f"train_precision='mixed' saves nothing on {device.type}: weights are held, and the"
                " arithmetic is done, in float32"
            )

    def loss(self, drawn: Drawn) -> Tensor:
        """Return the loss of some training items, a scalar."""
        step = self.step
        (wanted,) = answers = self.asked(drawn)
        seen = self.eye.see(self.work.model, drawn)
        with self.eye.arithmetic():
            loss = distillation_loss(
                seen.logits,
                wanted.logits,
                drawn.labels,
                step.temperature,
                step.alpha,
                kind=self.eye.kind,
                divergence=step.divergence,
                skew=step.skew,
            )
            if self.pairs:
                loss = loss + inner_loss(
                    seen,
                    wanted,
                    self.pairs,
                    padding_masks(drawn),
                    hidden_weight=step.hidden_weight,
                    attention_weight=step.attention_weight,
                    share=share_of(drawn, drawn.whole),
                )
        self.asked.check(answers, loss)
        return loss

    @torch.no_grad()
    def fitting(self) -> Pairs:
        """Return which blocks of the student are matched with which of the teacher."""
        step, task, eye = self.step, self.work.task, self.eye
        if not eye.states and not eye.maps:
            return {}
        probe = task.training[:1]
        names = f"the compressed {task.model_name}", task.model_name
        return pair_up(
            eye.teacher(self.work.model)(probe),
            self.teacher(probe),
            step.layer_map,
            states=eye.states,
            maps=eye.maps,
            names=names,
        )


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    *,
    kind: Losses,
    divergence: Divergence = "forward",
    skew: float = 0.1,
) -> Tensor:
    """Return alpha * the divergence from the teacher + (1 - alpha) * the task's loss, a scalar, of outputs
    [items, ...] of a `kind` of task.

    Raises:
        CompressionError: student and teacher answer with different numbers of classes or tokens.
    """
    if student.shape != teacher.shape:
        raise CompressionError(
            f"the student answers with {tuple(student.shape)} and its teacher with {tuple(teacher.shape)}:"
            " they need the same vocabulary or label map"
        )
    return alpha * divergence_loss(
        kind, student, teacher, labels, temperature, divergence=divergence, skew=skew
    ) + (1 - alpha) * kind.loss(student, labels)
