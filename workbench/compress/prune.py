"""Prune: set weights to zero, one shot, no training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from workbench.compress.layers import Layer
from workbench.compress.work import Work
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import METHODS, Step, configuration


@configuration
class Prune(Step):
    """Set the least important weights of each layer to zero.

    `magnitude` keeps the largest |w| of each layer (Han et al. 2015); `wanda` compares |w| * ||x|| within each output row,
    with x the layer's calibration inputs (Sun et al. 2023). `unstructured` zeros exactly round(sparsity * weights), per
    layer for magnitude and per row for Wanda; `n:m` keeps n of every m consecutive inputs.

    What it does not do: the matrices keep their shape, so time only falls where a sparse kernel exists, and it removes no
    neurons, heads or channels.
    """

    slider: ClassVar[str] = "sparsity"
    position: ClassVar[int] = 20
    stops: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.7, 0.85)

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of the weights set to zero")] = 0.5
    pattern: Annotated[str, Field(pattern=r"^(unstructured|[1-9]\d?:[1-9]\d?)$", description="unstructured, or n:m such as 2:4 (n kept of every m)", examples=["unstructured", "2:4", "4:8", "1:4"])] = "unstructured"
    criterion: Annotated[Literal["magnitude", "wanda"], Field(description="what makes a weight unimportant")] = "magnitude"

    @model_validator(mode="after")
    def fits_pattern(self) -> Prune:
        """Refuse a sparsity that the n:m pattern cannot have."""
        if self.group is not None:
            kept, of = self.group
            if not kept < of:
                raise ValueError(f"pattern={self.pattern!r} removes nothing: n of n:m must be smaller than m, such as 2:4")
            if abs(self.sparsity - (1 - kept / of)) > 1e-9:
                raise ValueError(f"pattern={self.pattern!r} means sparsity={1 - kept / of:g}, but sparsity={self.sparsity:g} was given")
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """Return (n, m) of an n:m pattern, or None."""
        if self.pattern == "unstructured":
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse pruning after quantization."""
        if any(step.kind() == "quantize" for step in earlier):
            raise RecipeError("Prune cannot follow Quantize: scales would be fitted to weights that are then removed; prune first (Harma et al. 2025)")

    def label(self) -> str:
        """Return such as `50%` or `2:4`."""
        return f"{self.sparsity:.0%} sparse" if self.group is None else self.pattern


@METHODS.register(Prune)
def prune(step: Prune, work: Work) -> None:
    """Zero weights and leave the mask as a promise to later steps."""
    for layer in work.select(step):
        matrix = layer.matrix()
        rows, columns = matrix.shape
        if step.group is not None and columns % step.group[1]:
            work.say(layer, f"prune skipped: groups of {step.group[1]} do not divide its {columns} inputs")
            continue
        if not torch.isfinite(matrix).all():
            raise CompressionError(f"layer {layer.name!r} has infinite or NaN weights")
        importance = matrix.abs() if step.criterion == "magnitude" else matrix.abs() * input_norms(layer, work)
        if step.group is not None:
            kept, of = step.group
            mask = keep_largest(importance.view(rows, columns // of, of), kept).view(rows, columns)
        elif step.criterion == "wanda":
            mask = keep_largest(importance, columns - round(step.sparsity * columns))
        else:
            mask = keep_largest(importance.view(1, -1), matrix.numel() - round(step.sparsity * matrix.numel())).view(rows, columns)
        layer.mask = mask
        layer.write(matrix * mask)
        work.took(step, layer, f"{step.label()} by {step.criterion}")


def keep_largest(importance: Tensor, count: int) -> Tensor:
    """Return a mask (bool, same shape) with exactly `count` True along the last dimension; ties go to the first."""
    total = importance.shape[-1]
    if count in {0, total}:
        return torch.full_like(importance, count == total, dtype=torch.bool)
    threshold = importance.kthvalue(total - count + 1, dim=-1, keepdim=True).values  # a selection: several times faster than sorting
    above, ties = importance > threshold, importance == threshold
    room = count - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


def input_norms(layer: Layer, work: Work) -> Tensor:
    """Return sqrt(E[x_i^2]) of the layer's inputs, float32 [inputs]; proportional to Wanda's ||x||."""
    return second_moment_of(layer, work).diagonal().clamp_min(0).sqrt()


def second_moment_of(layer: Layer, work: Work) -> Tensor:
    """Return E[x x^T] of a layer's inputs; for the second factor of a low-rank layer it follows from the first."""
    moment = work.statistics.second_moment(layer.origin)
    if layer.name == f"{layer.origin}.1":
        first = work.layers[f"{layer.origin}.0"].matrix()
        return first @ moment @ first.t()
    return moment
