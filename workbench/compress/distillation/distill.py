"""Distill: train the compressed model to answer like the dense one, keeping every promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from workbench.compress.core.context import Work
from workbench.compress.distillation.hidden_states import (
    PAIRS,
    Pairs,
    Seen,
    inner_loss,
    padding_masks,
    pair_up,
    see,
    share_of,
    showing_attention,
)
from workbench.compress.distillation.losses import Divergence, divergence_loss
from workbench.compress.distillation.teacher_outputs import Allowance, Asked, Teacher, check_finite
from workbench.compress.registry import METHODS
from workbench.compress.training.trainer import Drawn, Plan, Trained, identity, train
from workbench.errors import CompressionError, RecipeError
from workbench.modules.layer import Layer
from workbench.recipe import About, Step, configuration
from workbench.tasks.base import Items, Kind, Losses
from workbench.tasks.likelihood import Choosing


@configuration
class Distill(Step):
    """Train against the dense model's logits: alpha * T^2 * KL(teacher || student at T) + (1 - alpha) * cross
    entropy.

    (Hinton, Vinyals & Dean 2015.) A sentence encoder has vectors, not logits: alpha * (1 - cosine to the
    teacher's) + (1 - alpha) * the squared error of the pair's cosine, where T has no effect. Adam with a
    cosine schedule over all weights that the recipe left free. Pruned weights stay zero. Weights on a grid
    keep their scales: the gradient passes straight through the rounding (Bengio et al. 2013) to a hidden
    copy, and the codes follow it.

    `divergence` turns the KL round or skews it. Hidden states and attention maps are matched where their
    weights are above 0, block by block as `layer_map` says; where widths or heads were removed they do not
    fit, and that is refused. A loss that is not finite ends the training at the best weights before it.

    A tenth of the training items, at most 256, are held out and looked at every `look_every` steps, and the
    weights of the best look are kept (lowest loss on them); with 0, no more `steps`, or fewer than 20
    training items, the last ones. The dense model may have seen these items when it was trained, so they
    flatter it more than the student. With `checkpoint_every` the training is saved to the user's cache
    directory, weights and two numbers a weight of Adam's, and the same recipe goes on from there to the same
    bits. Where little was lost, more items a step helped most
    (benchmarks/results/distillation-fashion-vit-rank.md).

    What it does not do: learn scales, move batch-norm statistics, use dropout (the student trains in eval
    mode), fit a projection between hidden states of different widths, or see more data than the task's
    training items.
    """

    slider: ClassVar[str] = "temperature"
    position: ClassVar[int] = 40
    stops: ClassVar[tuple[float, ...]] = (1.0, 2.0, 4.0)
    added: ClassVar[tuple[str, ...]] = (
        "stop_at",
        "divergence",
        "skew",
        "hidden_weight",
        "attention_weight",
        "layer_map",
        "teacher_cache_mb",
        "teacher_cache_disk_mb",
        "accumulate",
        "train_precision",
        "checkpoint_every",
    )
    about: ClassVar[tuple[About, ...]] = (
        About(
            "temperature, alpha",
            "Hinton et al. 2015; Bengio et al. 2013 (rounding)",
            "nothing; with teacher_cache_mb the dense model's answers",
            "training",
            "learns no scales",
        ),
        About(
            "divergence=reverse, skewed",
            "MiniLLM, Gu et al. 2024; DistiLLM, Ko et al. 2024",
            "nothing",
            "training",
            "trains on given text, not on what the student writes itself",
        ),
        About(
            "hidden_weight, attention_weight, layer_map",
            "FitNets, Romero et al. 2015; MobileBERT, Sun et al. 2020",
            "nothing",
            "training, with all hidden states or maps in memory",
            "needs equal widths and heads",
        ),
    )

    temperature: Annotated[
        float, Field(gt=0, le=100, description="softens both distributions; 1 leaves them as they are")
    ] = 2.0
    alpha: Annotated[
        float, Field(ge=0, le=1, description="weight of the teacher's answers against the true labels")
    ] = 0.9
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="optimizer steps")] = 60
    learning_rate: Annotated[float, Field(gt=0, le=1, description="peak learning rate of Adam")] = 3e-4
    distill_batch: Annotated[int, Field(ge=1, le=65536, description="training items per step")] = 64
    stop_at: Annotated[
        int, Field(ge=0, le=1_000_000, description="end after so many steps of the schedule; 0 runs all")
    ] = 0
    divergence: Annotated[
        Divergence, Field(description="KL(teacher || student), the other way round, or to a mixture of both")
    ] = "forward"
    skew: Annotated[float, Field(gt=0, lt=1, description="skewed: the teacher's share of the mixture")] = 0.1
    hidden_weight: Annotated[
        float,
        Field(
            ge=0,
            le=1000,
            description="weight of the relative squared error of hidden states; 0 leaves them out",
        ),
    ] = 0.0
    attention_weight: Annotated[
        float, Field(ge=0, le=1000, description="weight of the KL of attention maps; 0 leaves them out")
    ] = 0.0
    layer_map: Annotated[
        str,
        Field(
            description="which blocks are matched, as student:teacher from 1; empty spreads them evenly",
            examples=["1:1,2:2"],
        ),
    ] = ""
    teacher_cache_mb: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="memory for the teacher's answers, computed once if they fit; 0 computes them anew",
        ),
    ] = 0
    teacher_cache_disk_mb: Annotated[
        int,
        Field(
            ge=0,
            le=100_000_000,
            description=(
                "disk for the teacher's answers where that memory is too little, in the user's cache"
                " directory; removed at the end"
            ),
        ),
    ] = 0
    accumulate: Annotated[
        int,
        Field(ge=1, le=65536, description="parts that a step's items are worked through in, to save memory"),
    ] = 1
    train_precision: Annotated[
        Literal["model", "mixed"],
        Field(
            description="mixed: float32 weights, bfloat16 arithmetic on a GPU; model: the model's own type"
        ),
    ] = "model"
    look_every: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description=(
                "steps between looks at held-out items, the best of which is kept; 0 keeps the last step"
            ),
        ),
    ] = 20
    checkpoint_every: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description=(
                "steps between savings to disk that an interrupted training goes on from; 0 saves none"
            ),
        ),
    ] = 0

    @model_validator(mode="after")
    def stops_on_the_way(self) -> Distill:
        """Refuse to stop after the last step, to cut a batch into more parts than items, and a map that is
        none or maps nothing.
        """
        if self.stop_at > self.steps:
            raise ValueError(
                f"stop_at={self.stop_at} lies beyond steps={self.steps}: give 0 to run all steps"
            )
        if self.accumulate > self.distill_batch:
            raise ValueError(
                f"accumulate={self.accumulate} parts cannot be made of distill_batch={self.distill_batch}"
                " items"
            )
        if self.layer_map and not PAIRS.fullmatch(self.layer_map):
            raise ValueError(
                f"layer_map={self.layer_map!r} is not a list of student:teacher blocks such as '1:2,2:4'"
            )
        if self.layer_map and not self.hidden_weight and not self.attention_weight:
            raise ValueError(
                f"layer_map={self.layer_map!r} matches nothing while hidden_weight and attention_weight are"
                " 0: give one of them"
            )
        return self

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse distilling a dense model from itself."""
        if not earlier:
            raise RecipeError(
                "Distill cannot come first: the student would still be its teacher, with nothing to recover;"
                " put it after Prune, LowRank or Quantize"
            )

    def label(self) -> str:
        """Return such as `distilled T2`, with the step where it was stopped."""
        return f"distilled T{self.temperature:g}" + (f" to step {self.stop_at}" if self.stop_at else "")

    def unchanged(self) -> set[str]:
        """Return the options of later versions that are at what was done before these: there were no looks at
        first.
        """
        return super().unchanged() | ({"look_every"} if not self.look_every else set())


@METHODS.register(Distill)
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
    words = f"distilled {trained.steps} steps at T={step.temperature:g}{trained.words()}"
    for layer in layers:
        work.took(step, layer, words)
    for name in work.left if step.everything else ():  # embeddings and shared weights learn too
        work.say(name, words if step.takes(name) else f"distill left out by target {step.excluded(name)!r}")
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

    def see(self, model: nn.Module, items: Items) -> Seen:
        """Return what a model shows for items on its device."""
        with self.arithmetic():
            return see(self.kind, model, items, states=self.states, maps=self.maps)

    def arithmetic(self) -> AbstractContextManager[object]:
        """Return in what precision forward passes compute."""
        return torch.autocast("cuda", torch.bfloat16) if self.mixed else nullcontext()

    def teacher(self, model: nn.Module) -> Callable[[Items], Seen]:
        """Return a function of items that shows what a teacher answers, without gradients."""
        device = next(model.parameters()).device

        @torch.no_grad()
        def answers(items: Items) -> Seen:
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
        found = self.eye.see(self.work.model, drawn)
        with self.eye.arithmetic():
            loss = distillation_loss(
                found.logits,
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
                    found,
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
    kind: Losses | None = None,
    divergence: Divergence = "forward",
    skew: float = 0.1,
) -> Tensor:
    """Return the scalar loss of the outputs of a `kind` of task.

    None: logits [..., classes] and labels [...], -100 is left out.

    Raises:
        CompressionError: student and teacher answer with different numbers of classes or tokens.
    """
    if student.shape != teacher.shape:
        raise CompressionError(
            f"the student answers with {tuple(student.shape)} and its teacher with {tuple(teacher.shape)}:"
            " they need the same vocabulary or label map"
        )
    losses = kind or Choosing()
    return alpha * divergence_loss(
        losses, student, teacher, labels, temperature, divergence=divergence, skew=skew
    ) + (1 - alpha) * losses.loss(student, labels)
