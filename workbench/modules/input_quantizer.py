"""Layers that round what they read: an ordinary Linear, Conv1D or Conv2d that quantizes its inputs before the
product.

The rounding is simulated: inputs are put on their grid and multiplied as floats, so that quality is that of
an integer product with a wide accumulator, on any device. Which kernel really multiplies integers is up to
`workbench.runtime`; it finds everything it needs on the module.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.modules.sharing import twin

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MOST = 448.0  # the largest number that float8 (e4m3fn) holds
LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class InputFormat:
    """How inputs are rounded.

    `bits` and `number_format` ("integer", "float8") say to what, the rest which inputs share a scale.

    `dynamic`: scales follow the inputs at hand; else they were fixed on calibration data. `per_token`: one
    scale for each row of a Linear's inputs and each image of a convolution's; else one for the whole tensor.
    `symmetric`: zero is code 0.
    """

    bits: int = 8
    number_format: str = "integer"
    dynamic: bool = True
    per_token: bool = True
    symmetric: bool = True

    @property
    def codes(self) -> tuple[int, int]:
        """Return the least and the largest integer code."""
        most = (1 << (self.bits - 1)) - 1
        return (-most if self.symmetric else -most - 1), most

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero point), both float32, for values in [low, high] with low <= 0 <= high; same
        shape. Nothing but zeros gets scale 1.
        """
        least, most = self.codes
        if self.number_format == "float8":
            scale = torch.maximum(-low, high) / FLOAT8_MOST
        elif self.symmetric:
            scale = torch.maximum(-low, high) / most
        else:
            scale = (high - low) / (most - least)
        scale = torch.where(scale > 0, scale.clamp_min(LEAST_SCALE), torch.ones_like(scale))
        if self.symmetric:
            return scale, torch.zeros_like(scale)
        return scale, (least - low / scale).round().clamp(least, most)

    def rounded(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return float32 values on the grid, in their shape; what lies outside is clamped to its ends. scale,
        zero: float32, broadcastable to the values.
        """
        if self.number_format == "float8":
            return (values / scale).clamp(-FLOAT8_MOST, FLOAT8_MOST).to(FLOAT8).float() * scale
        least, most = self.codes
        return ((values / scale).round().add(zero).clamp(least, most) - zero) * scale

    def words(self) -> str:
        """Return such as `A8 dynamic per token`."""
        name = "A-float8" if self.number_format == "float8" else f"A{self.bits}"
        return (
            f"{name} {'dynamic' if self.dynamic else 'static'} per {'token' if self.per_token else 'tensor'}"
            + ("" if self.symmetric else " asymmetric")
        )


class PassThrough(torch.autograd.Function):
    """Rounded values forward, the gradient as if nothing had been rounded backward (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004  torch passes it
        """Return the rounded values."""
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004  torch passes it
        """Hand the gradient to what was rounded."""
        return gradients[0], None


def pass_through(values: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, through which gradients pass to `values`."""
    if not (torch.is_grad_enabled() and values.requires_grad):
        return rounded
    passed: Tensor = PassThrough.apply(values, rounded.detach())
    return passed


class QuantizesInputs(nn.Module):
    """Mixed into a layer: `prepared` divides the inputs by `smooth` where there is one, then rounds them.

    A kernel reads these: `activation_bits` (int), `activation_format` ("integer", "float8"), `dynamic`,
    `per_token`, `symmetric` (bool), and the buffers `smooth` (float32 [channels] or None: inputs are divided
    by it, weights hold it already), `input_scale` (float32) and `input_zero` (int32), both scalars or, where
    `dynamic`, None. real = (code - zero) * scale.
    """

    activation_bits: int
    activation_format: str
    dynamic: bool
    per_token: bool
    symmetric: bool
    smooth: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    channels_at: int = -1  # the dimension of the inputs over which weights multiply

    @property
    def input_format(self) -> InputFormat:
        """Return how inputs are rounded."""
        return InputFormat(
            self.activation_bits, self.activation_format, self.dynamic, self.per_token, self.symmetric
        )

    def prepared(self, inputs: Tensor) -> Tensor:
        """Return the inputs smoothed and rounded, in their own shape and dtype; gradients pass through."""
        values = inputs.float()
        if self.smooth is not None:
            values = values / self.along_channels(self.smooth)
        rounding = self.input_format
        if self.input_scale is not None and self.input_zero is not None:
            scale, zero = self.input_scale.float(), self.input_zero.float()
        else:
            scale, zero = rounding.parameters(*self.extremes(values))
        return pass_through(values, rounding.rounded(values, scale, zero)).to(inputs.dtype)

    def along_channels(self, vector: Tensor) -> Tensor:
        """Return [channels] shaped so that it multiplies the inputs."""
        return vector if self.channels_at == -1 else vector.view(-1, 1, 1)

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (low, high) of what shares a scale, with zero in between; broadcastable to the values."""
        if not values.numel():
            return values.new_zeros(()), values.new_zeros(())
        if not self.per_token:
            low, high = values.detach().aminmax()
        else:
            over = (-1,) if self.channels_at == -1 else tuple(range(values.ndim - 3, values.ndim))
            low, high = values.detach().amin(over, keepdim=True), values.detach().amax(over, keepdim=True)
        return low.clamp_max(0), high.clamp_min(0)

    def extra_repr(self) -> str:
        """Show the rounding beside the sizes."""
        smoothed = ", smoothed" if self.smooth is not None else ""
        return f"{super().extra_repr()}, inputs={self.input_format.words()}{smoothed}".removeprefix(", ")


class QuantizedLinear(QuantizesInputs, nn.Linear):
    """A Linear that rounds its inputs."""

    # Torch's own name: callers may pass it by keyword
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product with the rounded inputs [..., inputs]."""
        return super().forward(self.prepared(input))


class QuantizedConv2d(QuantizesInputs, nn.Conv2d):
    """A Conv2d that rounds its inputs; with `per_token`, each image has its own scale."""

    channels_at: int = -3

    # Torch's own name: callers may pass it by keyword
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the convolution of the rounded inputs [N, channels, height, width]."""
        return super().forward(self.prepared(input))


class QuantizedConv1D(QuantizesInputs):
    """GPT-2's Conv1D (a Linear whose weight is [inputs, outputs]) that rounds its inputs."""

    nf: int
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the rounded inputs [..., inputs]."""
        product = torch.addmm(self.bias, self.prepared(x).view(-1, x.shape[-1]), self.weight)
        return product.view(*x.shape[:-1], self.nf)


def quantized_class(module: nn.Module) -> type[QuantizesInputs] | None:
    """Return the class that takes the place of a module's, None if its own forward may do more than one
    product.
    """
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return QuantizedConv1D
    classes: dict[type, type[QuantizesInputs]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}
    return classes.get(type(module))


def quantized_like(
    module: nn.Module,
    rounding: InputFormat,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> QuantizesInputs:
    """Return a module around the same weight and bias that rounds its inputs.

    smooth: what each input channel is divided by, float32 [channels]. scale, zero: for static rounding only,
    scalars.
    """
    kind = quantized_class(module)
    if kind is None:
        raise TypeError(f"a {type(module).__name__} cannot round its inputs")
    layer: Any = twin(module)
    layer.__class__ = kind
    layer.activation_bits, layer.activation_format = rounding.bits, rounding.number_format
    layer.dynamic, layer.per_token, layer.symmetric = rounding.dynamic, rounding.per_token, rounding.symmetric
    for name, tensor in (("smooth", smooth), ("input_scale", scale), ("input_zero", zero)):
        layer.register_buffer(name, tensor)
    return cast("QuantizesInputs", layer)


def described(module: QuantizesInputs) -> dict[str, Any]:
    """Return everything but tensors as plain data, for an export: `from_description` makes the module
    again.
    """
    return asdict(module.input_format) | {"smooth": module.smooth is not None}


def from_description(module: nn.Module, about: dict[str, Any]) -> QuantizesInputs:
    """Return `module` as `described` says, its buffers still to be filled.

    TypeError or KeyError if that is damaged.
    """
    rounding = InputFormat(**{key: value for key, value in about.items() if key != "smooth"})
    smooth = torch.ones(channels_of(module)) if about["smooth"] else None
    fixed = (None, None) if rounding.dynamic else (torch.ones(()), torch.zeros((), dtype=torch.int32))
    return quantized_like(module, rounding, smooth, *fixed)


def channels_of(module: nn.Module) -> int:
    """Return the number of features or channels that a layer reads."""
    weight = cast("Tensor", module.weight)
    return weight.shape[0] if type(module).__name__.endswith("Conv1D") else weight.shape[1]


def smoothing_of(module: nn.Module) -> Tensor | None:
    """Return the divisors of a module's inputs, float32 [channels], None if it divides by none."""
    return module.smooth if isinstance(module, QuantizesInputs) else None


def acting_weight(module: nn.Module) -> Tensor:
    """Return the weight by which a module multiplies what it is given, as it is stored: without what
    smoothing moved into it.
    """
    weight, smooth = cast("Tensor", module.weight), smoothing_of(module)
    if smooth is None:
        return weight
    across = (
        smooth.unsqueeze(1)
        if isinstance(module, QuantizedConv1D)
        else smooth.view(-1, *[1] * (weight.ndim - 2))
    )
    return (weight.float() / across).to(weight.dtype)
