"""Products of 8-bit integers in plain torch, layer by layer, on a CPU that has the instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.modules.input_quantizer import InputFormat
from workbench.runtime.int8 import integer_weight, plain, why_not_int8, wide_bytes
from workbench.util.library_internals import byte_product

if TYPE_CHECKING:
    from workbench.modules.layer import Layer


@dataclass(frozen=True)
class TorchInt8:
    """Linear and Conv1D layers whose inputs and weights are integers of at most 8 bits: rounded, multiplied
    exactly, scaled.

    `torch.ao.quantization.quantize_dynamic` does the same, and its quantized tensors are deprecated (torch
    2.13); this uses plain tensors and torch's product of bytes, which oneDNN serves. Rounding the inputs
    costs passes over them, which ONNX Runtime fuses.
    """

    name: str = "torch int8"
    takes: str = (
        "Linear, Conv1D with W8A8 or narrower: integers, one weight scale per row, any activation scaling; a"
        " CPU with VNNI"
    )
    uses: tuple[str, ...] = ("weights", "inputs")

    def here(self, device: str) -> str:
        """Return why it cannot run on this device, "" if it can."""
        if not device.startswith("cpu"):
            return "torch's integer product is used on the CPU only"
        if not torch.backends.mkldnn.is_available():
            return f"torch {torch.__version__} was built without oneDNN"
        return "" if wide_bytes() else "this CPU has no VNNI: products of bytes overflow there, or are slow"

    def serves(self, layer: Layer, device: str) -> str:  # noqa: ARG002  the protocol's
        """Return why it does not take this layer, "" if it does."""
        if isinstance(layer.module, nn.Conv2d):
            return "torch multiplies no convolution of integers without deprecated tensors"
        return why_not_int8(layer)

    def build(self, layer: Layer) -> nn.Module:
        """Return the layer as a product of integers."""
        return Int8Linear(layer)


class Int8Linear(nn.Module):
    """Rounds its inputs to bytes, multiplies integers into 32 bits, scales.

    The same numbers as the simulated layer.

    The sum of (x - a)(w - b) over inputs is x.w - a * sum(w) - b * sum(x - a), with a and b the zero points.
    """

    codes: Tensor  # int8 [inputs, outputs], the inputs consecutive
    scale: Tensor  # float32 [outputs]
    bias: Tensor  # float32 [outputs]
    sums: Tensor | None  # of codes over the inputs, float32 [outputs]; None where the inputs' zero point is 0
    zero: Tensor | None  # of the weights, float32 [outputs]; None where all are 0
    smooth: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(self, layer: Layer) -> None:
        """Take codes, scales and bias."""
        super().__init__()
        module, weight = plain(layer), integer_weight(layer)
        self.about: InputFormat = module.input_format
        self.weight = torch.empty(0, dtype=layer.parameter.dtype)  # some models ask for its dtype
        bias = layer.module.bias
        fixed = module.input_scale is not None and module.input_zero is not None
        held = {
            "codes": weight.codes.t(),
            "scale": weight.scale,
            "bias": bias.detach().float() if isinstance(bias, Tensor) else torch.zeros_like(weight.scale),
            "sums": None if self.about.symmetric else weight.codes.sum(1, dtype=torch.int32).float(),
            "zero": None if weight.symmetric else weight.zero.float(),
            "smooth": module.smooth,
            "input_scale": module.input_scale.float() if fixed and module.input_scale is not None else None,
            "input_zero": module.input_zero.float() if fixed and module.input_zero is not None else None,
        }
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        """Return [..., outputs] for [..., inputs]."""
        rows = input.reshape(-1, input.shape[-1]).float()
        if self.smooth is not None:
            rows = rows / self.smooth
        if self.input_scale is not None and self.input_zero is not None:
            scale, zero = self.input_scale, self.input_zero
        else:
            scale, zero = self.about.parameters(*self.extremes(rows))
        codes = torch.div(rows, scale).round_().add_(zero).clamp_(*self.about.codes).to(torch.int8)
        product = byte_product(codes, self.codes).float()
        if self.sums is not None:
            product -= zero.reshape(-1, 1) * self.sums
        if self.zero is not None:
            product -= (
                codes.sum(1, keepdim=True, dtype=torch.int32).float() - zero.reshape(-1, 1) * rows.shape[1]
            ) * self.zero
        product = torch.addcmul(self.bias, product.mul_(scale.reshape(-1, 1)), self.scale)
        return product.to(input.dtype).reshape(*input.shape[:-1], product.shape[-1])

    def extremes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (low, high) of each row, [rows, 1], or of all."""
        low, high = (
            (rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
            if self.about.per_token
            else torch.aminmax(rows)
        )
        return low.clamp_max(0), high.clamp_min(0)
