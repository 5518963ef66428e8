"""The tensors that a form is stored as beside its codes, and the form back from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.formats.affine import Grid
from workbench.formats.bit_packing import pack, unpack
from workbench.formats.number_format import OFFSET
from workbench.formats.number_formats import FORMATS
from workbench.formats.stored_forms import (
    Cast,
    FloatGrid,
    Form,
    InputScaled,
    OffsetGrid,
)
from workbench.util.text import nearest

INTEGER = "integer"  # number format of integer codes


def format_of(form: Form) -> str:
    """Return the name of the number format of a form's codes."""
    if isinstance(form, InputScaled):
        return format_of(form.base)
    if isinstance(form, FloatGrid):
        return form.number_format
    return OFFSET if isinstance(form, OffsetGrid) else INTEGER


def codes_of(form: Form) -> Tensor:
    """Return the codes of a form, uint8 [outputs, inputs]; 16-bit numbers are their own."""
    if isinstance(form, InputScaled):
        return form.base.codes
    return form.values if isinstance(form, Cast) else form.codes


def side_tensors(form: Form) -> dict[str, Tensor]:
    """Return the tensors that are stored beside the codes, by suffix of their names: `.scale`, `.zero_point`
    (of a `Grid` packed), `.input_scale`.
    """
    if isinstance(form, InputScaled):
        return side_tensors(form.base) | {".input_scale": form.input_scale}
    if isinstance(form, Cast):
        return {}
    tensors = {".scale": form.scale}
    if isinstance(form, OffsetGrid):
        tensors[".zero_point"] = form.zero_point
    elif isinstance(form, Grid) and form.zero_point is not None:
        tensors[".zero_point"] = pack(form.zero_point, form.bits)
    return tensors


@dataclass(frozen=True)
class Codes:
    """Codes as they were stored: uint8 [outputs, inputs], or with `kept` (bool [outputs, inputs]) those of
    the weights that it marks, in order.

    `scales` is the shape of the scales.
    """

    codes: Tensor
    kept: Tensor | None
    bits: int
    number_format: str
    scales: tuple[int, int]

    def whole(self, zero: Tensor) -> Tensor:
        """Return uint8 [outputs, inputs]: the codes at their places, and `zero` (broadcasts) elsewhere."""
        if self.kept is None:
            return self.codes
        whole_codes = zero.to(torch.uint8).expand(self.kept.shape).clone()
        whole_codes[self.kept] = self.codes
        return whole_codes


def restored(stored: Codes, sides: dict[str, Tensor]) -> Form:
    """Return the form that was stored. sides: by suffix, as from `side_tensors`.

    Raises:
        ValueError: a tensor of the wrong length, or an unknown number format.
        KeyError: a tensor is missing.

    """
    base = base_form(stored, sides)
    if ".input_scale" not in sides or isinstance(base, OffsetGrid):
        return base
    return InputScaled(base, sides[".input_scale"])


def base_form(stored: Codes, sides: dict[str, Tensor]) -> Grid | FloatGrid | OffsetGrid:
    """Return the form without multipliers of inputs."""
    scale, kind = sides[".scale"].view(stored.scales), stored.number_format
    if kind == OFFSET:
        return OffsetGrid(
            stored.whole(torch.tensor(0)),
            scale,
            sides[".zero_point"].view(stored.scales),
            stored.bits,
            stored.kept,
        )
    if kind != INTEGER:
        if kind not in FORMATS:
            raise ValueError(f"unknown number format {kind!r}; {nearest(kind, FORMATS.names())}")
        return FloatGrid(stored.whole(torch.tensor(FORMATS[kind].zero())), scale, kind)
    packed = sides.get(".zero_point")
    zero_point = None if packed is None else unpack(packed, stored.bits, scale.numel()).view(stored.scales)
    if stored.kept is None or zero_point is None:
        return Grid(stored.whole(torch.tensor(1 << (stored.bits - 1))), scale, zero_point, stored.bits)
    return Grid(
        stored.whole(zero_point.repeat_interleave(stored.kept.shape[1] // stored.scales[1], 1)),
        scale,
        zero_point,
        stored.bits,
    )
