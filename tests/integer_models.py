"""One layer as a model, with integer weights and rounded inputs, and what it computes in float64, written
plainly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from workbench.formats.affine import Grid
from workbench.modules.input_quantizer import InputFormat, quantized_like
from workbench.modules.layer import Layer
from workbench.tasks.base import Items
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION

KIND = IMAGE_CLASSIFICATION


@dataclass
class Out(ModelOutput):
    logits: torch.Tensor | None = None


class One(nn.Module):
    """A model of one layer (and a BatchNorm2d after it) that is called like an image classifier."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, pixel_values):
        outputs = self.layer(pixel_values)
        return Out(logits=outputs if self.norm is None else self.norm(outputs))


def grid_for(outputs: int, inputs: int, bits: int, *, symmetric: bool, group: int = 0, seed: int = 0) -> Grid:
    """Random codes.

    The first row is all zero, the second one constant, scales differ by a factor of a thousand.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // (group or inputs)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    zero = (
        None
        if symmetric
        else torch.randint(0, 1 << bits, (outputs, groups), generator=generator, dtype=torch.uint8)
    )
    middle = torch.full((outputs, groups), 1 << (bits - 1), dtype=torch.uint8) if zero is None else zero
    codes[0] = middle[0].repeat_interleave(inputs // groups)
    codes[1] = 1
    return Grid(codes, (10 ** (3 * torch.rand(outputs, groups, generator=generator) - 4)).float(), zero, bits)


def layer_of(
    module: nn.Module, grid: Grid, inputs: InputFormat | None, smooth: torch.Tensor | None = None
) -> Layer:
    """The module with the weights of the grid, rounding what it reads."""
    fixed = (None, None)
    if inputs is not None and not inputs.dynamic:
        scale, zero = inputs.parameters(
            torch.tensor(-1.5), torch.tensor(2.0)
        )  # narrower than what comes: ends are clamped
        fixed = (scale, zero.to(torch.int32))
    rounding = module if inputs is None else quantized_like(module, inputs, smooth, *fixed)
    layer = Layer("layer", "layer", rounding, grid=grid)
    layer.write(grid.dequantize())
    return layer


def reference(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """The product in float64: inputs rounded one by one to codes, zero points taken off, multiplied, scaled.
    values [rows, inputs]."""
    module, grid = layer.module, layer.grid
    wide = values if getattr(module, "smooth", None) is None else values / module.smooth
    about = module.input_format
    least, most = about.codes
    rows = []
    low, high = float(wide.min().clamp_max(0)), float(wide.max().clamp_min(0))
    for row in wide:
        if about.dynamic and about.per_token:
            low, high = float(row.min().clamp_max(0)), float(row.max().clamp_min(0))
        if about.dynamic:
            span = torch.tensor(
                max(-low, high) / most if about.symmetric else (high - low) / (most - least),
                dtype=torch.float32,
            )
            scale = span if span > 0 else torch.ones(())
            zero = (
                0.0
                if about.symmetric
                else float((least - torch.tensor(low) / scale).round().clamp(least, most))
            )
        else:
            scale, zero = module.input_scale, float(module.input_zero)
        codes = ((row / scale).round() + zero).clamp(least, most)
        rows.append((codes.double() - zero) * scale.double())
    groups = grid.scale.shape[1]
    zeros = (
        torch.full((len(grid.codes), groups), float(1 << (grid.bits - 1)), dtype=torch.float64)
        if grid.zero_point is None
        else grid.zero_point.double()
    )
    each = grid.codes.shape[1] // groups
    weight = (grid.codes.double() - zeros.repeat_interleave(each, 1)) * grid.scale.double().repeat_interleave(
        each, 1
    )
    bias = 0.0 if module.bias is None else module.bias.double()
    return torch.stack(rows) @ weight.t() + bias


def items_of(values: torch.Tensor) -> Items:
    return Items({"pixel_values": values}, torch.zeros(len(values), dtype=torch.long))
