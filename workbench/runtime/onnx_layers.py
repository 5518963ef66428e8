"""Layers as ONNX Runtime runs them fast: the same numbers as the simulated layer, written with integer and
packed operators.

Each module here stands in the place of a layer only while the model is exported; the operators it names have
no meaning in torch. Weights are the codes of the recipe itself, never rounded again. Inputs are bytes with
zero point 128 + `input_zero`: x86 multiplies unsigned by signed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.formats.affine import Grid
from workbench.modules.sharing import twin
from workbench.runtime.int8 import integer_weight, plain, wide_bytes
from workbench.runtime.onnx_functions import CONTRIB, DOMAIN, MIDDLE, Axis, Variant

if TYPE_CHECKING:
    from workbench.modules.layer import Layer


def operator(
    name: str, inputs: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype, **attributes: Any
) -> Tensor:
    """Return the output of an operator that torch does not have; `name` is `domain::Name`."""
    output: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=1)
    return output


def like_weight() -> Tensor:
    """Return an empty tensor for the attribute `weight`, whose dtype some models read."""
    return torch.empty(0)


def exportable(module: nn.Module) -> nn.Module:
    """Return a module that rounds its inputs by operators that the exporter knows (it has none for
    aminmax).
    """
    copied = twin(module)
    copied.__class__ = type("Simulated", (Extremes, type(module)), {})
    return copied


class Extremes:
    """Mixed into a module that rounds its inputs."""

    per_token: bool
    channels_at: int

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (low, high) of what shares a scale, with zero in between."""
        over = (
            tuple(range(values.ndim))
            if not self.per_token
            else (-1,)
            if self.channels_at == -1
            else tuple(range(values.ndim - 3, values.ndim))
        )
        return values.amin(over, keepdim=True).clamp_max(0), values.amax(over, keepdim=True).clamp_min(0)


class Float(nn.Module):
    """A Linear whose weight is kept as [inputs, outputs], so that the exporter has nothing to transpose and
    keeps its name.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        """Take over weight and bias."""
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().t().contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        """Return the product."""
        product = input @ self.weight
        return product if self.bias is None else product + self.bias


class Affine(nn.Module):
    """A BatchNorm2d in eval mode: one multiplication and one addition, which ONNX Runtime merges into the
    convolution before it.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        """Take the running statistics."""
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a BatchNorm2d without running statistics depends on its batch")
        factor = (norm.running_var.double() + norm.eps).rsqrt() * (
            1.0 if norm.weight is None else norm.weight.detach().double()
        )
        shift = (
            0.0 if norm.bias is None else norm.bias.detach().double()
        ) - norm.running_mean.double() * factor
        self.register_buffer("factor", factor.float().view(-1, 1, 1))
        self.register_buffer("shift", shift.float().view(-1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        """Return the normalised input [N, channels, height, width]."""
        normalised: Tensor = input * self.factor + self.shift
        return normalised


class OnnxProduct(nn.Module):
    """A layer's product of integers as one node.

    `workbench.runtime.onnx_functions` says what it stands for.
    """

    codes: Tensor  # [inputs, outputs]
    weight_zero: Tensor
    weight_scale: Tensor
    bias: Tensor
    sums: Tensor | None  # of the weights over the inputs, where rows of inputs have zero points of their own
    scale: Tensor | None  # of static inputs
    zero: Tensor | None

    def __init__(
        self, layer: Layer, kind: str, order: Tensor | None = None, norm: Affine | None = None
    ) -> None:
        """Take the codes of the layer; `order` rearranges its inputs, `norm` follows it and is merged."""
        super().__init__()
        module, weight = plain(layer), integer_weight(layer)
        about = module.input_format
        static = module.input_scale is not None and module.input_zero is not None
        self.variant = Variant(
            kind,
            static=static,
            per_row=about.per_token and not static,
            symmetric=about.symmetric,
            bits=about.bits,
        )
        self.rounding = self.variant.name
        codes = weight.codes if order is None else weight.codes[:, order]
        factor = torch.ones_like(weight.scale) if norm is None else norm.factor.flatten()
        bias = (
            layer.module.bias.detach().float()
            if isinstance(layer.module.bias, Tensor)
            else torch.zeros_like(weight.scale)
        )
        sums = (codes.double() - weight.zero.double().unsqueeze(1)).sum(1) * (weight.scale * factor).double()
        stored, at = codes.t().contiguous(), weight.zero
        if not wide_bytes():  # unsigned by signed bytes overflow there: both unsigned
            stored, at = ((part.to(torch.int16) + MIDDLE).to(torch.uint8) for part in (stored, at))
        self.register_buffer("codes", stored)
        self.register_buffer("weight_zero", at)
        self.register_buffer("weight_scale", weight.scale * factor)
        self.register_buffer("bias", bias if norm is None else bias * factor + norm.shift.flatten())
        self.register_buffer("sums", sums.float() if self.variant.per_row and not about.symmetric else None)
        self.register_buffer(
            "scale", None if module.input_scale is None else module.input_scale.detach().float().reshape(())
        )
        self.register_buffer(
            "zero",
            (
                None
                if module.input_zero is None
                else (module.input_zero.detach() + MIDDLE).to(torch.uint8).reshape(())
            ),
        )

    def forward(self, values: Tensor, shape: tuple[int, ...], axes: tuple[Axis, ...] = ()) -> Tensor:
        """Return the node, whose output has this shape; its name says everything about it."""
        variant = replace(self.variant, axes=axes)
        given = (
            values,
            self.codes,
            self.weight_zero,
            self.weight_scale,
            self.bias,
            self.scale,
            self.zero,
            self.sums,
        )
        return operator(
            f"{DOMAIN}::{variant.name}",
            [tensor for tensor in given if tensor is not None],
            shape,
            torch.float32,
        )


class IntegerLinear(nn.Module):
    """A Linear or Conv1D as a product of integers."""

    smooth: Tensor | None

    def __init__(self, layer: Layer) -> None:
        """Take what the layer holds."""
        super().__init__()
        self.product = OnnxProduct(layer, "Linear")
        self.weight = like_weight()
        smooth = plain(layer).smooth
        self.register_buffer("smooth", None if smooth is None else smooth.detach().float())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        """Return [..., outputs] for [..., inputs]."""
        values = input if self.smooth is None else input / self.smooth
        outputs: Tensor = self.product(values, (*input.shape[:-1], self.product.codes.shape[1]))
        return outputs


class IntegerConv(nn.Module):
    """A convolution as a product of integers over patches (ONNX Runtime's ConvInteger is several times
    slower).
    """

    smooth: Tensor | None

    def __init__(self, layer: Layer, norm: Affine | None = None) -> None:
        """Take what the layer holds, and the normalisation that follows it."""
        super().__init__()
        conv: Any = layer.module
        kernel = conv.kernel_size[0] * conv.kernel_size[1]
        order = (
            torch.arange(conv.in_channels * kernel).view(conv.in_channels, kernel).t().flatten()
        )  # channels last
        self.sizes = tuple(zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True))
        self.weight = like_weight()
        self.product = OnnxProduct(layer, "Conv", order.to(layer.parameter.device), norm)
        smooth = plain(layer).smooth
        self.register_buffer("smooth", None if smooth is None else smooth.detach().float().view(-1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        """Return [N, outputs, height, width] for [N, channels, height, width]."""
        values = input if self.smooth is None else input / self.smooth
        padding = [size[2] for size in self.sizes]
        if self.product.variant.corrected and any(
            padding
        ):  # each image's zero has a code of its own: the border is rounded like anything else
            values = nn.functional.pad(values, (padding[1], padding[1], padding[0], padding[0]))
            padding = [0, 0]
        axes = tuple(
            Axis(kernel, stride, border, dilation, size)
            for (kernel, stride, _, dilation), border, size in zip(
                self.sizes, padding, values.shape[2:], strict=True
            )
        )
        outputs: Tensor = self.product(
            values, (len(values), self.product.codes.shape[1], *(axis.out for axis in axes)), axes
        )
        return outputs


class OnnxLinear(nn.Module):
    """A Linear with 4-bit weights that are read packed and multiplied as floats (MatMulNBits)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer) -> None:
        """Pack the codes: two to a byte, the first in the low half.

        Blocks of `block` inputs share a scale.
        """
        super().__init__()
        self.weight = like_weight()
        grid = layer.grid
        if not isinstance(grid, Grid):
            raise TypeError(f"layer {layer.name!r} has no integer weights")
        rows, self.inputs = grid.codes.shape
        self.outputs, self.block = rows, block_of(grid)
        blocks = self.inputs // self.block
        repeats = blocks // grid.scale.shape[1]
        scale = grid.scale.float().expand(rows, -1).repeat_interleave(repeats, 1)  # [outputs, blocks]
        zero = (
            torch.full(scale.shape, 8, dtype=torch.uint8)
            if grid.zero_point is None
            else grid.zero_point.cpu().expand(rows, -1).repeat_interleave(repeats, 1)
        )
        codes = grid.codes.cpu()
        self.register_buffer(
            "codes", (codes[:, ::2] | codes[:, 1::2] << 4).view(rows, blocks, self.block // 2).contiguous()
        )
        self.register_buffer("scale", scale.flatten().contiguous())
        padded = nn.functional.pad(zero, (0, blocks % 2))
        self.register_buffer("zero", (padded[:, ::2] | padded[:, 1::2] << 4).flatten().contiguous())
        bias = layer.module.bias
        self.register_buffer("bias", bias.detach().float() if isinstance(bias, Tensor) else None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        """Return [..., outputs] for [..., inputs]."""
        sizes = {"K": self.inputs, "N": self.outputs, "bits": 4, "block_size": self.block}
        product = operator(
            f"{CONTRIB}::MatMulNBits",
            [input, self.codes, self.scale, self.zero],
            (*input.shape[:-1], self.outputs),
            torch.float32,
            **sizes,
        )
        return product if self.bias is None else product + self.bias


def block_of(grid: Grid) -> int:
    """Return the largest block of inputs, a power of two from 16 to 256, that divides the groups of a grid.

    0 if none does.
    """
    shared = math.gcd(grid.codes.shape[-1] // grid.scale.shape[-1], 256)
    return shared if shared >= 16 else 0


def why_not_packed(layer: Layer) -> str:
    """Return why a layer's weights are not read packed, "" if they are."""
    grid = layer.grid
    if not isinstance(grid, Grid):
        return f"its weights are no plain integers ({type(grid).__name__})"
    if not isinstance(layer.module, nn.Linear):
        return f"a {type(layer.module).__name__} is not served packed"
    if grid.bits != 4:
        return f"{grid.bits}-bit weights are not served packed, only 4-bit ones"
    return "" if block_of(grid) else f"its groups of {grid.group_size} inputs are no multiple of 16"
