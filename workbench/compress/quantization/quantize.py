"""Quantize: store weights in fewer bits, as small integers or small floating-point numbers with a scale per
row or group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from workbench.compress.core.batch import Batch, grouped, matrices_in_place
from workbench.compress.core.context import Work
from workbench.compress.core.moments import second_moment_of
from workbench.compress.quantization import awq, gptq, hqq, mixed_precision, prior_grid
from workbench.compress.quantization.scales import (
    SHRINKS,
    Ranges,
    Scales,
    Spec,
    fit,
    fit_grids,
    fit_in_place,
    form_of,
    in_place,
    ranges,
    ranges_in_place,
)
from workbench.compress.registry import METHODS
from workbench.errors import RecipeError
from workbench.formats.affine import Grid
from workbench.formats.stored_forms import HALVES, Form, split
from workbench.kernels import column_solver, weight_passes
from workbench.kernels.column_solver import COLUMNS
from workbench.modules.layer import Layer
from workbench.recipe import About, Step, configuration

__all__ = ["SHRINKS", "Quantize", "fit_grids", "quantize"]

FORMAT_BITS = {"nf4": 4, "float8": 8, "float16": 16, "bfloat16": 16}
FORMAT_LABELS = {"nf4": "NF4", "float8": "FP8", "float16": "FP16", "bfloat16": "BF16"}
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

    `number_format`: `integer`; `nf4`, 16 levels at the quantiles of a normal distribution (Dettmers et al.
    2023, 4 bits); `float8` (e4m3fn, 8 bits, scales in float32); `float16` and `bfloat16`, casts without
    scales (16 bits).

    `weight_bits` may be an average such as 3.4: every layer then gets a whole width from 2 to 8, by what each
    costs the loss. One scale a row (`group_size` 0), one for every `group_size` consecutive inputs, or one
    for the whole tensor (`granularity`). Where the groups do not divide a layer's inputs it is left as it is,
    and the report says so. Pruned weights stay zero. Embeddings, for which no inputs are known, are rounded
    to nearest by every `rounding` but `hqq`.

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
    )
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
        About(
            "number_format=nf4",
            "Dettmers et al. 2023",
            "nothing",
            "24 passes at a new width",
            "4 bits only; no double quantization of scales",
        ),
        About("number_format=float8", "Micikevicius et al. 2022", "nothing", "one pass", "8 bits only"),
        About("number_format=float16, bfloat16", "casts", "nothing", "one pass", "16 bits only"),
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
    number_format: Annotated[
        Literal["integer", "nf4", "float8", "float16", "bfloat16"],
        Field(description="what a code stands for"),
    ] = "integer"
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

    @model_validator(mode="after")
    def fits_format(self) -> Quantize:
        """Refuse a width that the number format does not have, and choices that do not go with it."""
        if self.number_format == "integer":
            if self.weight_bits > 8:
                raise ValueError(
                    f"weight_bits={self.weight_bits:g} of number_format='integer' should be at most 8; 16"
                    " bits are number_format='float16' or 'bfloat16'"
                )
        elif self.weight_bits != FORMAT_BITS[self.number_format]:
            raise ValueError(
                f"number_format={self.number_format!r} has {FORMAT_BITS[self.number_format]} bits, not"
                f" weight_bits={self.weight_bits:g}: give weight_bits={FORMAT_BITS[self.number_format]}"
            )
        if self.number_format != "integer" and self.mixed:
            raise ValueError(
                f"bit_allocation={self.bit_allocation!r} shares out integer widths:"
                f" number_format={self.number_format!r} has only one; take number_format='integer'"
            )
        if self.number_format in HALVES and (
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
        if self.rounding == "hqq" and (self.number_format != "integer" or self.grid != "asymmetric"):
            raise ValueError(
                "rounding='hqq' moves zero points: it needs number_format='integer' and grid='asymmetric',"
                f" not {self.number_format!r} and {self.grid!r}"
            )
        return self

    @property
    def mixed(self) -> bool:
        """Return whether layers get widths of their own."""
        return self.bit_allocation == "knapsack" or self.weight_bits != int(self.weight_bits)

    def spec(self, bits: int) -> Spec:
        """Return what weights of a layer of this width are rounded to."""
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
        words = [FORMAT_LABELS.get(self.number_format, f"W{self.weight_bits:g}")]
        words += [f"g{self.group_size}"] * bool(self.group_size) + ["per tensor"] * (
            self.granularity == "tensor"
        )
        words += [self.rounding] * (self.rounding != "rtn") + ["mixed"] * (
            self.mixed and self.weight_bits == int(self.weight_bits)
        )
        return " ".join(words)

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse quantization after repair."""
        if any(step.kind() == "repair" for step in earlier):
            raise RecipeError(
                "Quantize cannot follow Repair: what it rounds would not be repaired; put Repair after it"
            )


@METHODS.register(Quantize)
def quantize(step: Quantize, work: Work) -> None:
    """Round weights and leave their form as a promise to later steps."""
    layers = [layer for layer in work.choose(step) if divides(step, layer, work)]
    work.warnings += [words for words in prior_grid.notes(work.statistics) if words not in work.warnings]
    done = 0
    for bits, members in by_width(step, layers, work).items():
        for batch in of_one_sort(members, whole=in_place_all(step, members, bits)):
            work.progress(step.kind(), done, len(layers))
            form, half, made = rounded(step, batch, bits, work)
            for layer, own in zip(batch.layers, split(form, half), strict=True):
                layer.grid = own
                work.took(step, layer, words(step, layer, bits))
            batch.put(made) if made else batch.write(form.dequantize())
            done += len(batch.layers)
    work.progress(step.kind(), len(layers), len(layers))


def divides(step: Quantize, layer: Layer, work: Work) -> bool:
    """Return whether the groups divide a layer's inputs; if not, the report says so."""
    columns = layer.shape[1]
    if step.group_size and columns % step.group_size:
        work.say(
            layer, f"quantize skipped: group_size {step.group_size} does not divide its {columns} inputs"
        )
        return False
    return True


def by_width(step: Quantize, layers: list[Layer], work: Work) -> dict[int, list[Layer]]:
    """Return the layers of each width."""
    if not step.mixed or not layers:
        return {int(step.weight_bits): layers}
    sizes = {layer.name: layer.parameter.numel() for layer in layers}
    chosen = mixed_precision.allocate(
        mixed_precision.costs(layers, step.spec(0), work), sizes, step.weight_bits
    )
    return {
        bits: members
        for bits in mixed_precision.WIDTHS
        if (members := [layer for layer in layers if chosen[layer.name] == bits])
    }


def of_one_sort(layers: list[Layer], *, whole: bool) -> Iterator[Batch]:
    """Yield batches in which tables, whose inputs have no second moment, stand apart.

    `whole`: see `grouped`.
    """
    for tables in (False, True):
        yield from grouped((layer for layer in layers if layer.table is tables), whole=whole)


def in_place_all(step: Quantize, layers: list[Layer], bits: int) -> bool:
    """Return whether kernels round all these layers where they lie, without a search that needs memory: those
    of one shape at once then.
    """
    spec = step.spec(bits)
    plain = step.number_format == "integer" and step.rounding == "rtn" and not spec.search
    return (
        plain
        and all(in_place(spec, layer.shape[1]) for layer in layers)
        and matrices_in_place(layers) is not None
    )


def rounded(
    step: Quantize, batch: Batch, bits: int, work: Work
) -> tuple[Form, tuple[bool, ...], list[Tensor]]:
    """Return the stacked form of a batch's weights, in which layers its scales are float16 numbers, and the
    weights on the grid where they were made with it.
    """
    spec = step.spec(bits)
    by_inputs = step.rounding in BY_INPUTS and not batch.layers[0].table
    nearest = step.number_format == "integer" and step.rounding != "hqq" and not by_inputs
    if nearest and (weights := batch.in_place()) is not None:
        if in_place(spec, batch.shape[1]):
            scales = scales_of(
                lambda: fit_in_place(
                    weights, spec, ranges_of(lambda: ranges_in_place(weights, spec), batch, spec, work)
                ),
                batch,
                spec,
                work,
            )
        else:
            scales = scales_of(lambda: fit_stack(batch.matrices(), batch, spec, work), batch, spec, work)
        made, codes = weight_passes.to_grid(weights, scales.scale, scales.zero, bits)
        return Grid(codes, scales.scale, scales.zero, bits), scales.half, made
    return *solved(step, batch, spec, work, by_inputs=by_inputs), []


def solved(
    step: Quantize, batch: Batch, spec: Spec, work: Work, *, by_inputs: bool
) -> tuple[Form, tuple[bool, ...]]:
    """Return the stacked form of a batch's weights by plain operations, and in which layers its scales are
    float16 numbers.
    """
    stack = batch.matrices()
    if step.number_format in HALVES:
        return form_of(stack, None, spec), (False,) * len(stack)
    if by_inputs and step.rounding == "awq":
        return awq.search(stack, torch.stack([second_moment_of(layer, work) for layer in batch.layers]), spec)
    scales = scales_of(lambda: fit_stack(stack, batch, spec, work), batch, spec, work)
    masks = masks_of(batch)
    if step.rounding == "hqq":
        return hqq.solve(stack, scales, spec, masks), scales.half
    if by_inputs:
        order = gptq.orders(batch.layers, work, damping=step.damping, by_activation=step.activation_order)
        stack = gptq.solve(stack, scales, order, spec, masks)
        if spec.number_format == "integer":
            work.refusals.note(COLUMNS, column_solver.failed(stack.device))
    return form_of(stack, scales, spec), scales.half


def fit_stack(stack: Tensor, batch: Batch, spec: Spec, work: Work) -> Scales:
    """Return the scales of a batch's matrices by plain operations, from ranges that are kept."""
    return fit(stack, spec, ranges_of(lambda: ranges(stack, spec), batch, spec, work))


def masks_of(batch: Batch) -> Tensor | None:
    """Return which weights stay, bool [layers, outputs, inputs], or None."""
    masks = [layer.mask for layer in batch.layers if layer.mask is not None]
    return torch.stack(masks) if masks else None


def scales_of(fitted: Callable[[], Scales], batch: Batch, spec: Spec, work: Work) -> Scales:
    """Return the scales of a batch; those of the dense weights are kept for the next move to this width."""
    if not all(layer.pristine for layer in batch.layers):
        return fitted()
    return work.statistics.once(
        ("scales", spec, tuple(layer.origin for layer in batch.layers)), fitted, lasting=True, optional=True
    )


def ranges_of(found: Callable[[], Ranges], batch: Batch, spec: Spec, work: Work) -> Ranges:
    """Return the ranges of a batch's groups; those of the dense weights are kept for the next width."""
    if not all(layer.pristine for layer in batch.layers):
        return found()
    return work.statistics.once(
        ("ranges", spec.group_size, spec.whole, tuple(layer.origin for layer in batch.layers)),
        found,
        optional=True,
    )


def words(step: Quantize, layer: Layer, bits: int) -> str:
    """Return what was done to a layer, for the report."""
    if step.number_format in HALVES:
        return f"cast to {step.number_format}"
    said = [f"W{bits}" if step.number_format == "integer" else FORMAT_LABELS[step.number_format]]
    said += [f"g{step.group_size}"] * bool(step.group_size) + ["per tensor"] * (step.granularity == "tensor")
    said += [step.grid] * (step.number_format == "integer")
    if step.rounding != "rtn":
        said.append(
            "rounded to nearest, as its inputs are looked up"
            if layer.table and step.rounding in BY_INPUTS
            else f"by {step.rounding}"
        )
    return " ".join(said) + (f" (of {step.weight_bits:g} on average)" if step.mixed else "")
