"""The forms that a stored weight can have besides the affine integers of `Grid`, and what all of them share.

Every form has `bits` (a weight's width), `dequantize()` (float32 [outputs, inputs]: the same operations
everywhere, so the same bits), `snap(matrix)` (the same scales with the nearest codes) and `overhead_bits`
(what scales and the like take). Zero can be represented exactly in each, so that pruned weights stay zero.
Tensors may have one more dimension in front: layers of one shape together (`stacked`, `split`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from workbench.formats.affine import Grid
from workbench.formats.number_format import NumberFormat
from workbench.formats.number_formats import FORMATS


@dataclass(frozen=True)
class FloatGrid:
    """weight[o, i] = number(codes[o, i]) * scale[o, g]: small numbers of a registered number format.

    `codes` uint8 [outputs, inputs]; `scale` [outputs, groups] or [1, 1], in the format's `scale_dtype`
    (float16 where the range allows, else float32).
    """

    codes: Tensor
    scale: Tensor
    number_format: str

    @property
    def bits(self) -> int:
        """Return the width of a code."""
        return int(self.format.bits or 0)

    @property
    def format(self) -> NumberFormat:
        """Return the number format of its codes."""
        return FORMATS[self.number_format]

    @property
    def overhead_bits(self) -> int:
        """Return the bits that scales take."""
        return 8 * self.scale.nbytes

    def dequantize(self) -> Tensor:
        """Return the weights as float32 [outputs, inputs]."""
        grouped = self.format.decoded(self.codes).unflatten(-1, (self.scale.shape[-1], -1))
        weights: Tensor = grouped * self.scale.float().unsqueeze(-1)
        return weights.flatten(-2)

    def snap(self, matrix: Tensor) -> FloatGrid:
        """Return the same scales with the codes nearest to `matrix` (float32 [outputs, inputs])."""
        scaled = matrix.unflatten(-1, (self.scale.shape[-1], -1)) / self.scale.float().unsqueeze(-1)
        return FloatGrid(self.format.encoded(scaled).flatten(-2), self.scale, self.number_format)


@dataclass(frozen=True)
class OffsetGrid:
    """weight[o, i] = (codes[o, i] - zero_point[o, g]) * scale[o, g] with zero points that are no integers
    (HQQ).

    Zero is then on no grid of its own: `kept` (bool [outputs, inputs], or None) says which weights a mask has
    left, and all others are zero; it is stored, one bit a weight. Scales and zero points are float16 where
    the range allows, else float32.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    kept: Tensor | None = None

    @property
    def overhead_bits(self) -> int:
        """Return the bits that scales, zero points and the mask take."""
        return 8 * (self.scale.nbytes + self.zero_point.nbytes) + (
            0 if self.kept is None else self.kept.numel()
        )

    def dequantize(self) -> Tensor:
        """Return the weights as float32 [outputs, inputs]."""
        grouped = self.codes.unflatten(-1, (self.scale.shape[-1], -1)).float()
        weights: Tensor = (grouped - self.zero_point.float().unsqueeze(-1)) * self.scale.float().unsqueeze(-1)
        return weights.flatten(-2) if self.kept is None else weights.flatten(-2) * self.kept

    def snap(self, matrix: Tensor) -> OffsetGrid:
        """Return the same scales and zero points with the codes nearest to `matrix` (float32 [outputs,
        inputs]).
        """
        scaled = matrix.unflatten(-1, (self.scale.shape[-1], -1)) / self.scale.float().unsqueeze(-1)
        codes = (scaled + self.zero_point.float().unsqueeze(-1)).round_().clamp_(0, (1 << self.bits) - 1)
        return dataclasses.replace(self, codes=codes.to(torch.uint8).flatten(-2))


@dataclass(frozen=True)
class Cast:
    """Weights as 16-bit floating-point numbers: `values` float16 or bfloat16 [outputs, inputs]. No scales."""

    values: Tensor

    @property
    def bits(self) -> int:
        """Return 16."""
        return 16

    @property
    def overhead_bits(self) -> int:
        """Return 0."""
        return 0

    def dequantize(self) -> Tensor:
        """Return the weights as float32 [outputs, inputs]."""
        return self.values.float()

    def snap(self, matrix: Tensor) -> Cast:
        """Return the nearest 16-bit numbers."""
        return Cast(matrix.to(self.values.dtype))


@dataclass(frozen=True)
class InputScaled:
    """weight[o, i] = base[o, i] * input_scale[i]: a form whose inputs are multiplied first (AWQ).

    `input_scale` float16 [inputs].

    The multiplier is kept with the weight instead of being folded into the layer in front, so that every
    layer can have its own: those that share an input, and those with a nonlinearity or a sum in front. A
    kernel multiplies the inputs by it.
    """

    base: Grid | FloatGrid
    input_scale: Tensor

    @property
    def bits(self) -> int:
        """Return the width of a code."""
        return self.base.bits

    @property
    def overhead_bits(self) -> int:
        """Return the bits that scales, zero points and multipliers take."""
        return self.base.overhead_bits + 8 * self.input_scale.nbytes

    def dequantize(self) -> Tensor:
        """Return the weights as float32 [outputs, inputs]."""
        return self.base.dequantize() * self.input_scale.float().unsqueeze(-2)

    def snap(self, matrix: Tensor) -> InputScaled:
        """Return the same scales with the codes nearest to `matrix` (float32 [outputs, inputs])."""
        return InputScaled(self.base.snap(matrix / self.input_scale.float().unsqueeze(-2)), self.input_scale)


Form = Grid | FloatGrid | OffsetGrid | Cast | InputScaled


def kind_of(form: Form | None) -> Hashable:
    """Return a key that is equal for forms that can be stacked: class, widths, shapes and which parts they
    have.
    """
    if form is None:
        return None
    return type(form), *(field_kind(getattr(form, field.name)) for field in dataclasses.fields(form))


def field_kind(value: Any) -> Hashable:
    """Return one field's part of the key of `kind_of`; scales of either precision may stand together."""
    if isinstance(value, Tensor):
        return (
            (value.shape, value.is_floating_point())
            if value.dtype in {torch.float16, torch.float32}
            else (value.shape, value.dtype)
        )
    return kind_of(cast("Form", value)) if dataclasses.is_dataclass(value) else cast("Hashable", value)


def stacked(forms: Sequence[Form]) -> Form:
    """Return forms of one kind as one, whose tensors have the layers in front.

    Scales become float32, which changes no value.
    """
    return cast("Form", stack_any(forms))


def stack_any(members: Sequence[Any]) -> Any:
    """Return members of one kind as one: tensors [...] stacked to [members, ...], dataclasses field by field,
    anything else as in the first.
    """
    first = members[0]
    if isinstance(first, Tensor):
        mixed = len({part.dtype for part in members}) > 1
        return torch.stack([part.float() for part in members] if mixed else list(members))
    if dataclasses.is_dataclass(first):
        make: Any = type(first)
        return make(
            **{
                field.name: stack_any([getattr(part, field.name) for part in members])
                for field in dataclasses.fields(first)
            }
        )
    return first


def split(form: Any, half: Sequence[bool]) -> list[Any]:
    """Return the layers of a stacked form, each of its own.

    Float32 scales become float16 in the layers where `half` says so.

    Where that is all of them they are converted at once: a GPU is not asked once a layer.
    """
    columns: dict[str, list[Any]] = {}
    for field in dataclasses.fields(form):
        value = getattr(form, field.name)
        if isinstance(value, Tensor):
            narrow = value.dtype == torch.float32 and field.name in {"scale", "zero_point"}
            whole = value.half() if narrow and all(half) else value
            columns[field.name] = [
                part.half() if narrow and small else part
                for part, small in zip(whole.unbind(0), half, strict=True)
            ]
        else:
            columns[field.name] = (
                split(value, half) if dataclasses.is_dataclass(value) else [value] * len(half)
            )
    return [
        type(form)(**{name: layers[index] for name, layers in columns.items()}) for index in range(len(half))
    ]


def effective_bits(forms: Iterable[tuple[Form | None, int, int]]) -> float:
    """Return the bits a weight that weights take with everything needed to read them: codes, scales, zero
    points, multipliers.

    forms: (form or None for dense, number of weights, bits of a dense weight) of each layer. Masks that are
    stored to leave zeros out are not counted, nor are the codes that this saves: `packed_bytes` says what a
    pruned model takes.
    """
    bits = weights = 0
    for form, count, dense in forms:
        bits += count * dense if form is None else count * form.bits + form.overhead_bits
        weights += count
    return bits / weights if weights else 0.0
