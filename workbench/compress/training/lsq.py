"""The gradients of rounding by its weights and by its step sizes: learned step size quantization (LSQ, Esser
et al. 2020).

With v = w / s, the gradient of the rounded weight by w is 1 where v lies within the codes and 0 where it is
clamped; by the step size s it is round(v) - v within, and the code at the end where it is clamped. It is
scaled by 1 / sqrt(weights that share s * largest code), so that step sizes and weights learn at rates of one
order.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from workbench.formats.affine import Grid
from workbench.formats.stored_forms import Cast, FloatGrid, Form, InputScaled, OffsetGrid

LEAST, MOST = 2.0**-14, 65504.0  # of step sizes that float16 stores in full precision


def steps_of(form: Form) -> Tensor | None:
    """Return the step sizes of a form, float32 [..., outputs, groups] or [..., 1, 1].

    None where it has none.
    """
    if isinstance(form, Cast):
        return None
    return form.base.scale.float() if isinstance(form, InputScaled) else form.scale.float()


def with_steps(form: Form, steps: Tensor, half: Tensor) -> Form:
    """Return the same form with other step sizes, float32.

    In the layers where `half` (bool [layers, 1, 1]) says so they are float16 numbers.
    """
    rounded = torch.where(half, steps.clamp(LEAST, MOST).half().float(), steps)
    if isinstance(form, Cast):
        return form
    if isinstance(form, InputScaled):
        return dataclasses.replace(form, base=dataclasses.replace(form.base, scale=rounded))
    return dataclasses.replace(form, scale=rounded)


def gradients(form: Form, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the gradient by the hidden weights, by the step sizes) for a gradient by the rounded weights.

    form: of `hidden`, float32 [layers, outputs, inputs], as `snap` rounded it; gradient: like `hidden`.
    """
    if isinstance(form, InputScaled):
        finer = form.input_scale.float().unsqueeze(-2)
        by_weight, by_step = gradients(form.base, hidden / finer, gradient * finer)
        return by_weight / finer, by_step
    assert not isinstance(form, Cast)  # noqa: S101  for the type checker: it has no step sizes
    groups = form.scale.shape[-1]
    wide = form.scale.float().unsqueeze(-1)
    steps = hidden.unflatten(-1, (groups, -1)) / wide
    inside = within(form, steps)
    rounded = form.dequantize().unflatten(-1, (groups, -1)) / wide
    along = gradient.unflatten(-1, (groups, -1))
    by_step = ((rounded - steps * inside) * along).sum(-1).sum_to_size(form.scale.shape)
    shared = hidden.shape[-1] * hidden.shape[-2] / (form.scale.shape[-1] * form.scale.shape[-2])
    return (along * inside).flatten(-2), by_step / (shared * largest_code(form)) ** 0.5


def within(form: Grid | FloatGrid | OffsetGrid, steps: Tensor) -> Tensor:
    """Return which weights, in steps, lie within the codes and are not clamped.

    [..., outputs, groups, inputs of a group].
    """
    if isinstance(form, FloatGrid):
        return steps.abs() <= form.format.most()
    zero = (
        form.zero_point.float().unsqueeze(-1) if form.zero_point is not None else float(1 << (form.bits - 1))
    )
    codes = steps + zero
    return (codes >= 0) & (codes <= (1 << form.bits) - 1)


def largest_code(form: Grid | FloatGrid | OffsetGrid) -> float:
    """Return the largest number before scaling, for a grid with its zero in the middle."""
    if isinstance(form, FloatGrid):
        return form.format.most()
    return float((1 << (form.bits - 1)) - 1)
