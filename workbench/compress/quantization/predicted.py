"""What quantization leaves and costs, before it is done: shapes, and how far outputs move."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from workbench.compress.core.layer_sample import LayerSample, conditional, relative, weighed
from workbench.compress.method import ErrorTable
from workbench.compress.quantization.options import Quantize
from workbench.compress.quantization.scales import Spec, fit, form_of
from workbench.modules.weight_shapes import DTYPES, Weight
from workbench.shapes.outline import Outline

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
AWQ = 0.8  # of the error of rounding to nearest, as a rule


def shapes(outline: Outline, step: Quantize) -> Outline:
    """Return the outline after quantization."""
    return outline.each(step, stored)


def stored(weight: Weight, step: Quantize) -> list[Weight]:
    """Return the weight in its stored form, or as it is where the groups do not divide it."""
    group = step.group_size or weight.columns
    if weight.columns % group:
        return [weight]
    if step.format.cast is not None:
        return [dataclasses.replace(weight, bits=8 * step.format.cast.itemsize, cast=step.format.cast)]
    hqq = step.rounding == "hqq"
    on_grid = dataclasses.replace(
        weight,
        bits=step.weight_bits,
        groups=weight.columns // group,
        scale_rows=int(step.granularity == "tensor"),
        scale_dtype=DTYPES[step.format.scale_dtype],
        zero_point=step.format.affine and step.grid == "asymmetric",
        whole_zeros=not hqq,
        needs_mask=hqq and weight.kept is not None,
        input_scale=step.rounding == "awq" and not weight.table,
        estimated=weight.estimated or step.mixed,
    )
    return [on_grid]


KEY = (
    "group_size",
    "grid",
    "scale_search",
    "rounding",
    "number_format",
    "granularity",
    "activation_order",
)  # options on which the errors depend, besides the width


def error_table(step: Quantize) -> ErrorTable:
    """Return the errors of rounded weights, at every width, or at the one that the format has.

    An average of widths counts as if every layer got it.
    """
    knots = WIDTHS if step.format.affine else (int(step.weight_bits),)
    key = tuple(getattr(step, name) for name in KEY)
    return ErrorTable(key, knots, lambda about: errors(step, knots, about))


def errors(step: Quantize, widths: tuple[int, ...], about: LayerSample) -> Tensor:
    """Return the errors of the sampled rows, rounded to each width, [knots]."""
    columns = about.weight.shape[1]
    if step.group_size and columns % step.group_size:
        return torch.zeros(len(widths), device=about.weight.device)
    stack = about.weight.unsqueeze(0)
    by_width = []
    for bits in widths:
        spec: Spec = step.spec(bits)
        scales = None if step.format.cast is not None else fit(stack, spec)
        rounded = form_of(stack, scales, spec).dequantize()
        by_width.append(weighed((rounded - stack)[0].float(), about))
    return relative(torch.stack(by_width), about) * rounding_share(step, about)


def rounding_share(step: Quantize, about: LayerSample) -> Tensor | float:
    """Return the share of the error of rounding to nearest that is left: for GPTQ tr(D) / tr(M) with M = U D
    U^T (Chee et al. 2023).
    """
    if step.rounding == "awq":
        return AWQ
    if step.rounding != "gptq":
        return 1.0
    order = about.moment.diagonal().argsort(descending=True) if step.activation_order else None
    total = about.moment.diagonal().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (conditional(about.moment, order).sum() / total).clamp(max=1.0)
