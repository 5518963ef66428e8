"""What a recipe does to a model's shapes: a millisecond, because no weight is read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from workbench.formats.stored_forms import HALVES
from workbench.modules.factored import Form, cost, factor_shapes, form_for
from workbench.modules.weight_shapes import Entry, Weight
from workbench.recipe import Recipe, Step
from workbench.shapes.inputs import BUFFERS, after_activations
from workbench.shapes.outline import Outline
from workbench.shapes.structured import after_structure


def after(outline: Outline, recipe: Recipe) -> Outline | None:
    """Return an outline after a recipe, or None if one of its methods is not known here."""
    made = outline
    for step in recipe:
        if getattr(step, "structured", False):
            left = after_structure(made, step)
            if left is None:
                return None
            made = left
            continue
        if step.kind() == "activations":
            made = after_activations(made, step)
            continue
        change = CHANGES.get(step.kind())
        if change is None:
            return None
        weights = [
            part
            for weight in made.weights
            for part in (change(weight, step) if made.takes(weight, step) else [weight])
        ]
        made = dataclasses.replace(
            made, weights=tuple(weights), slack=made.slack + slack(step, len(made.weights))
        )
    moved = {
        weight.origin: weight.name
        for weight in made.weights
        if weight.name != weight.origin and not weight.others
    }  # the last of several
    return dataclasses.replace(made, rest=tuple(moved_bias(entry, moved) for entry in made.rest))


def slack(step: Step, weights: int) -> int:
    """Return the bytes of header that a step may add: ranks that are shared out by values make other layers
    two than uniform ones.
    """
    return 256 * weights if getattr(step, "rank_allocation", "uniform") != "uniform" else 0


def moved_bias(entry: Entry, moved: dict[str, str]) -> Entry:
    """Return a bias, or what rounds inputs, under the name that it has once its layer is several.

    `moved` has the names of the modules that hold it now.
    """
    owner, _, last = entry.name.rpartition(".")
    return (
        dataclasses.replace(entry, name=f"{moved[owner]}.{last}")
        if last in {"bias", *BUFFERS} and owner in moved
        else entry
    )


def lowrank(weight: Weight, step: Any) -> list[Weight]:
    """Return the factors of a weight, or the weight where they save nothing.

    Shared out, uniform ranks stand for all.
    """
    shape = weight.form_shape
    form = form_for(shape, step.conv, step.rank_ratio)
    if weight.others or cost(shape, form) >= weight.count:
        return [weight]
    return [
        part(weight, str(index), stored, form.ranks[min(index, len(form.ranks) - 1)])
        for index, stored in enumerate(factor_shapes(shape, form))
    ]


def part(weight: Weight, name: str, stored: tuple[int, ...], rank: int) -> Weight:
    """Return one of the weights that take the place of another."""
    return Weight(
        f"{weight.origin}.{name}",
        weight.origin,
        stored,
        stored[0],
        math.prod(stored[1:]),
        weight.dtype,
        rank=rank,
        table=weight.table and name == "0",
    )


def repair(weight: Weight, step: Any) -> list[Weight]:
    """Return the weight with two small ones beside it, where something was lost and they take less than the
    weight itself.
    """
    rank = step.rank(weight.rows, weight.columns)
    untouched = weight.kept is None and not weight.bits
    if (
        untouched
        or weight.table
        or weight.others
        or weight.rank is not None
        or rank * (weight.rows + weight.columns) >= weight.count
    ):
        return [weight]
    first, second = factor_shapes(weight.form_shape, Form("channel", (rank,)))
    return [
        part(weight, "first", first, rank),
        part(weight, "second", second, rank),
        dataclasses.replace(weight, name=f"{weight.origin}.base"),
    ]


def prune(weight: Weight, step: Any) -> list[Weight]:
    """Return the weight with as many kept as the step leaves."""
    if step.group is not None:
        kept, of = step.group
        return (
            [weight] if weight.columns % of else [dataclasses.replace(weight, kept=weight.count * kept // of)]
        )
    return [
        dataclasses.replace(
            weight,
            kept=weight.count - round(step.sparsity * weight.count),
            estimated=step.allocation != "uniform",
        )
    ]


def quantize(weight: Weight, step: Any) -> list[Weight]:
    """Return the weight in its stored form, or as it is where the groups do not divide it."""
    group = step.group_size or weight.columns
    if weight.columns % group:
        return [weight]
    if step.number_format in HALVES:
        return [dataclasses.replace(weight, bits=16, cast=HALVES[step.number_format])]
    integer, hqq = step.number_format == "integer", step.rounding == "hqq"
    made = dataclasses.replace(
        weight,
        bits=step.weight_bits,
        groups=weight.columns // group,
        scale_rows=int(step.granularity == "tensor"),
        scale_dtype="F32" if step.number_format == "float8" else "F16",
        zero_point=integer and step.grid == "asymmetric",
        whole_zeros=not hqq,
        needs_mask=hqq and weight.kept is not None,
        input_scale=step.rounding == "awq" and not weight.table,
        estimated=weight.estimated or step.mixed,
    )
    return [made]


def distill(weight: Weight, step: Any) -> list[Weight]:  # noqa: ARG001  training changes no shape
    """Return the weight: training moves values, not shapes."""
    return [weight]


CHANGES = {
    "lowrank": lowrank,
    "prune": prune,
    "quantize": quantize,
    "repair": repair,
    "distill": distill,
    "qat": distill,
    "transfer": distill,
    "kvcache": distill,
}
