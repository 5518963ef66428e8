"""The options of Prune, which every part of pruning takes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from workbench.compress.pruning.criteria import CRITERIA
from workbench.errors import RecipeError
from workbench.recipe import Mark, Step, first_leaving
from workbench.util.about import About
from workbench.util.configuration import OneOf, configuration

STRUCTURES = ("heads", "neurons", "channels", "layers", "experts")


@configuration
class Prune(Step):
    """Set the least important weights to zero, or remove whole parts of the model.

    Patterns: `unstructured` zeros any weights, exactly round(sparsity * weights) of each layer, or of the
    whole model where the allocation is not uniform; `n:m` keeps n of every m consecutive inputs; `heads`,
    `neurons`, `channels`, `layers` and `experts` take out structure, which leaves a smaller ordinary module.

    Criteria, registered in `workbench.compress.pruning.criteria`: `magnitude` |w| (Han et al. 2015). `wanda`
    |w| * ||x||, compared within each output row (Sun et al. 2023). `ria`, shares of rows and columns times
    ||x||^(1/2) (Zhang et al. 2024). `sparsegpt` removes what costs least and lets the weights that stay make
    up for it (Frantar & Alistarh 2023). `taylor` |w * g| with the mean gradient (Molchanov et al. 2019) and
    `fisher` w^2 * E[g^2] / 2 (LeCun et al. 1990, Theis et al. 2018), from the task's loss on calibration
    items with their labels. `random`: the baseline that every other should beat.

    Allocation: `uniform`; `global`, one threshold over all layers (magnitude as it is, others on a common
    scale: relative output error, or change of the loss); `sensitivity`, the budget spent where a closed form
    says that it costs least. Schedules: `rounds` with growing sparsity (Zhu & Gupta 2017) and training
    between them; `penalty`, a training that shrinks weights first.

    What it does not do: with zeros in place, matrices keep their shape, so time only falls where a sparse
    kernel exists. SparseGPT solves every layer for the dense model's inputs, not one after another for those
    of the layers pruned before. Training ends only by its steps or by cancelling, and nothing is trained
    after the last round: Distill does that.
    """

    slider: ClassVar[str] = "sparsity"
    position: ClassVar[int] = 20
    stops: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.7, 0.85)
    added: ClassVar[tuple[str, ...]] = (
        "allocation",
        "reconstruct",
        "rounds",
        "train_steps",
        "train_rate",
        "train_batch",
        "penalty",
    )
    about: ClassVar[tuple[About, ...]] = (
        *(record.about for record in CRITERIA),
        About(
            "pattern=n:m",
            "Mishra et al. 2021",
            "as the criterion",
            "a selection in each group",
            "faster only where a sparse kernel runs it",
        ),
        About(
            "pattern=heads, neurons, channels",
            "Michel et al. 2019; Li et al. 2017; Fang et al. 2023 (graph)",
            "as the criterion",
            "scores of whole units, then smaller matrices",
            "coarse: loses more than zeros of the same number, unless trained or refitted",
        ),
        About(
            "pattern=layers",
            "Men et al. 2024",
            "hidden states of one pass over calibration data",
            "nothing but leaving blocks out",
            "the coarsest cut of all",
        ),
        About(
            "pattern=experts",
            "Lasby et al. 2025 (REAP)",
            "what each expert adds for the tokens routed to it, one pass over calibration data",
            "nothing but leaving experts out",
            "the same number from every block; the other experts are not refitted",
        ),
        About(
            "allocation=global",
            "Han et al. 2015",
            "as the criterion",
            "one threshold over all layers",
            "can empty the layers with small weights",
        ),
        About(
            "allocation=sensitivity",
            "marginal cost along convex hulls (this project)",
            "second moments of every layer's inputs, one pass over calibration data; squared gradients",
            "costs of several ratios in each layer",
            "judges layers one by one: they interact",
        ),
        About("rounds, train_steps", "Zhu & Gupta 2017", "nothing", "training", "as slow as training"),
        About(
            "penalty",
            "Tibshirani 1996; Yuan & Lin 2006 (groups)",
            "nothing",
            "training",
            "as slow as training",
        ),
        About(
            "reconstruct",
            "He et al. 2017",
            "as the criterion, and inputs of what follows",
            "one linear system a layer",
            "fits calibration data, trains nothing",
        ),
    )

    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="fraction of the weights, or of the structure, that is removed")
    ] = 0.5
    pattern: Annotated[
        str,
        Field(
            pattern=r"^(unstructured|heads|neurons|channels|layers|experts|[1-9]\d?:[1-9]\d?)$",
            description=(
                "unstructured, n:m such as 2:4 (n kept of every m), or what is taken out: heads, neurons,"
                " channels, layers, experts"
            ),
            examples=["unstructured", "2:4", "4:8", "1:4", *STRUCTURES],
        ),
    ] = "unstructured"
    criterion: Annotated[str, OneOf(CRITERIA), Field(description="what makes a weight unimportant")] = (
        "magnitude"
    )
    allocation: Annotated[
        Literal["uniform", "global", "sensitivity"],
        Field(description="how the sparsity is divided over the layers"),
    ] = "uniform"
    reconstruct: Annotated[
        bool, Field(description="after structure is removed, fit by least squares what reads its outputs")
    ] = False
    rounds: Annotated[
        int, Field(ge=1, le=100, description="rounds of pruning, with training between them; 1 is one shot")
    ] = 1
    train_steps: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="optimizer steps between rounds, and of the training with penalty before the first",
        ),
    ] = 0
    train_rate: Annotated[
        float, Field(gt=0, le=1, description="peak learning rate of Adam in these trainings")
    ] = 5e-4
    train_batch: Annotated[
        int, Field(ge=1, le=65536, description="training items per step of these trainings")
    ] = 64
    penalty: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description=(
                "weight of the sum of |w| (structure: of group norms) in a training first, such as 1e-5; 0:"
                " none"
            ),
        ),
    ] = 0.0

    @model_validator(mode="after")
    def fits_pattern(self) -> Prune:
        """Refuse a sparsity that the n:m pattern cannot have, and choices that do not go with the pattern."""
        if self.group is not None:
            kept, of = self.group
            if not kept < of:
                raise ValueError(
                    f"pattern={self.pattern!r} removes nothing: n of n:m must be smaller than m, such as 2:4"
                )
            if abs(self.sparsity - (1 - kept / of)) > 1e-9:
                raise ValueError(
                    f"pattern={self.pattern!r} means sparsity={1 - kept / of:g}, but"
                    f" sparsity={self.sparsity:g} was given"
                )
            if self.allocation != "uniform":
                raise ValueError(
                    f"pattern={self.pattern!r} gives every layer the same sparsity:"
                    f" allocation={self.allocation!r} has nothing to divide; use 'uniform' or"
                    " pattern='unstructured'"
                )
        if self.reconstruct and not self.structured:
            raise ValueError(
                f"reconstruct=True is for structure ({', '.join(STRUCTURES)}): with pattern={self.pattern!r}"
                " use criterion='sparsegpt', which adjusts the weights that stay"
            )
        judged = CRITERIA[self.criterion]
        if self.structured and judged.units is None:
            raise ValueError(
                f"criterion={self.criterion!r} removes single weights: with pattern={self.pattern!r} use"
                " another criterion and reconstruct=True"
            )
        if self.allocation == "global" and judged.across is None:
            raise ValueError(
                f"criterion={self.criterion!r} has no scale that all layers share: allocation='global' needs"
                " another criterion, such as 'wanda'; or take allocation='uniform'"
            )
        return self

    @model_validator(mode="after")
    def fits_schedule(self) -> Prune:
        """Refuse trainings that never come and rounds that change nothing."""
        if self.penalty and not self.train_steps:
            raise ValueError(
                f"penalty={self.penalty:g} needs a training to act in: give train_steps, such as 100"
            )
        if self.train_steps and self.rounds == 1 and not self.penalty:
            raise ValueError(
                f"train_steps={self.train_steps} never come: training is between rounds; give rounds of 2 or"
                " more, a penalty, or a Distill step after this one"
            )
        if self.rounds > 1 and not self.train_steps and CRITERIA[self.criterion].settled:
            raise ValueError(
                f"rounds={self.rounds} with criterion={self.criterion!r} and no training removes what one"
                " round does: give train_steps, such as 100"
            )
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """Return (n, m) of an n:m pattern, or None."""
        if ":" not in self.pattern:
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    @property
    def structured(self) -> bool:
        """Return whether whole parts are taken out."""
        return self.pattern in STRUCTURES

    @property
    def claim(self) -> str:
        """Return the claim that it makes on its layers: one for each kind of structure, and one for zeros."""
        return f"{self.kind()} {self.pattern}" if self.structured else self.kind()

    @property
    def order(self) -> int:
        """Return the place among steps from flat options: structure goes before low rank, which has none of
        its own to remove.
        """
        return 5 if self.structured else self.position

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse pruning after quantization."""
        if after := first_leaving(earlier, "grid", "cast"):
            raise RecipeError(
                f"Prune cannot follow {type(after).__name__}: scales would be fitted to weights that are then"
                " removed; prune first (Harma et al. 2025)"
            )
        if after := first_leaving(earlier, "term"):
            name = type(after).__name__
            raise RecipeError(
                f"Prune cannot follow {name}: what it removes would not be repaired; put {name} after it"
            )
        if self.structured and (after := first_leaving(earlier, "inputs")):
            raise RecipeError(
                f"Prune(pattern={self.pattern!r}) cannot follow {type(after).__name__}: ranges and divisors"
                f" are those of the {self.pattern} that are there; put it first"
            )
        if self.structured and (after := first_leaving(earlier, "factors")):
            raise RecipeError(
                f"Prune(pattern={self.pattern!r}) cannot follow {type(after).__name__}: two factors have no"
                f" {self.pattern} to remove; put it first"
            )

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the mark that it leaves: zeros, or fewer units."""
        return frozenset({"fewer" if self.structured else "zeros"})

    @property
    def zeros(self) -> str | None:
        """Return the pattern of its zeros, None for structure, which leaves none."""
        return None if self.structured else self.pattern

    def label(self) -> str:
        """Return such as `50% sparse`, `2:4` or `25% fewer neurons`."""
        if self.structured:
            return f"{self.sparsity:.0%} fewer {self.pattern}"
        return f"{self.sparsity:.0%} sparse" if self.group is None else self.pattern
