"""Quantize: store weights as small integers with a scale per row or group."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.compress.work import Work
from workbench.errors import CompressionError
from workbench.recipe import METHODS, Step, configuration
from workbench.runtime.grid import Grid, nearest_codes

SHRINKS = 24  # candidates of the scale search: from the full range down to 40% of it


@configuration
class Quantize(Step):
    """Round each weight to the nearest point of an affine grid (round-to-nearest, RTN) with a scale search.

    One scale a row (`group_size` 0) or one for every `group_size` consecutive inputs. The search tries ranges from the full
    one down to 40% of it and keeps the one with the least squared error of the weights. Zero is always on the grid, so a
    pruned weight stays zero.

    What it does not do: use activations (GPTQ, AWQ), quantize activations, or make anything faster where no kernel for this
    width exists; weights are unpacked before the product then.
    """

    slider: ClassVar[str] = "weight_bits"
    position: ClassVar[int] = 30
    stops: ClassVar[tuple[float, ...]] = (2, 3, 4, 6, 8)

    weight_bits: Annotated[int, Field(ge=2, le=8, description="bits per weight")] = 4
    group_size: Annotated[int, Field(ge=0, le=65536, description="inputs that share a scale; 0 means one scale per row")] = 0
    grid: Annotated[Literal["symmetric", "asymmetric"], Field(description="whether the grid has a zero point per group")] = "asymmetric"
    scale_search: Annotated[bool, Field(description="search the range with the least squared error; off: the full range")] = True

    def label(self) -> str:
        """Return such as `W4` or `W4 g64`."""
        return f"W{self.weight_bits}" + (f" g{self.group_size}" if self.group_size else "")


@METHODS.register(Quantize)
def quantize(step: Quantize, work: Work) -> None:
    """Round weights and leave the grid as a promise to later steps."""
    for layer in work.select(step):
        matrix = layer.matrix()
        columns = matrix.shape[1]
        group = step.group_size or columns
        if columns % group:
            work.say(layer, f"quantize skipped: group_size {group} does not divide its {columns} inputs")
            continue
        if not torch.isfinite(matrix).all():
            raise CompressionError(f"layer {layer.name!r} has infinite or NaN weights")
        layer.grid = fit_grid(matrix, step.weight_bits, group, symmetric=step.grid == "symmetric", search=step.scale_search)
        layer.write(layer.grid.dequantize())
        work.took(step, layer, f"{step.label()} {step.grid}")


def fit_grid(matrix: Tensor, bits: int, group_size: int, *, symmetric: bool, search: bool) -> Grid:
    """Return the grid of least squared error among the candidates. matrix: float32 [outputs, inputs]."""
    rows, columns = matrix.shape
    groups = matrix.view(rows, columns // group_size, group_size)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scale, zero_point = affine(low, high, bits, symmetric=symmetric)
    if search:
        best = squared_error(groups, scale, zero_point, bits)
        for shrink in torch.linspace(1.0, 0.4, SHRINKS).tolist()[1:]:
            new_scale, new_zero = affine(low * shrink, high * shrink, bits, symmetric=symmetric)
            error = squared_error(groups, new_scale, new_zero, bits)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, new_scale, scale)
            zero_point = None if zero_point is None or new_zero is None else torch.where(better, new_zero, zero_point)
    return Grid(nearest_codes(matrix, scale, zero_point, bits), scale, zero_point, bits)


def squared_error(groups: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the squared rounding error of each group, [outputs, groups]. groups: [outputs, groups, group_size]."""
    wide = scale.float().unsqueeze(2)
    zero = float(1 << (bits - 1)) if zero_point is None else zero_point.float().unsqueeze(2)
    rounded = (groups / wide).round_().add_(zero).clamp_(0, (1 << bits) - 1).sub_(zero).mul_(wide)
    return rounded.sub_(groups).square_().sum(2)


def affine(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero_point) that cover [low, high] (both [outputs, groups], low <= 0 <= high)."""
    levels = (1 << bits) - 1
    if symmetric:
        scale = torch.maximum(-low / (1 << (bits - 1)), high / ((1 << (bits - 1)) - 1))
        return storable(scale), None
    scale = storable((high - low) / levels)
    return scale, torch.round(-low / scale.float()).clamp_(0, levels).to(torch.uint8)


def storable(scale: Tensor) -> Tensor:
    """Return scales as they are stored: 1 for an all-zero group, float16 if no scale loses range in it, else float32."""
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    small, large = 2.0**-14, 65504.0  # the normal range of float16
    return scale.half() if bool((scale >= small).all() and (scale <= large).all()) else scale
