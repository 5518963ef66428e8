"""What a product of 8-bit integers needs of a layer, and whether the layer has it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.formats.affine import Grid
from workbench.modules.input_quantizer import QuantizesInputs
from workbench.util.device import cpu_flags

if TYPE_CHECKING:
    from workbench.formats.stored_forms import Form
    from workbench.modules.layer import Layer


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as signed bytes: weight[o, i] = (codes[o, i] - zero[o]) * scale[o].

    `codes` int8 [outputs, inputs], `zero` int8, `scale` float32.
    """

    codes: Tensor
    zero: Tensor
    scale: Tensor

    @property
    def symmetric(self) -> bool:
        """Return whether every zero point is 0."""
        return not bool(self.zero.any())


def why_not_int8(layer: Layer) -> str:
    """Return why a layer's product cannot be one of 8-bit integers, "" if it can; looks at no value."""
    module = layer.module
    if not isinstance(module, QuantizesInputs):
        return "its inputs are not quantized"
    if module.activation_format != "integer":
        return f"its inputs are {module.activation_format}, not integers"
    if isinstance(module, nn.Conv2d) and (
        module.padding_mode != "zeros" or isinstance(module.padding, str) or module.groups != 1
    ):
        return "only plain convolutions, padded with zeros by numbers, are served"
    return why_no_bytes(layer.grid)


def why_no_bytes(grid: Form | None) -> str:
    """Return why stored weights are no bytes with one scale a row, "" if they are."""
    if grid is None:
        return "its weights are not quantized"
    if not isinstance(grid, Grid):
        return f"its weights are no plain integers ({type(grid).__name__})"
    if grid.scale.shape[-1] != 1:
        return (
            f"its weights have a scale for every {grid.group_size} inputs; one for each row (group_size 0) is"
            " needed"
        )
    return ""


def integer_weight(layer: Layer) -> IntegerWeight:
    """Return the weight of a layer that `why_not_int8` finds no fault with, on the device of its codes."""
    grid = layer.grid
    if not isinstance(grid, Grid):
        raise TypeError(f"layer {layer.name!r} has no integer weights")
    middle = 1 << (grid.bits - 1)
    rows = grid.codes.shape[0]
    zero = torch.zeros(rows, dtype=torch.int8, device=grid.codes.device)
    if grid.zero_point is not None:
        zero = (grid.zero_point.to(torch.int16) - middle).to(torch.int8).flatten().expand(rows).contiguous()
    return IntegerWeight(
        (grid.codes.to(torch.int16) - middle).to(torch.int8),
        zero,
        grid.scale.float().flatten().expand(rows).contiguous(),
    )


def plain(layer: Layer) -> QuantizesInputs:
    """Return the module of a layer that rounds its inputs."""
    if not isinstance(layer.module, QuantizesInputs):
        raise TypeError(f"layer {layer.name!r} does not round its inputs")
    return layer.module


def slow_integers() -> str:
    """Return why products of integers gain nothing on this CPU, "" where it has the instructions for them."""
    flags = cpu_flags()
    if not flags or flags & {"avx2", "avx512_vnni", "avx_vnni", "asimddp", "i8mm"}:
        return ""
    return (
        f"this CPU ({platform.machine()}) has no instructions for products of bytes (AVX2, VNNI or dot"
        " product)"
    )


def wide_bytes() -> bool:
    """Return whether products of unsigned by signed bytes add up without overflow here: VNNI, or not an x86
    at all.
    """
    flags = cpu_flags()
    return (
        not flags
        or platform.machine().lower() not in {"x86_64", "amd64"}
        or bool(flags & {"avx512_vnni", "avx_vnni"})
    )
