"""Quantize: store weights in fewer bits, as small integers or small floating-point numbers with a scale per
row or group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch, attempt, grouped, matrices_in_place
from workbench.compress.core.context import Work
from workbench.compress.core.moments import second_moment_of
from workbench.compress.method import SHARED_OUT, Reads
from workbench.compress.quantization import awq, gptq, hqq, mixed_precision, predicted, prior_grid
from workbench.compress.quantization.options import BY_INPUTS, Quantize
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
from workbench.formats.affine import Grid
from workbench.formats.stored_forms import Form, split
from workbench.kernels import column_solver, weight_passes
from workbench.kernels.column_solver import COLUMNS
from workbench.modules.layer import Layer

__all__ = ["SHRINKS", "Quantize", "fit_grids", "quantize"]


def reads(step: Quantize) -> frozenset[Reads]:
    """Return the statistics that a step reads."""
    statistics: set[Reads] = set()
    if step.rounding in BY_INPUTS or step.mixed:
        statistics.add("moments")
    if step.mixed:
        statistics.add("gradients")
    return frozenset(statistics)


@METHODS.register(
    Quantize,
    title="bits",
    shapes=predicted.shapes,
    errors=predicted.error_table,
    strength=lambda bits: min(1.0, (2.0 ** (2 - bits)) ** 0.5),
    trains=lambda _: False,
    placed=lambda step: SHARED_OUT if step.mixed else "",
    reads=reads,
    alone=True,
)
def quantize(step: Quantize, work: Work) -> None:
    """Round weights and leave their form as a promise to later steps."""
    layers = [layer for layer in work.choose(step) if divides(step, layer, work)]
    work.warnings += [note for note in prior_grid.notes(work.statistics) if note not in work.warnings]
    done = 0
    for bits, members in by_width(step, layers, work).items():
        for batch in of_one_sort(members, whole=in_place_all(step, members, bits)):
            work.progress(step.kind(), done, len(layers))
            attempt(batch, partial(quantize_batch, step, bits=bits, work=work))
            for layer in batch.layers:
                work.took(step, layer, words(step, layer, bits))
            done += len(batch.layers)
    work.progress(step.kind(), len(layers), len(layers))


def quantize_batch(step: Quantize, batch: Batch, bits: int, work: Work) -> None:
    """Round the weights of layers of one shape, and leave their forms."""
    form, half, values = rounded(step, batch, bits, work)
    for layer, own in zip(batch.layers, split(form, half), strict=True):
        layer.grid = own
    batch.put(values) if values else batch.write(form.dequantize())


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
    plain = step.format.affine and step.rounding == "rtn" and not spec.search
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
    nearest = step.format.affine and step.rounding != "hqq" and not by_inputs
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
        on_grid, codes = weight_passes.to_grid(weights, scales.scale, scales.zero, bits)
        return Grid(codes, scales.scale, scales.zero, bits), scales.half, on_grid
    return *solved(step, batch, spec, work, by_inputs=by_inputs), []


def solved(
    step: Quantize, batch: Batch, spec: Spec, work: Work, *, by_inputs: bool
) -> tuple[Form, tuple[bool, ...]]:
    """Return the stacked form of a batch's weights by plain operations, and in which layers its scales are
    float16 numbers.
    """
    stack = batch.matrices()
    if step.format.cast is not None:
        return form_of(stack, None, spec), (False,) * len(stack)
    if by_inputs and step.rounding == "awq":
        return awq.search(stack, torch.stack([second_moment_of(layer, work) for layer in batch.layers]), spec)
    scales = scales_of(lambda: fit_stack(stack, batch, spec, work), batch, spec, work)
    masks = batch.masks()
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


def scales_of(fitted: Callable[[], Scales], batch: Batch, spec: Spec, work: Work) -> Scales:
    """Return the scales of a batch; those of the dense weights are kept for the next move to this width."""
    if not all(layer.pristine for layer in batch.layers):
        return fitted()
    return work.statistics.once(
        ("scales", spec, tuple(layer.origin for layer in batch.layers)), fitted, lasting=True, optional=True
    )


def ranges_of(fresh: Callable[[], Ranges], batch: Batch, spec: Spec, work: Work) -> Ranges:
    """Return the ranges of a batch's groups; those of the dense weights are kept for the next width."""
    if not all(layer.pristine for layer in batch.layers):
        return fresh()
    return work.statistics.once(
        ("ranges", spec.group_size, spec.whole, tuple(layer.origin for layer in batch.layers)),
        fresh,
        optional=True,
    )


def words(step: Quantize, layer: Layer, bits: int) -> str:
    """Return a few words on the codes of a layer, for the report."""
    if step.format.cast is not None:
        return f"cast to {step.number_format}"
    said = [f"W{bits}" if step.format.affine else step.format.label]
    said += [f"g{step.group_size}"] * bool(step.group_size) + ["per tensor"] * (step.granularity == "tensor")
    said += [step.grid] * step.format.affine
    if step.rounding != "rtn":
        said.append(
            "rounded to nearest, as its inputs are looked up"
            if layer.table and step.rounding in BY_INPUTS
            else f"by {step.rounding}"
        )
    return " ".join(said) + (f" (of {step.weight_bits:g} on average)" if step.mixed else "")
