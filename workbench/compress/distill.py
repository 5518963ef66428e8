"""Distill: train the compressed model to answer like the dense one, keeping every promise."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from workbench.compress.training import Plan, train
from workbench.compress.work import Work
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import METHODS, About, Step, configuration
from workbench.tasks.base import Items, Losses
from workbench.tasks.choosing import Choosing


@configuration
class Distill(Step):
    """Train against the dense model's logits: alpha * T^2 * KL(teacher || student at T) + (1 - alpha) * cross entropy.

    (Hinton, Vinyals & Dean 2015.) A sentence encoder has vectors, not logits: alpha * (1 - cosine to the teacher's) +
    (1 - alpha) * the squared error of the pair's cosine, where T has no effect. Adam with a cosine schedule over all weights
    that the recipe left free. Pruned weights stay zero. Weights on a grid keep their scales: the gradient passes straight through the rounding (Bengio et al. 2013)
    to a hidden copy, and the codes follow it.

    What it does not do: learn scales, match hidden states, move batch-norm statistics or use dropout (the student trains in
    eval mode), keep the best step rather than the last, or see more data than the task's training items.
    """

    slider: ClassVar[str] = "temperature"
    position: ClassVar[int] = 40
    stops: ClassVar[tuple[float, ...]] = (1.0, 2.0, 4.0)
    added: ClassVar[tuple[str, ...]] = ("stop_at",)
    about: ClassVar[tuple[About, ...]] = (
        About("temperature, alpha", "Hinton et al. 2015; Bengio et al. 2013 (rounding)", "nothing", "training", "learns no scales, matches no hidden states"),
    )  # fmt: skip

    temperature: Annotated[float, Field(gt=0, le=100, description="softens both distributions; 1 leaves them as they are")] = 2.0
    alpha: Annotated[float, Field(ge=0, le=1, description="weight of the teacher's answers against the true labels")] = 0.9
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="optimizer steps")] = 60
    learning_rate: Annotated[float, Field(gt=0, le=1, description="peak learning rate of Adam")] = 5e-4
    distill_batch: Annotated[int, Field(ge=1, le=65536, description="training items per step")] = 64
    stop_at: Annotated[int, Field(ge=0, le=1_000_000, description="end after so many steps of the schedule; 0 runs all")] = 0

    @model_validator(mode="after")
    def stops_on_the_way(self) -> Distill:
        """Refuse to stop after the last step."""
        if self.stop_at > self.steps:
            raise ValueError(f"stop_at={self.stop_at} lies beyond steps={self.steps}: give 0 to run all steps")
        return self

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse distilling a dense model from itself."""
        if not earlier:
            raise RecipeError("Distill cannot come first: the student would still be its teacher, with nothing to recover; put it after Prune, LowRank or Quantize")

    def label(self) -> str:
        """Return such as `distilled T2`, with the step where it was stopped."""
        return f"distilled T{self.temperature:g}" + (f" to step {self.stop_at}" if self.stop_at else "")


@METHODS.register(Distill)
def distill(step: Distill, work: Work) -> Distill:
    """Train the free weights of `work.model`; targets limit which layers' weights may move. Returns the step as it was done."""
    work.check_targets(step)
    layers = [layer for layer in work.layers.values() if step.takes(*layer.names)]
    if not layers:
        raise CompressionError(f"{step!r} finds no layer that it can train: {', '.join(step.targets)}")

    def objective(items: Items) -> Tensor:
        with torch.no_grad():
            wanted = work.task.kind.logits(work.task.model, items)
        return distillation_loss(work.task.kind.logits(work.model, items), wanted, items.labels, step.temperature, step.alpha, kind=work.task.kind)

    advice = f"lower learning_rate={step.learning_rate:g}"
    plan = Plan("distill", "distillation", advice, step.steps, step.learning_rate, step.distill_batch, step.seed, step.stop_at)
    trained = train(step, work, layers, plan, objective)
    if trained.ended:
        step = dataclasses.replace(step, stop_at=trained.steps)  # what was really done, and gives the same bits again
    words = f"distilled {step.stop_at or step.steps} steps at T={step.temperature:g}"
    for layer in layers:
        work.took(step, layer, words)
    for name in work.left if step.everything else ():  # embeddings and shared weights learn too
        work.say(name, words if step.takes(name) else f"distill left out by target {step.excluded(name)!r}")
    for layer in work.layers.values():
        if step.excluded(*layer.names) is not None:
            work.say(layer, f"distill left out by target {step.excluded(*layer.names)!r}")
    return step


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, *, kind: Losses | None = None) -> Tensor:
    """Return the scalar loss of the outputs of a `kind` of task; None: logits [..., classes] and labels [...], -100 is left out."""
    losses = kind or Choosing()
    return alpha * losses.soft_loss(student, teacher, labels, temperature) + (1 - alpha) * losses.loss(student, labels)
