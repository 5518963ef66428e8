"""Quantize: store weights as small integers with a scale per row or group."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.compress.batch import batches
from workbench.compress.work import Work
from workbench.errors import RecipeError
from workbench.recipe import METHODS, About, Step, configuration
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
    about: ClassVar[tuple[About, ...]] = (
        About("grid, group_size", "round to nearest", "nothing", "one pass", "rounds each weight alone"),
        About("scale_search", "least squared error over 24 ranges", "nothing", "24 passes", "sees weights only, not inputs"),
    )  # fmt: skip

    weight_bits: Annotated[int, Field(ge=2, le=8, description="bits per weight")] = 4
    group_size: Annotated[int, Field(ge=0, le=65536, description="inputs that share a scale; 0 means one scale per row")] = 0
    grid: Annotated[Literal["symmetric", "asymmetric"], Field(description="whether the grid has a zero point per group")] = "asymmetric"
    scale_search: Annotated[bool, Field(description="search the range with the least squared error; off: the full range")] = True

    def label(self) -> str:
        """Return such as `W4` or `W4 g64`."""
        return f"W{self.weight_bits}" + (f" g{self.group_size}" if self.group_size else "")

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse quantization after repair."""
        if any(step.kind() == "repair" for step in earlier):
            raise RecipeError("Quantize cannot follow Repair: what it rounds would not be repaired; put Repair after it")


@METHODS.register(Quantize)
def quantize(step: Quantize, work: Work) -> None:
    """Round weights and leave the grid as a promise to later steps."""
    for batch in batches(step, work):
        columns = batch.shape[1]
        group = step.group_size or columns
        if columns % group:
            for layer in batch.layers:
                work.say(layer, f"quantize skipped: group_size {group} does not divide its {columns} inputs")
            continue
        grids = fit_grids(batch.matrices(), step.weight_bits, group, symmetric=step.grid == "symmetric", search=step.scale_search)
        for layer, grid in zip(batch.layers, grids, strict=True):
            layer.grid = grid
            work.took(step, layer, f"{step.label()} {step.grid}")
        batch.write(batch.grids().dequantize())


def fit_grids(stack: Tensor, bits: int, group_size: int, *, symmetric: bool, search: bool) -> list[Grid]:
    """Return the grid of least squared error among the candidates, for each layer. stack: float32 [layers, outputs, inputs]."""
    groups = stack.unflatten(2, (-1, group_size))
    low, high = groups.amin(3).clamp_max(0), groups.amax(3).clamp_min(0)
    shrinks = torch.linspace(1.0, 0.4, SHRINKS).tolist() if search else [1.0]
    half = fit_half(widest_scale(low, high, bits, symmetric=symmetric), shrinks[-1])
    scale, zero_point = affine(low, high, bits, half, symmetric=symmetric)
    best = squared_error(groups, scale, zero_point, bits) if search else None
    for shrink in shrinks[1:]:
        new_scale, new_zero = affine(low * shrink, high * shrink, bits, half, symmetric=symmetric)
        error = squared_error(groups, new_scale, new_zero, bits)
        assert best is not None  # noqa: S101  for the type checker
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        zero_point = None if zero_point is None or new_zero is None else torch.where(better, new_zero, zero_point)
    codes = nearest_codes(stack, scale, zero_point, bits)
    small = half.flatten().tolist()
    return [Grid(codes[i], scale[i].half() if small[i] else scale[i], None if zero_point is None else zero_point[i], bits) for i in range(len(stack))]


def squared_error(groups: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the squared rounding error of each group, [..., outputs, groups]. groups: [..., outputs, groups, group_size]."""
    wide = scale.unsqueeze(-1)
    zero = float(1 << (bits - 1)) if zero_point is None else zero_point.float().unsqueeze(-1)
    rounded = (groups / wide).round_().add_(zero).clamp_(0, (1 << bits) - 1).sub_(zero).mul_(wide)
    return rounded.sub_(groups).square_().sum(-1)


def widest_scale(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Return the scales that cover [low, high] (low <= 0 <= high), 0 for an all-zero group; same shape."""
    if symmetric:
        return torch.maximum(-low / (1 << (bits - 1)), high / ((1 << (bits - 1)) - 1))
    return (high - low) / ((1 << bits) - 1)


def fit_half(scale: Tensor, shrink: float) -> Tensor:
    """Return whether all of a layer's scales, and these times `shrink`, lie in the normal range of float16: bool [layers, 1, 1]."""
    least, most = 2.0**-14, 65504.0
    return (((scale == 0) | (scale * shrink >= least)) & (scale <= most)).flatten(1).all(1)[:, None, None]


def affine(low: Tensor, high: Tensor, bits: int, half: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero_point) that cover [low, high] (both [layers, outputs, groups], low <= 0 <= high).

    Scales are float32, rounded to what float16 holds in the layers where `half` [layers, 1, 1] says so; 1 for an all-zero group.
    """
    scale = widest_scale(low, high, bits, symmetric=symmetric)
    scale = torch.where(scale > 0, torch.where(half, scale.half().float(), scale), torch.ones_like(scale))
    if symmetric:
        return scale, None
    return scale, torch.round(-low / scale).clamp_(0, (1 << bits) - 1).to(torch.uint8)
