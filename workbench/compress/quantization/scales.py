"""The scales of stored weights: the range of each group that makes its squared rounding error least, for
every form.

Stacks are float32 [layers, outputs, inputs]; scales [layers, outputs, groups], or [layers, 1, 1] for one
scale a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from workbench.formats.affine import Grid, nearest_codes
from workbench.formats.number_format import NumberFormat
from workbench.formats.number_formats import FORMATS
from workbench.formats.stored_forms import Cast, FloatGrid, Form, split
from workbench.kernels import weight_passes

Ranges: TypeAlias = tuple[Tensor, Tensor]  # of groups, float32 [layers, outputs, groups] each

SHRINKS = 24  # candidates of the scale search: from the full range down to 40% of it


@dataclass(frozen=True)
class Spec:
    """What weights are rounded to: `number_format` as in `Quantize`.

    `group_size` 0 for one scale a row, or one a tensor with `whole`.
    """

    bits: int
    group_size: int = 0
    number_format: str = "integer"
    symmetric: bool = False
    search: bool = True
    whole: bool = False

    def grouped(self, stack: Tensor) -> Tensor:
        """Return a view [layers, outputs, groups, inputs of a group] of a stack.

        [layers, 1, 1, all] for one scale a tensor.
        """
        return (
            stack.flatten(1)[:, None, None]
            if self.whole
            else stack.unflatten(2, (-1, self.group_size or stack.shape[2]))
        )

    @property
    def format(self) -> NumberFormat:
        """Return the number format of the codes."""
        return FORMATS[self.number_format]

    @property
    def levels(self) -> int:
        """Return the largest code of an integer grid."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Scales:
    """Fitted scales of some layers: `scale` float32, `zero` uint8 of the same shape (None: symmetric, or no
    integers).

    `half` says in which layers every scale is a float16 number.
    """

    scale: Tensor
    zero: Tensor | None
    half: tuple[bool, ...]


def ranges(stack: Tensor, spec: Spec) -> Ranges:
    """Return the least weight of each group, at most 0, and the largest, at least 0, both [layers, rows,
    groups]: the same at every width.
    """
    groups = spec.grouped(stack)
    return groups.amin(3).clamp_max(0), groups.amax(3).clamp_min(0)


def ranges_in_place(weights: list[Tensor], spec: Spec) -> Ranges:
    """Return (least, largest) of each group, as `ranges`, by a kernel that reads the weights where they lie,
    where `in_place` says so.
    """
    return weight_passes.extremes(weights, spec.group_size or weights[0].shape[1])


def fit(stack: Tensor, spec: Spec, extremes: Ranges | None = None) -> Scales:
    """Return the scales of least squared error among the candidate ranges: the full one, or with `search` 24
    down to 40% of it. `extremes`: what `ranges` returns, None to look.
    """
    groups, (low, high) = spec.grouped(stack), extremes or ranges(stack, spec)

    def best(scales: Tensor, zeros: Tensor | None) -> Tensor:
        errors = [
            rounding_error(groups, scale, None if zeros is None else zeros[place], spec)
            for place, scale in enumerate(scales)
        ]
        return torch.stack(errors).argmin(0, keepdim=True)

    return among(low, high, spec, best)


def fit_in_place(weights: list[Tensor], spec: Spec, extremes: Ranges | None = None) -> Scales:
    """Return the scales of integers, as `fit`, by kernels that read the weights where they lie (see
    `workbench.kernels.weight_passes`). Sums of squares differ in their last digits, so that of candidates
    that are as good another one may be taken.
    """
    return among(
        *(extremes or ranges_in_place(weights, spec)),
        spec,
        lambda scales, zeros: weight_passes.search(weights, scales, zeros, spec.bits),
    )


def in_place(spec: Spec, columns: int) -> bool:
    """Return whether `fit_in_place` fits matrices of so many inputs."""
    return spec.format.affine and not spec.whole and (spec.group_size or columns) <= weight_passes.WIDEST


def among(low: Tensor, high: Tensor, spec: Spec, best: Callable[[Tensor, Tensor | None], Tensor]) -> Scales:
    """Return the best scales for ranges [low, high], [layers, outputs, groups] each.

    `best` is given candidates for scales and zero points, [candidates, layers, outputs, groups], and returns
    which one each group takes, int64 [1, layers, outputs, groups]: of equal ones the first, the widest range.
    """
    search = spec.search and spec.format.searches
    shrinks = torch.linspace(1.0, 0.4, SHRINKS) if search else torch.ones(1)
    half = (
        torch.zeros_like(low[:, :1, :1], dtype=torch.bool)
        if spec.format.scale_dtype == torch.float32
        else fit_half(widest_scale(low, high, spec), float(shrinks[-1]))
    )
    factors = shrinks.to(low.device)[:, None, None, None]
    scales, zeros = affine(
        low * factors, high * factors, half, spec
    )  # [candidates, layers, outputs, groups]: few kernels for all of them
    if not search:
        return Scales(scales[0], None if zeros is None else zeros[0], tuple(half.flatten().tolist()))
    chosen = best(scales, zeros)
    return Scales(
        scales.gather(0, chosen)[0],
        None if zeros is None else zeros.gather(0, chosen)[0],
        tuple(half.flatten().tolist()),
    )


def rounding_error(groups: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec) -> Tensor:
    """Return the norm of the rounding error of each group, [..., groups]. groups: [..., groups, inputs of a
    group].
    """
    wide = scale.unsqueeze(-1)
    if spec.format.affine:
        rounded = clamp((groups / wide).round_(), None if zero is None else zero.unsqueeze(-1), spec)
    else:
        rounded = spec.format.decoded(spec.format.encoded(groups / wide))
    error: Tensor = torch.linalg.vector_norm(torch.addcmul(groups, rounded, wide, value=-1), dim=-1)
    return error


def clamp(steps: Tensor, zero: Tensor | None, spec: Spec) -> Tensor:
    """Return whole multiples of a scale, of any shape, brought onto the grid in place. zero: like `steps`, or
    None for symmetric.
    """
    if zero is None:
        middle = 1 << (spec.bits - 1)
        return steps.clamp_(-middle, middle - 1)
    below: Tensor = zero.float().neg_()
    return steps.clamp_(below, below + spec.levels)


def widest_scale(low: Tensor, high: Tensor, spec: Spec) -> Tensor:
    """Return the scales that cover [low, high] (low <= 0 <= high), 0 for an all-zero group; same shape."""
    if not spec.format.affine:
        return torch.maximum(-low, high) / spec.format.most()
    if spec.symmetric:
        return torch.maximum(-low / (1 << (spec.bits - 1)), high / ((1 << (spec.bits - 1)) - 1))
    return (high - low) / spec.levels


def fit_half(scale: Tensor, shrink: float) -> Tensor:
    """Return whether all of a layer's scales, and these times `shrink`, lie in the normal range of float16:
    bool [layers, 1, 1].
    """
    least, most = 2.0**-14, 65504.0
    return (((scale == 0) | (scale * shrink >= least)) & (scale <= most)).flatten(1).all(1)[:, None, None]


def affine(low: Tensor, high: Tensor, half: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero point) that cover [low, high] (both [layers, outputs, groups], low <= 0 <= high).

    Scales are float32, rounded to what float16 holds in the layers where `half` [layers, 1, 1] says so; 1 for
    an all-zero group.
    """
    scale = widest_scale(low, high, spec)
    scale = torch.where(scale > 0, torch.where(half, scale.half().float(), scale), torch.ones_like(scale))
    if spec.symmetric or not spec.format.affine:
        return scale, None
    return scale, torch.round(-low / scale).clamp_(0, spec.levels).to(torch.uint8)


def form_of(stack: Tensor, scales: Scales | None, spec: Spec) -> Form:
    """Return the stacked form nearest to the weights [layers, rows, columns].

    `scales` is None for 16-bit numbers, which have none.
    """
    if scales is None:
        return Cast(stack.to(spec.format.cast))
    if spec.format.affine:
        return Grid(
            nearest_codes(stack, scales.scale, scales.zero, spec.bits), scales.scale, scales.zero, spec.bits
        )
    return FloatGrid(torch.empty(0), scales.scale, spec.number_format).snap(stack)


def fit_grids(stack: Tensor, bits: int, group_size: int, *, symmetric: bool, search: bool) -> list[Grid]:
    """Return the integer grid of each layer of a stack: `fit` and `form_of`, and one `Grid` a layer."""
    spec = Spec(bits, group_size, symmetric=symmetric, search=search)
    scales = fit(stack, spec)
    return split(form_of(stack, scales, spec), scales.half)
