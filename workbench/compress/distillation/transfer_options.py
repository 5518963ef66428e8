"""The options of Transfer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from workbench.compress.distillation.teachers import DENSE, names_of
from workbench.errors import RecipeError
from workbench.recipe import Mark, Step
from workbench.util.about import About
from workbench.util.configuration import configuration


@configuration
class Transfer(Step):
    """Train low-rank changes (LoRA, Hu et al. 2021) of a student's weights to answer, and to think, like its
    teachers; then fold them in.

    The student is what earlier steps left: a model cut in depth or width by Prune, in rank by LowRank, with
    zeros; or, with teachers from the zoo, the bench's own model. The loss is ce_weight * the task's loss +
    kl_weight * T^2 KL(teachers || student at T) + align_weight * the distance of hidden states ("Logit
    Distillation on Manifolds: Mapping by Learning", 2606.00771, as far as it is publicly known). Hidden
    states of block l of L_S are projected into the space of the teacher's block round(l L_T / L_S); the
    projection starts at its least-squares solution and is dropped at the end. `align` is `geodesic` (angle on
    the sphere), `cosine` (1 - cosine), `mse` (relative squared error) or `none`. Several teachers count by
    the mean of their softened answers; states are aligned with the first. Everything but LoRA and projections
    is frozen and keeps its bits; the model runs afterwards at the cost it had before. Masks hold, ranks and
    shapes stay.

    Several LoRAs take their steps side by side, each on batches of its own, and do not see each other; what a
    look sees, what is kept and what is folded is the student with the mean of their changes. A point of the
    curve is the mean of their losses. Looks at held-out items, the best of which is kept, savings to disk,
    and teachers' answers that are computed once are as Distill has them.

    What it does not do: adapt weights on a grid (the fold would leave it: put Transfer before Quantize),
    biases, norms or, unless named, embeddings; save the memory of weight gradients; go on with the other
    LoRAs where one diverges.
    """

    slider: ClassVar[str] = "transfer_steps"
    position: ClassVar[int] = 24
    stops: ClassVar[tuple[float, ...]] = (50, 200)
    aside: ClassVar[bool] = True
    added: ClassVar[tuple[str, ...]] = (
        "transfer_checkpoint_every",
        "transfer_cache_mb",
        "transfer_cache_disk_mb",
    )
    about: ClassVar[tuple[About, ...]] = (
        About(
            "transfer_steps, lora_rank",
            "LoRA, Hu et al. 2021; Hinton et al. 2015",
            "nothing",
            "training of low-rank changes, folded at the end",
            "adapts no weight on a grid",
        ),
        About(
            "align=geodesic",
            "Logit Distillation on Manifolds, 2026",
            "nothing",
            "the same, and one pass of both models over calibration data",
            "needs a teacher of the same family",
        ),
        About(
            "align=mse, cosine",
            "FitNets, Romero et al. 2015; PKD, Sun et al. 2019",
            "nothing",
            "the same",
            "needs a teacher of the same family",
        ),
        About(
            "teachers",
            "averaged softened targets, Hinton et al. 2015",
            "the teachers are loaded; with transfer_cache_mb their answers",
            "one pass of each teacher a step, none once its answers are kept",
            "aligns states with the first only",
        ),
        About(
            "lora_count",
            "model soups, Wortsman et al. 2022",
            "nothing",
            "so many trainings",
            "averages changes, which is not the mean of answers",
        ),
    )

    transfer_steps: Annotated[int, Field(ge=1, le=1_000_000, description="optimizer steps of each LoRA")] = (
        100
    )
    teachers: Annotated[
        str,
        Field(
            min_length=1,
            examples=[DENSE, "dense,fashion-cnn"],
            description=(
                "whom to learn from, with commas between them: 'dense' for the dense model, or models of"
                " the zoo"
            ),
        ),
    ] = DENSE
    ce_weight: Annotated[float, Field(ge=0, le=1000, description="weight of the task's own loss")] = 1.0
    kl_weight: Annotated[
        float,
        Field(
            ge=0,
            le=1000,
            description="weight of the distance to the teachers' softened answers; 0 leaves it out",
        ),
    ] = 1.0
    transfer_temperature: Annotated[
        float, Field(gt=0, le=100, description="softens teachers' and student's answers")
    ] = 2.0
    align: Annotated[
        Literal["none", "mse", "cosine", "geodesic"],
        Field(description="how hidden states are compared with the first teacher's"),
    ] = "geodesic"
    align_weight: Annotated[float, Field(gt=0, le=1000, description="weight of that distance")] = 1.0
    align_layers: Annotated[
        Literal["all", "last"],
        Field(description="blocks whose states are compared: all, or the last of each list"),
    ] = "all"
    align_projection: Annotated[
        Literal["fixed", "trained", "none"],
        Field(
            description=(
                "the map into the teacher's space: least squares and fixed, trained from there, or none, for"
                " equal widths"
            )
        ),
    ] = "fixed"
    lora_rank: Annotated[int, Field(ge=1, le=1024, description="rank of each weight's change")] = 4
    lora_alpha: Annotated[
        float, Field(gt=0, le=1000, description="changes are scaled by lora_alpha / lora_rank")
    ] = 8.0
    lora_count: Annotated[
        int, Field(ge=1, le=64, description="LoRAs trained apart, each on its own batches, and averaged")
    ] = 1
    transfer_rate: Annotated[float, Field(gt=0, le=1, description="peak learning rate of Adam")] = 1e-3
    transfer_batch: Annotated[int, Field(ge=1, le=65536, description="training items per step")] = 32
    transfer_stop_at: Annotated[
        int, Field(ge=0, le=1_000_000, description="end after so many steps of the schedule; 0 runs all")
    ] = 0
    transfer_look_every: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description=(
                "steps between looks at held-out items, the best of which is kept; 0 keeps the last step"
            ),
        ),
    ] = 20
    transfer_checkpoint_every: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description=(
                "steps between savings to disk that an interrupted training goes on from; 0 saves none"
            ),
        ),
    ] = 0

    transfer_cache_mb: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description=(
                "memory for all teachers' answers and states, computed once if they fit; 0 computes them anew"
            ),
        ),
    ] = 0
    transfer_cache_disk_mb: Annotated[
        int,
        Field(
            ge=0,
            le=100_000_000,
            description=(
                "disk for them where that memory is too little, in the user's cache directory; removed at"
                " the end"
            ),
        ),
    ] = 0

    @model_validator(mode="after")
    def fits_together(self) -> Transfer:
        """Refuse to stop after the last step, to learn from nothing, and a list of teachers that cannot be
        read.
        """
        if self.transfer_stop_at > self.transfer_steps:
            raise ValueError(
                f"transfer_stop_at={self.transfer_stop_at} lies beyond transfer_steps={self.transfer_steps}:"
                " give 0 to run all steps"
            )
        if self.align == "none" and not self.ce_weight and not self.kl_weight:
            raise ValueError(
                "nothing to learn from: give ce_weight or kl_weight above 0, or another align than 'none'"
            )
        names_of(self.teachers)
        return self

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse teaching a dense model what it knows."""
        if not earlier and names_of(self.teachers) == [DENSE]:
            raise RecipeError(
                "Transfer cannot come first with teachers='dense': the student would still be its teacher;"
                " put it after Prune or LowRank, or name another teacher"
            )

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the mark that it leaves: weights that have learned."""
        return frozenset({"learned"})

    def label(self) -> str:
        """Return such as `transfer 100 geodesic`, with the step where it was stopped."""
        way = {"none": "KL" if self.kl_weight else "CE"}.get(self.align, self.align)
        return f"transfer {self.transfer_steps} {way}" + (
            f" to step {self.transfer_stop_at}" if self.transfer_stop_at else ""
        )

    def unchanged(self) -> set[str]:
        """Return the options of later versions that are at what was done before these: there were no looks at
        first.
        """
        return super().unchanged() | ({"transfer_look_every"} if not self.transfer_look_every else set())
