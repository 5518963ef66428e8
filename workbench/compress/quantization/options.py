"""The options of Quantize, which every part of quantization takes."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from workbench.compress.quantization.scales import (
    Spec,
)
from workbench.errors import RecipeError
from workbench.formats.number_format import NumberFormat
from workbench.formats.number_formats import FORMATS
from workbench.recipe import Mark, Step, Targets, first_leaving
from workbench.util.about import About
from workbench.util.configuration import OneOf, configuration

BY_INPUTS = ("gptq", "awq")


def tidy(bits: float) -> float:
    """Return a whole number of bits as an integer, so that 4.0 and 4 are one recipe."""
    near = round(bits, 6)
    return int(near) if near == int(near) else near


@configuration
class Quantize(Step):
    """Store each weight in `weight_bits` bits with a scale per row, group or tensor.

    How it is rounded is `rounding`.

    `rtn` rounds each weight to the nearest point of the grid, after a search for the range with the least
    squared error of the weights: from the full one down to 40% of it. `gptq` rounds column by column and lets
    the columns that follow make up for each error (Frantar et al. 2022). `awq` gives finer steps to inputs
    that carry much (Lin et al. 2023). `hqq` moves the zero points, which then are no integers (Badri & Shaji
    2023).

    `number_format`: `integer`, or another registered one (`workbench.formats.number_formats`): `nf4`, 16
    levels at the quantiles of a normal distribution (Dettmers et al. 2023, 4 bits); `float4` (e2m1, 4 bits);
    `float8` (e4m3fn, 8 bits, scales in float32); `float16` and `bfloat16`, casts without scales (16 bits).

    `weight_bits` may be an average such as 3.4: every layer then gets a whole width from 2 to 8, by what each
    costs the loss. One scale a row (`group_size` 0), one for every `group_size` consecutive inputs, or one
    for the whole tensor (`granularity`). Where the groups do not divide a layer's inputs it is left as it is,
    and the report says so. Pruned weights stay zero.

    Embeddings of tokens and a language model's output head are often most of a small model. Where targets do
    not name them they take 8 bits with a scale a row (`embeddings`), after all other steps. That alone cost
    SmolLM2 0.18% [0.02%, 0.35%] of its perplexity and MiniLM 0.000 [-0.002, 0.002] of its correlation, and
    saves three quarters of float32. The same width as the other weights is smallest, and costs more. A head
    that is tied to the embedding is rounded once, with it; a classifier's head stays as it is. Embeddings
    that targets name, for which no inputs are known, are rounded to nearest by every `rounding` but `hqq`.

    What it does not do: quantize activations, solve layers one after another (each sees the dense model's
    inputs), or make anything faster where no kernel for this form exists; weights are unpacked before the
    product then.
    """

    slider: ClassVar[str] = "weight_bits"
    position: ClassVar[int] = 30
    stops: ClassVar[tuple[float, ...]] = (2, 3, 4, 6, 8)
    ends: ClassVar[tuple[float, float] | None] = (2, 8)
    added: ClassVar[tuple[str, ...]] = (
        "rounding",
        "number_format",
        "granularity",
        "activation_order",
        "damping",
        "bit_allocation",
        "embeddings",
    )
    before: ClassVar[dict[str, str]] = {"embeddings": "dense"}
    about: ClassVar[tuple[About, ...]] = (
        About("grid, group_size", "round to nearest", "nothing", "one pass", "rounds each weight alone"),
        About(
            "scale_search",
            "least squared error over 24 ranges",
            "nothing",
            "24 passes at a new width",
            "sees weights only, not inputs",
        ),
        About(
            "rounding=gptq",
            "Frantar et al. 2022",
            "second moments of every layer's inputs, one pass over calibration data, and their inverse"
            " factors",
            "a pass over all columns",
            "solves layers for the dense model's inputs, not one after another",
        ),
        About(
            "rounding=awq",
            "Lin et al. 2023",
            "second moments of every layer's inputs, one pass over calibration data",
            "20 exponents in each layer",
            "keeps a multiplier an input with the weight; folds it into no other layer",
        ),
        About(
            "rounding=hqq",
            "Badri & Shaji 2023",
            "nothing",
            "20 iterations",
            "sees weights only; zero points take 16 bits",
        ),
        *(line for record in FORMATS for line in record.about),
        About(
            "bit_allocation",
            "widths by curvature, as Dong et al. 2019; exact knapsack",
            "what 7 widths cost each layer; squared gradients, second moments",
            "as rounding",
            "judges layers one by one: they interact",
        ),
    )

    weight_bits: Annotated[
        float,
        AfterValidator(tidy),
        Field(ge=2, le=16, description="bits per weight; a fraction is the average of whole widths"),
    ] = 4
    group_size: Annotated[
        int, Field(ge=0, le=65536, description="inputs that share a scale; 0 means one scale per row")
    ] = 0
    grid: Annotated[
        Literal["symmetric", "asymmetric"],
        Field(description="whether an integer grid has a zero point per group"),
    ] = "asymmetric"
    scale_search: Annotated[
        bool, Field(description="search the range with the least squared error; off: the full range")
    ] = True
    rounding: Annotated[
        Literal["rtn", "gptq", "awq", "hqq"],
        Field(description="how weights are rounded: to nearest, or so that outputs change least"),
    ] = "rtn"
    number_format: Annotated[str, OneOf(FORMATS), Field(description="what a code stands for")] = "integer"
    granularity: Annotated[
        Literal["row", "tensor"],
        Field(description="without groups: one scale a row, or one for the whole tensor"),
    ] = "row"
    activation_order: Annotated[bool, Field(description="gptq: begin with the inputs that carry most")] = True
    damping: Annotated[
        float,
        Field(
            gt=0, le=10, description="gptq: added to the second moments, as a fraction of their mean diagonal"
        ),
    ] = 0.01
    bit_allocation: Annotated[
        Literal["auto", "knapsack"],
        Field(description="auto: whole widths are the same everywhere; knapsack: shared out at any average"),
    ] = "auto"

    embeddings: Annotated[
        Literal["int8", "same", "dense"],
        Field(
            description=(
                "embeddings of tokens and a language model's head: 8 bits, which costs next to nothing; the"
                " same as other weights, smallest; or dense, often most of a small file"
            )
        ),
    ] = "int8"

    @model_validator(mode="after")
    def fits_format(self) -> Quantize:
        """Refuse a width that the number format does not have, and choices that do not go with it."""
        if self.format.affine:
            if self.weight_bits > 8:
                raise ValueError(
                    f"weight_bits={self.weight_bits:g} of number_format='integer' should be at most 8; 16"
                    " bits are number_format='float16' or 'bfloat16'"
                )
        elif self.weight_bits != self.format.bits:
            raise ValueError(
                f"number_format={self.number_format!r} has {self.format.bits} bits, not"
                f" weight_bits={self.weight_bits:g}: give weight_bits={self.format.bits}"
            )
        if not self.format.affine and self.mixed:
            raise ValueError(
                f"bit_allocation={self.bit_allocation!r} shares out integer widths:"
                f" number_format={self.number_format!r} has only one; take number_format='integer'"
            )
        if self.format.cast is not None and (
            self.rounding != "rtn" or self.group_size or self.granularity != "row"
        ):
            raise ValueError(
                f"number_format={self.number_format!r} is a cast without scales: leave rounding, group_size"
                " and granularity at their defaults"
            )
        return self

    @model_validator(mode="after")
    def fits_rounding(self) -> Quantize:
        """Refuse scales and grids that contradict one another."""
        if self.group_size and self.granularity == "tensor":
            raise ValueError(
                f"granularity='tensor' is one scale for all: it cannot have group_size={self.group_size};"
                " take group_size=0, or granularity='row'"
            )
        if self.rounding == "hqq" and (not self.format.affine or self.grid != "asymmetric"):
            raise ValueError(
                "rounding='hqq' moves zero points: it needs number_format='integer' and grid='asymmetric',"
                f" not {self.number_format!r} and {self.grid!r}"
            )
        return self

    @property
    def format(self) -> NumberFormat:
        """Return the number format of the codes."""
        return FORMATS[self.number_format]

    @property
    def mixed(self) -> bool:
        """Return whether layers get widths of their own."""
        return self.bit_allocation == "knapsack" or self.weight_bits != int(self.weight_bits)

    def spec(self, bits: int) -> Spec:
        """Return the form that weights of a layer of this width are rounded to."""
        return Spec(
            bits,
            self.group_size,
            self.number_format,
            self.grid == "symmetric",
            self.scale_search,
            self.granularity == "tensor",
        )

    def label(self) -> str:
        """Return such as `W4`, `W4 g64`, `W3.4 g64 gptq` or `NF4`."""
        texts = [f"W{self.weight_bits:g}" if self.format.affine else self.format.label]
        texts += [f"g{self.group_size}"] * bool(self.group_size) + ["per tensor"] * (
            self.granularity == "tensor"
        )
        texts += [self.rounding] * (self.rounding != "rtn") + ["mixed"] * (
            self.mixed and self.weight_bits == int(self.weight_bits)
        )
        if self.embeddings != "int8":
            texts.append("with embeddings" if self.embeddings == "same" else "without embeddings")
        return " ".join(texts)

    def besides(self, names: Targets) -> Quantize | None:
        """Return how embeddings and the head are rounded where no target names them: None where they stay."""
        if self.embeddings == "dense":
            return None
        if self.embeddings == "same" or self.weight_bits > 8:
            whole = round(self.weight_bits)
            return dataclasses.replace(self, targets=names, weight_bits=whole, bit_allocation="auto")
        return Quantize(weight_bits=8, grid=self.grid, scale_search=False, targets=names, seed=self.seed)

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse quantization after repair."""
        if after := first_leaving(earlier, "term"):
            name = type(after).__name__
            raise RecipeError(
                f"Quantize cannot follow {name}: what it rounds would not be repaired; put {name} after it"
            )

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the mark that it leaves: codes of a grid, or 16-bit numbers."""
        return frozenset({"grid" if self.format.cast is None else "cast"})
