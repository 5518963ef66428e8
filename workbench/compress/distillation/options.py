"""The options of Distill."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from workbench.compress.distillation.hidden_states import (
    PAIRS,
)
from workbench.compress.distillation.losses import Divergence
from workbench.errors import RecipeError
from workbench.recipe import Mark, Step
from workbench.util.about import About
from workbench.util.configuration import configuration


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

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the mark that it leaves: weights that have learned."""
        return frozenset({"learned"})

    def label(self) -> str:
        """Return such as `distilled T2`, with the step where it was stopped."""
        return f"distilled T{self.temperature:g}" + (f" to step {self.stop_at}" if self.stop_at else "")

    def unchanged(self) -> set[str]:
        """Return the options of later versions that are at what was done before these: there were no looks at
        first.
        """
        return super().unchanged() | ({"look_every"} if not self.look_every else set())
