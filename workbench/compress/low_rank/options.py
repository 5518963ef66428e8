"""The options of LowRank and Repair."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.options import Prune
from workbench.errors import RecipeError
from workbench.recipe import Mark, Step, first_leaving
from workbench.util.about import About
from workbench.util.configuration import configuration

BROKEN: dict[Mark, str] = {
    "zeros": "factors of a pruned weight are dense, so its zeros would be lost; put LowRank first",
    "inputs": (
        "its factors would read inputs as they are; put LowRank first, then the inputs of all factors are"
        " rounded"
    ),
    "grid": "the factors would leave the grid; put LowRank first",
    "cast": "the factors would leave the grid; put LowRank first",
    "term": "the repaired weight is of full rank again; put LowRank first",
}  # what a factorisation would break


@configuration
class LowRank(Step):
    """Replace each layer by two of rank r = round(rank_ratio * full rank), at least 1.

    A convolution by two or three.

    `svd` truncates the singular value decomposition of the weight (Eckart & Young 1936). `whitened` minimises
    the error of the layer's outputs on the calibration data instead: W' = Q Q^T W with Q the first r
    eigenvectors of the outputs' second moment W E[x x^T] W^T (as in SVD-LLM, Wang et al. 2024, and its
    eigenvector form).

    `rank_allocation` shares out the weights that uniform ranks take: by `energy`, where a step of rank saves
    the most error of the layer's outputs, relative to all of them, or by `loss`, where outputs weigh as much
    as the task's loss feels them (diagonal Fisher information). No layer falls below half of its uniform
    rank.

    A convolution becomes r filters and a 1x1 (`channel`), k x 1 and 1 x k (`spatial`, Jaderberg et al. 2014),
    or 1x1, core and 1x1 (`tucker2`, Kim et al. 2016: both ranks by the same ratio); of the last two,
    `whitened` refits the last factor to the outputs. An embedding that targets name becomes a narrower one
    and a product, always by `svd`.

    What it does not do: train, or touch a layer where factors would have no fewer weights than the layer (a
    square one above rank_ratio 0.5) or where the weight is shared; such a layer is left whole and the report
    says so.
    """

    slider: ClassVar[str] = "rank_ratio"
    position: ClassVar[int] = 10
    stops: ClassVar[tuple[float, ...]] = (0.2, 0.3, 0.45)
    added: ClassVar[tuple[str, ...]] = ("rank_allocation", "conv")
    about: ClassVar[tuple[About, ...]] = (
        About(
            "factorization=svd",
            "Eckart & Young 1936",
            "one decomposition a layer",
            "a slice and two products less wide",
            "best for weights, which is seldom best for outputs",
        ),
        About(
            "factorization=whitened",
            "as SVD-LLM, Wang et al. 2024",
            "second moments of every layer's inputs, one pass over calibration data, one decomposition a"
            " layer",
            "a slice",
            "as good as its calibration data",
        ),
        About(
            "rank_allocation=energy, loss",
            "greedy under one budget (this project)",
            "as the factorization; loss: squared gradients",
            "one sort over all ranks",
            "ranks are chosen layer by layer: layers interact",
        ),
        About(
            "conv=spatial",
            "Jaderberg et al. 2014",
            "one decomposition a layer",
            "a slice",
            "k x k kernels only",
        ),
        About(
            "conv=tucker2", "Kim et al. 2016", "nothing", "an iterated decomposition", "uniform ranks only"
        ),
    )

    rank_ratio: Annotated[float, Field(gt=0, le=1, description="fraction of the full rank that is kept")] = (
        0.5
    )
    factorization: Annotated[
        Literal["svd", "whitened"], Field(description="what the truncation keeps best: weights or outputs")
    ] = "whitened"
    rank_allocation: Annotated[
        Literal["uniform", "energy", "loss"],
        Field(description="the same ratio for all layers, or shared out by what it saves"),
    ] = "uniform"
    conv: Annotated[
        Literal["channel", "spatial", "tucker2"],
        Field(description="how convolutions are split: k x k and 1x1; k x 1 and 1 x k; 1x1, core and 1x1"),
    ] = "channel"

    @model_validator(mode="after")
    def one_rank_to_share(self) -> LowRank:
        """Refuse to share out what has two ranks a layer."""
        if self.conv == "tucker2" and self.rank_allocation != "uniform":
            raise ValueError(
                f"conv='tucker2' has two ranks a layer, which rank_allocation={self.rank_allocation!r} cannot"
                " share out: take uniform, or conv='spatial'"
            )
        return self

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse low rank after a step whose promise a factorisation would break."""
        for mark, reason in BROKEN.items():
            if after := first_leaving(earlier, mark):
                raise RecipeError(f"LowRank cannot follow {type(after).__name__}: {reason}")

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the mark that it leaves: factors."""
        return frozenset({"factors"})

    def label(self) -> str:
        """Return such as `rank 40%`."""
        shared = "" if self.rank_allocation == "uniform" else f" by {self.rank_allocation}"
        return f"rank {self.rank_ratio:.0%}{shared}"


@configuration
class Repair(Step):
    """Add L R of rank r = round(repair_ratio * min(outputs, inputs)), at least 1, to what earlier steps left
    of each weight.

    L R is the rank-r matrix that makes the error of the layer's outputs on calibration data least: min ||(W -
    W' - L R) X||, with W the dense weight (EoRA, Liu et al. 2024). It has a closed form, L = Q and R = Q^T (W
    - W') with Q the first r eigenvectors of the second moment of the lost outputs. Masks and grids of W' stay
    as they are; L and R are stored in the model's dtype, and count in every size. `repair_rounds` above 1
    alternates with the pruning before it: prune W - L R to the same number of zeros by the same criterion,
    then fit L R again (sparse plus low rank as in OATS, Zhang & Papyan 2024).

    What it does not do: train, repair factors of a low-rank layer, embeddings or shared weights, or change a
    bias.
    """

    slider: ClassVar[str] = "repair_ratio"
    position: ClassVar[int] = 35
    aside: ClassVar[bool] = True
    stops: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1)
    about: ClassVar[tuple[About, ...]] = (
        About(
            "repair_ratio",
            "EoRA, Liu et al. 2024",
            "second moments of every layer's inputs, one pass over calibration data",
            "one decomposition a layer, of what was lost",
            "costs bytes: count them against a milder recipe",
        ),
        About(
            "repair_rounds",
            "OATS, Zhang & Papyan 2024",
            "second moments of every layer's inputs, one pass over calibration data",
            "the same, several times",
            "no convergence is promised",
        ),
    )

    repair_ratio: Annotated[
        float,
        Field(gt=0, le=0.5, description="rank of the term that is added, as a fraction of the full rank"),
    ] = 0.05
    repair_rounds: Annotated[
        int,
        Field(
            ge=1, le=64, description="fits of the term; above 1 the pruning before it is done again each time"
        ),
    ] = 1

    def rank(self, rows: int, columns: int) -> int:
        """Return the rank for a weight of this shape."""
        return max(1, round(self.repair_ratio * min(rows, columns)))

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse where there is nothing to repair, or what would be undone."""
        if first_leaving(earlier, "zeros", "fewer", "grid", "cast") is None:
            raise RecipeError("Repair needs something to repair: put it after Prune or Quantize")
        if after := first_leaving(earlier, "learned"):
            raise RecipeError(
                f"Repair cannot follow {type(after).__name__}: it would pull trained weights back to the"
                " dense ones; put Repair first, then its factors train too"
            )
        if self.repair_rounds > 1:
            self.check_rounds(earlier)

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the mark that it leaves: a term beside the weight."""
        return frozenset({"term"})

    def check_rounds(self, earlier: tuple[Step, ...]) -> None:
        """Refuse to prune again what no rule here could prune again."""
        if after := first_leaving(earlier, "grid", "cast"):
            raise RecipeError(
                f"repair_rounds={self.repair_rounds} prunes again after each fit, which would leave the grid"
                f" of {type(after).__name__}: take repair_rounds=1"
            )
        for step in earlier:
            if not step.leaves & {"zeros", "fewer"}:
                continue
            if not isinstance(step, Prune):
                raise RecipeError(
                    f"repair_rounds={self.repair_rounds} chooses the zeros of Prune again, not those of"
                    f" {type(step).__name__}: take repair_rounds=1"
                )
            if step.train_steps:
                raise RecipeError(
                    f"repair_rounds={self.repair_rounds} prunes the dense weights again, which would undo the"
                    " training of Prune: take repair_rounds=1"
                )
            if step.structured:
                raise RecipeError(
                    f"repair_rounds={self.repair_rounds} needs zeros that can be chosen again;"
                    f" pattern={step.pattern!r} takes parts out: take repair_rounds=1"
                )
            if not CRITERIA[step.criterion].repeats:
                able = " or ".join(record.name for record in CRITERIA if record.repeats)
                raise RecipeError(
                    f"repair_rounds={self.repair_rounds} chooses zeros again by {able}, not by"
                    f" {step.criterion!r}: take one of these, or repair_rounds=1"
                )

    def label(self) -> str:
        """Return such as `repair 5%`."""
        return f"repair {100 * self.repair_ratio:.3g}%" + (
            f" x{self.repair_rounds}" if self.repair_rounds > 1 else ""
        )
