"""QAT: train through the rounding, step sizes included, from the grid that Quantize found."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from workbench.compress.core.batch import Batch
from workbench.compress.core.context import Work
from workbench.compress.method import TRAINING, Recovery
from workbench.compress.registry import METHODS
from workbench.compress.training.plan import Plan
from workbench.compress.training.trainer import train
from workbench.errors import CompressionError, RecipeError
from workbench.formats.stored_forms import Cast
from workbench.modules.layer import Layer, find_layers
from workbench.recipe import Step, first_leaving
from workbench.tasks.base import Items
from workbench.util.about import About
from workbench.util.configuration import configuration


@configuration
class QAT(Step):
    """Quantization-aware training: weights, step sizes, and everything that is not rounded learn while the
    weights are rounded.

    The gradient passes straight through the rounding to hidden float32 weights (Bengio et al. 2013), and step
    sizes have the gradient of LSQ (Esser et al. 2020); zero points stay. It starts at the solution of
    Quantize, at any width, format and rounding: hidden weights begin at the dense ones wherever these round
    to the same codes, else at the rounded ones. `qat_loss` is the task's own loss, or the distance to the
    dense model's softened answers (Hinton et al. 2015). Adam with a cosine schedule; the logarithms of the
    step sizes move, so that they stay positive. Masks stay, and the end is a grid as Quantize leaves it.

    What it does not do: learn the ranges of activations (Activations before it are rounded as they were
    calibrated, and gradients pass through), move batch-norm statistics or use dropout, keep the best step
    rather than the last, or see more data than the task's training items.
    """

    slider: ClassVar[str] = "qat_steps"
    position: ClassVar[int] = 38
    aside: ClassVar[bool] = True
    stops: ClassVar[tuple[float, ...]] = (100, 400)
    about: ClassVar[tuple[About, ...]] = (
        About(
            "qat_steps, qat_step_rate",
            "LSQ, Esser et al. 2020; Bengio et al. 2013",
            "nothing",
            "training",
            "learns no zero points and no ranges of activations",
        ),
        About(
            "qat_loss=distillation",
            "Hinton et al. 2015",
            "nothing",
            "training, and the dense model's answers",
            "needs no labels, and repeats the dense model's mistakes",
        ),
    )

    qat_steps: Annotated[int, Field(ge=1, le=1_000_000, description="optimizer steps")] = 200
    qat_loss: Annotated[
        Literal["distillation", "task"],
        Field(
            description=(
                "what is made small: the distance to the dense model's answers, or the task's own loss"
            )
        ),
    ] = "distillation"
    qat_temperature: Annotated[
        float, Field(gt=0, le=100, description="softens both models' answers in the distillation loss")
    ] = 2.0
    qat_rate: Annotated[float, Field(gt=0, le=1, description="peak learning rate of Adam for weights")] = 1e-3
    qat_step_rate: Annotated[
        float,
        Field(ge=0, le=1, description="the same for logarithms of step sizes; 0 leaves them as they are"),
    ] = 3e-4
    qat_batch: Annotated[int, Field(ge=1, le=65536, description="training items per step")] = 64
    qat_stop_at: Annotated[
        int, Field(ge=0, le=1_000_000, description="end after so many steps of the schedule; 0 runs all")
    ] = 0

    @model_validator(mode="after")
    def stops_on_the_way(self) -> QAT:
        """Refuse to stop after the last step."""
        if self.qat_stop_at > self.qat_steps:
            raise ValueError(
                f"qat_stop_at={self.qat_stop_at} lies beyond qat_steps={self.qat_steps}: give 0 to run all"
                " steps"
            )
        return self

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse where no grid is there to train on."""
        if first_leaving(earlier, "grid") is not None:
            return
        after = first_leaving(earlier, "cast")
        if after is None:
            raise RecipeError("QAT needs weights on a grid to start from: put Quantize before it")
        raise RecipeError(f"QAT has no step sizes to learn after {after!r}: take another format, or Distill")

    def label(self) -> str:
        """Return such as `QAT 200`, with the step where it was stopped."""
        return f"QAT {self.qat_steps}" + (f" to step {self.qat_stop_at}" if self.qat_stop_at else "")


@METHODS.register(
    QAT,
    title="QAT steps",
    shapes=lambda outline, _: outline,  # training moves values, not shapes
    errors=lambda _: Recovery(0.0, 1.0),  # how much comes back, no rule says
    strength=lambda steps: min(1.0, 0.25 * math.log10(1 + steps)),
    trains=lambda _: True,
    placed=lambda _: TRAINING,
    reads=lambda _: frozenset(),
    alone=False,
)
def qat(step: QAT, work: Work) -> QAT:
    """Train the layers that the targets pick, and what is not rounded if they begin with all.

    Returns the step as it was done.
    """
    work.check_targets(step)
    layers = [layer for layer in work.layers.values() if step.takes(*layer.names)]
    gridded = [layer for layer in layers if layer.grid is not None and not isinstance(layer.grid, Cast)]
    if not gridded:
        raise CompressionError(
            f"{step!r} finds no layer on a grid that it can train: {', '.join(step.targets)}"
        )

    def objective(items: Items) -> Tensor:
        logits = work.task.kind.logits(work.model, items)
        if step.qat_loss == "task":
            return work.task.kind.loss(logits, items.labels)
        with torch.no_grad():
            wanted = work.task.kind.logits(work.task.model, items)
        return work.task.kind.soft_loss(logits, wanted, items.labels, step.qat_temperature)

    advice = f"lower qat_rate={step.qat_rate:g} or qat_step_rate={step.qat_step_rate:g}"
    plan = Plan(
        "qat",
        "quantization-aware training",
        advice,
        step.qat_steps,
        step.qat_rate,
        step.qat_batch,
        step.seed,
        step.qat_stop_at,
        step_rate=step.qat_step_rate,
    )
    dense = find_layers(work.task.model)[0]
    trained = train(step, work, layers, plan, objective, start=lambda batch: start_of(batch, dense))
    if trained.ended:
        step = dataclasses.replace(
            step, qat_stop_at=trained.steps
        )  # what was really done, and gives the same bits again
    told(step, layers, work, trained.steps)
    return step


def told(step: QAT, layers: list[Layer], work: Work, steps: int) -> None:
    """Write into the report what was trained for how many steps, and what a target left out."""
    for layer in layers:
        on_grid = layer.grid is not None and not isinstance(layer.grid, Cast)
        work.took(
            step,
            layer,
            f"trained {steps} steps {'on its grid' if on_grid else 'along with the grids of others'} by"
            f" {step.qat_loss} loss",
        )
    for layer in work.layers.values():
        if step.excluded(*layer.names) is not None:
            work.say(layer, f"qat left out by target {step.excluded(*layer.names)!r}")


def start_of(batch: Batch, dense: dict[str, Layer]) -> Tensor:
    """Return the hidden weights [layers, rows, columns] to start from: the dense ones where they round to the
    codes that are there, else the rounded ones.
    """
    rounded = batch.matrices()
    wanted = torch.stack(
        [
            (
                matrix
                if layer.rank is not None or layer.role in {"first", "second"}
                else layer.left_of(dense[layer.origin].matrix()).to(matrix)
            )
            for layer, matrix in zip(batch.layers, rounded, strict=True)
        ]
    )
    form = batch.grids()
    return torch.where(form.snap(wanted).dequantize() == form.dequantize(), wanted, rounded)
