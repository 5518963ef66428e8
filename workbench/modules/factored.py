"""Ordinary modules that take the place of one layer: a few small layers in a row, or the layer and a low-rank
term beside it.

A `Form` says how one weight is split. `factor_shapes` is the only place that knows the shapes: modules,
predicted sizes and the loading of an export all ask it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.modules.input_quantizer import acting_weight
from workbench.modules.layer import is_transposed
from workbench.modules.sharing import twin


@dataclass(frozen=True)
class Shape:
    """What a form depends on: the weight as a matrix, its kernel (1, 1 if it is no convolution) and the sort
    of module.
    """

    rows: int
    columns: int
    kernel: tuple[int, int] = (1, 1)
    convolution: bool = False
    table: bool = False  # an embedding: rows are looked up, not multiplied

    @property
    def channels(self) -> int:
        """Return the channels that a convolution reads."""
        return self.columns // (self.kernel[0] * self.kernel[1])

    @property
    def count(self) -> int:
        """Return the weights of the dense layer."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Form:
    """How a weight is split: `kind` channel (two factors; Linear layers and tables too), spatial or tucker2,
    and its rank or ranks.
    """

    kind: str
    ranks: tuple[int, ...]

    def to_json(self) -> Any:
        """Return plain data: just the rank of two plain factors."""
        return self.ranks[0] if self.kind == "channel" else [self.kind, *self.ranks]

    @classmethod
    def from_json(cls, data: Any) -> Form:
        """Return the form that `to_json` wrote; ValueError if it did not."""
        if isinstance(data, int):
            return cls("channel", (data,))
        kind, *ranks = data
        if kind not in {"spatial", "tucker2"} or len(ranks) != 1 + (kind == "tucker2"):
            raise ValueError(f"unknown form of low rank {data!r}")
        return cls(kind, tuple(ranks))


def kind_for(shape: Shape, conv: str) -> str:
    """Return the kind of form for a weight: a kernel of one pixel, or none at all, has nothing but channels
    to split.
    """
    return conv if shape.convolution and shape.kernel != (1, 1) else "channel"


def full_ranks(shape: Shape, kind: str) -> tuple[int, ...]:
    """Return the rank, or the two of tucker2 (inputs, outputs), at which nothing is lost."""
    if kind == "tucker2":
        return min(shape.channels, shape.count // shape.channels), min(shape.rows, shape.columns)
    if kind == "spatial":
        return (min(shape.channels * shape.kernel[0], shape.rows * shape.kernel[1]),)
    return (min(shape.rows, shape.columns),)


def form_for(shape: Shape, conv: str, ratio: float) -> Form:
    """Return the form that keeps `ratio` of each full rank, at least 1."""
    kind = kind_for(shape, conv)
    return Form(kind, tuple(max(1, round(ratio * full)) for full in full_ranks(shape, kind)))


def factor_shapes(shape: Shape, form: Form) -> list[tuple[int, ...]]:
    """Return the shapes of the factors' weights as their modules store them, in the order in which they are
    applied.
    """
    rank, (high, wide) = form.ranks[0], shape.kernel
    if shape.table:
        return [(shape.rows, rank), (shape.columns, rank)]
    if not shape.convolution:
        return [(rank, shape.columns), (shape.rows, rank)]
    if form.kind == "tucker2":
        return [
            (rank, shape.channels, 1, 1),
            (form.ranks[1], rank, high, wide),
            (shape.rows, form.ranks[1], 1, 1),
        ]
    if form.kind == "spatial":
        return [(rank, shape.channels, high, 1), (shape.rows, rank, 1, wide)]
    return [(rank, shape.channels, high, wide), (shape.rows, rank, 1, 1)]


def cost(shape: Shape, form: Form) -> int:
    """Return the number of weights of all factors."""
    return sum(math.prod(stored) for stored in factor_shapes(shape, form))


def most_rank(shape: Shape, kind: str) -> int:
    """Return the largest rank at which factors have fewer weights than the layer (0: none).

    Not for tucker2, which has two.
    """
    return (shape.count - 1) // cost(shape, Form(kind, (1,)))


def product(factors: list[Tensor], kind: str, *, table: bool = False) -> Tensor:
    """Return the matrices [layers, outputs, inputs] that factors multiply by. factors: stacks [layers, *shape
    of one factor's weight].
    """
    if table:
        return factors[0] @ factors[1].mT
    if kind == "spatial":
        return torch.einsum("lrciu,lorvj->locij", *factors).flatten(2)  # u and v have one element
    if kind == "tucker2":
        return torch.einsum(
            "lop,lpqij,lqc->locij", factors[2].flatten(2), factors[1], factors[0].flatten(2)
        ).flatten(2)
    return factors[1].flatten(2) @ factors[0].flatten(2)


def kind_of(modules: list[nn.Module]) -> str:
    """Return which form the modules in the place of one have: channel, spatial or tucker2."""
    if len(modules) == 3:
        return "tucker2"
    last = modules[-1]
    return "spatial" if isinstance(last, nn.Conv2d) and last.kernel_size != (1, 1) else "channel"


class Factors(nn.Sequential):
    """Layers in the place of one.

    `weight` and `bias` are for models that read a layer's weight instead of calling it.
    """

    @property
    def kind(self) -> str:
        """Return channel, spatial or tucker2, as `Form` says it."""
        return kind_of(list(self))

    @property
    def weight(self) -> Tensor:
        """Return the product of the weights, shaped as the dense layer's (Linear [o, i], Conv2d [o, i, h, w],
        Embedding [rows, columns]).
        """
        weights = [acting_weight(part) for part in self]
        table = isinstance(self[0], nn.Embedding)
        whole = product([weight.unsqueeze(0) for weight in weights], self.kind, table=table)[0]
        if weights[0].ndim == 2:
            return whole
        kernel = [max(sizes) for sizes in zip(*(weight.shape[2:] for weight in weights), strict=True)]
        return whole.view(len(weights[-1]), weights[0].shape[1], *kernel)

    @property
    def bias(self) -> Tensor | None:
        """Return the last layer's bias."""
        return cast("Tensor | None", getattr(self[-1], "bias", None))

    @property
    def in_features(self) -> int:
        """Return the inputs of the layer that these stand for."""
        return cast("int", self[0].in_features)

    @property
    def out_features(self) -> int:
        """Return the outputs of the layer that these stand for."""
        return cast("int", self[-1].out_features)

    @property
    def in_channels(self) -> int:
        """Return the channels that the convolution read that these stand for."""
        return cast("int", self[0].in_channels)

    @property
    def out_channels(self) -> int:
        """Return the channels that it made."""
        return cast("int", self[-1].out_channels)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Return the kernel of the convolution that these stand for: as some models read it to pad."""
        return self.along("kernel_size", max)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Return its dilation: that of the layer that is wide in a direction, 1 in the others."""
        return self.along("dilation", max)

    @property
    def stride(self) -> tuple[int, ...]:
        """Return its stride."""
        return self.along("stride", math.prod)

    def along(self, name: str, join: Callable[[tuple[int, ...]], int]) -> tuple[int, ...]:
        """Return a number of every convolution, joined in each direction."""
        return tuple(map(join, zip(*(getattr(part, name) for part in self), strict=True)))


class Repaired(nn.Module):
    """A layer and a low-rank term beside it: base(x) + second(first(x)).

    `weight` and `bias` are for models that read them.
    """

    def __init__(self, base: nn.Module, first: nn.Module, second: nn.Module) -> None:
        """Take the layer and two that map its inputs to its outputs through a few numbers."""
        super().__init__()
        self.base, self.first, self.second = base, first, second
        self.training = base.training

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the repaired outputs, shaped as the base's."""
        return cast("Tensor", self.base(inputs) + self.second(self.first(inputs)))

    @property
    def weight(self) -> Tensor:
        """Return the weight that the whole multiplies by, shaped as that of the base."""
        base, first, second = (acting_weight(part) for part in (self.base, self.first, self.second))
        term = second.flatten(1) @ first.flatten(1)
        return base + (term.t() if is_transposed(self.base) else term.view(base.shape))

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the base."""
        return cast("Tensor | None", getattr(self.base, "bias", None))


def shape_of(module: nn.Module) -> Shape:
    """Return the shape that a form depends on, read off a module with a weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101  for the type checker: find_layers has seen it
    if isinstance(module, nn.Conv2d):
        return Shape(
            len(weight), weight[0].numel(), (module.kernel_size[0], module.kernel_size[1]), convolution=True
        )
    rows, columns = reversed(weight.shape) if is_transposed(module) else weight.shape
    return Shape(rows, columns, table=isinstance(module, nn.Embedding))


def factors_like(module: nn.Module, form: Form, *, biased: bool = True) -> Factors:
    """Return layers of the given ranks that together take the place of `module`, its bias in the last unless
    not `biased`.

    Their weights are on the device "meta": the caller puts real ones there.
    """
    weight, bias = module.weight, getattr(module, "bias", None) if biased else None
    assert isinstance(weight, Tensor)  # noqa: S101  for the type checker: find_layers has seen it
    like: dict[str, Any] = {
        "device": "meta",
        "dtype": weight.dtype,
    }  # no memory, no random start: the weights are about to be written
    stored = factor_shapes(shape_of(module), form)
    if isinstance(module, nn.Conv2d):
        layers = convolutions_like(module, stored, biased=bias is not None, like=like)
    elif isinstance(module, nn.Embedding):
        layers = [
            nn.Embedding(stored[0][0], stored[0][1], module.padding_idx, **like),
            nn.Linear(stored[1][1], stored[1][0], bias=False, **like),
        ]
    else:
        layers = [
            nn.Linear(stored[0][1], stored[0][0], bias=False, **like),
            nn.Linear(stored[1][1], stored[1][0], bias=bias is not None, **like),
        ]
    if bias is not None:
        layers[-1].bias = bias
    return Factors(*layers).train(module.training)


def convolutions_like(
    module: nn.Conv2d, stored: list[tuple[int, ...]], *, biased: bool, like: dict[str, Any]
) -> list[nn.Module]:
    """Return convolutions of these weight shapes: in each direction the one that is wide strides, pads and
    dilates as `module` does.
    """
    layers: list[nn.Module] = []
    wide_already = [False, False]
    for index, (outputs, inputs, *kernel) in enumerate(stored):
        last = index == len(stored) - 1
        mine = [
            (size > 1 or whole == 1) and not done
            for size, whole, done in zip(kernel, module.kernel_size, wide_already, strict=True)
        ]
        if len(stored) == 3 and index == 0:
            mine = [False, False]  # the core, not the 1x1 before it, strides and pads
        wide_already = [done or now for done, now in zip(wide_already, mine, strict=True)]
        options = {
            name: tuple(
                value if now else default for value, now in zip(getattr(module, name), mine, strict=True)
            )
            for name, default in (("stride", 1), ("dilation", 1))
        }
        padding = (
            module.padding
            if isinstance(module.padding, str)
            else tuple(value if now else 0 for value, now in zip(module.padding, mine, strict=True))
        )
        mode = module.padding_mode if isinstance(padding, str) or any(padding) else "zeros"
        layers.append(
            nn.Conv2d(
                inputs,
                outputs,
                tuple(kernel),  # type: ignore[arg-type]
                bias=biased and last,
                padding=padding,  # type: ignore[arg-type]
                padding_mode=mode,
                **options,  # type: ignore[arg-type]
                **like,
            )
        )
    return layers


def repaired_like(module: nn.Module, rank: int) -> Repaired:
    """Return `module` with a term of the given rank beside it, whose weights are still to be put."""
    first, second = factors_like(module, Form("channel", (rank,)), biased=False)
    return Repaired(module, first, second)


def form_of(factors: Factors) -> Form:
    """Return the form of modules that are there already."""
    weights = [cast("Tensor", part.weight) for part in factors]
    if isinstance(factors[0], nn.Embedding):
        return Form("channel", (weights[0].shape[1],))
    return Form(factors.kind, tuple(len(weight) for weight in weights[:-1]))


def copies_of(template: nn.Module, count: int) -> list[Any]:
    """Return `count` modules like a freshly made one, weights still to be put: ten times quicker than making
    each.
    """
    return [template, *(twin(template) for _ in range(count - 1))]


def carried(factors: list[Tensor], shape: Shape) -> Tensor:
    """Return the product of the factors in front of one, a matrix [inputs of that one, inputs of the dense
    layer].

    factors: weights of the factors in front. For a convolution the inputs are patches, and a patch is a
    picture of the kernel's size: every basis vector is sent through.
    """
    if (
        factors[0][0].numel() == shape.columns
    ):  # the first reads whole patches, whatever follows reads one pixel
        matrix = factors[0].flatten(1)
        for part in factors[1:]:
            matrix = part.flatten(1) @ matrix
        return matrix
    picture = torch.eye(shape.columns, device=factors[0].device, dtype=factors[0].dtype).view(
        -1, shape.channels, *shape.kernel
    )
    for part in factors:
        picture = F.conv2d(picture, part)
    return picture.flatten(1).t()
