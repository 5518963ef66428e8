"""Products of 8-bit numbers on a GPU: integers by cuBLAS, float8 by CUTLASS, both through torch.

Inputs are rounded by a kernel of ours.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from workbench.formats.affine import Grid
from workbench.formats.stored_forms import FloatGrid
from workbench.modules.input_quantizer import FLOAT8, FLOAT8_MOST, QuantizedLinear, QuantizesInputs
from workbench.runtime.int8 import integer_weight, plain
from workbench.util.device import launching
from workbench.util.library_internals import byte_product

if TYPE_CHECKING:
    from workbench.modules.layer import Layer

LEAST_ITEMS = 32  # the integer product wants more than 16 rows; those beyond the inputs are not looked at
WIDEST = 32768  # inputs of a row that one program rounds


@dataclass(frozen=True)
class ScaledProduct:
    """Linear layers with 8-bit weights, one scale a row, and inputs rounded to 8 bits without a zero point:
    really multiplied as such.

    Quick for many tokens, where arithmetic is what takes time; at a few tokens rounding costs more than the
    product saves on small layers.
    """

    name: str = "8-bit products (cuBLAS, CUTLASS)"
    takes: str = (
        "Linear with W8A8, integers or float8: symmetric, one weight scale per row; a GPU, for float8 of"
        " compute capability 8.9 or later"
    )
    uses: tuple[str, ...] = ("weights", "inputs")

    def here(self, device: str) -> str:
        """Return why it cannot run on this device, "" if it can."""
        if not device.startswith("cuda") or not torch.cuda.is_available():
            return "needs a CUDA GPU"
        return (
            ""
            if importlib.util.find_spec("triton") is not None
            else "Triton is not installed; torch for CUDA on Linux brings it"
        )

    def serves(self, layer: Layer, device: str) -> str:
        """Return why it does not take this layer, "" if it does."""
        if (
            isinstance(layer.grid, FloatGrid)
            and device.startswith("cuda")
            and torch.cuda.is_available()
            and torch.cuda.get_device_capability(device) < (8, 9)
        ):
            return "this GPU has no float8 products (compute capability 8.9 or later)"
        return unfit_inputs(layer) or unfit_weights(layer)

    def build(self, layer: Layer) -> nn.Module:
        """Return the layer as a product of 8-bit numbers."""
        return ScaledLinear(layer)


def unfit_inputs(layer: Layer) -> str:
    """Return why a layer's inputs cannot be multiplied as 8-bit numbers, "" if they can."""
    module = layer.module
    if not isinstance(module, QuantizesInputs):
        return "its inputs are not rounded"
    if not isinstance(module, QuantizedLinear):
        return f"a {type(module).__name__} is not served on a GPU"
    if module.activation_bits != 8 or not module.symmetric:
        return f"inputs of {module.input_format.words()}: 8 bits without a zero point are multiplied"
    divisor = 16 if module.activation_format == "float8" else 8
    if module.in_features % divisor or module.out_features % divisor or module.in_features > WIDEST:
        return (
            f"{module.out_features} outputs of {module.in_features} inputs: both must be multiples of"
            f" {divisor}, inputs at most {WIDEST:,}"
        )
    return ""


def unfit_weights(layer: Layer) -> str:
    """Return why a layer's weights cannot be multiplied by such inputs, "" if they can."""
    grid, wanted = layer.grid, plain(layer).activation_format
    if layer.others:
        return f"its weight is shared with {', '.join(layer.others)}, which reads it unpacked"
    integer = isinstance(grid, Grid) and grid.bits == 8 and grid.zero_point is None
    if not isinstance(grid, Grid | FloatGrid) or wanted != (
        "integer" if integer else getattr(grid, "number_format", "")
    ):
        return f"inputs are {wanted}, weights are not 8-bit {wanted}s without zero points"
    return (
        ""
        if grid.scale.shape[-1] == 1
        else "its weights have a scale for every group; one for each row (group_size 0) is needed"
    )


class ScaledLinear(nn.Module):
    """Rounds its inputs to 8 bits, multiplies, scales.

    The same numbers as the simulated layer, but for the order of the sum.
    """

    codes: Tensor  # int8 or float8 [inputs, outputs], the inputs consecutive
    scale: Tensor  # float32 [outputs]
    bias: Tensor | None
    smooth: Tensor | None
    input_scale: Tensor | None  # float32, scalar; None: from the inputs at hand

    def __init__(self, layer: Layer) -> None:
        """Take codes, scales and bias."""
        super().__init__()
        module = plain(layer)
        self.weight = torch.empty(0, dtype=layer.parameter.dtype)  # some models ask for its dtype
        self.integer, self.per_token = module.activation_format == "integer", module.per_token
        codes, scale = integer_codes(layer) if self.integer else float_codes(layer)
        bias = layer.module.bias
        held = {
            "codes": codes.t(),
            "scale": scale,
            "bias": bias.detach() if isinstance(bias, Tensor) else None,
            "smooth": module.smooth,
            "input_scale": None if module.input_scale is None else module.input_scale.float(),
        }
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        """Return [..., outputs] for [..., inputs]."""
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        codes, scales = self.rounded(rows)
        if self.integer:
            out = self.integer_product(codes, scales, len(rows), input.dtype)
        else:
            out = scaled_mm(
                codes,
                self.codes,
                scales.unsqueeze(1),
                ScalingType.RowWise,
                self.scale.unsqueeze(0),
                ScalingType.RowWise,
                output_dtype=torch.bfloat16,
            ).to(input.dtype)
            out = out if self.bias is None else out + self.bias
        return out.view(*input.shape[:-1], out.shape[-1])

    def rounded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of the inputs, [at least 32, inputs] for integers, and their scales, float32
        [rows].
        """
        from workbench.kernels import triton_scaled as kernels

        count, inputs = rows.shape
        codes = torch.empty(
            max(LEAST_ITEMS, count) if self.integer else count,
            inputs,
            dtype=torch.int8 if self.integer else FLOAT8,
            device=rows.device,
        )
        scales = torch.empty(count, dtype=torch.float32, device=rows.device)
        most = 127.0 if self.integer else FLOAT8_MOST
        fixed = self.input_scale
        if fixed is None and not self.per_token:
            whole = rows.float() if self.smooth is None else rows.float() / self.smooth
            fixed = whole.abs().amax() / most
            fixed = torch.where(fixed > 0, fixed, torch.ones_like(fixed))
        with launching(rows.device):
            kernels.round_rows[(count,)](
                rows,
                rows if self.smooth is None else self.smooth,
                scales if fixed is None else fixed,
                codes,
                scales,
                inputs,
                most,
                self.smooth is not None,
                fixed is None,
                self.integer,
                1 << (inputs - 1).bit_length(),
                num_warps=8 if inputs > 2048 else 4,
            )
        return codes, scales

    def integer_product(self, codes: Tensor, scales: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Return the scaled product, [count, outputs]."""
        from workbench.kernels import triton_scaled as kernels

        sums = byte_product(codes, self.codes)
        out = torch.empty(count, sums.shape[1], dtype=dtype, device=codes.device)
        with launching(out.device):
            kernels.rescale[(count, -(-sums.shape[1] // 1024))](
                sums,
                scales,
                self.scale,
                self.scale if self.bias is None else self.bias,
                out,
                sums.shape[1],
                self.bias is not None,
                1024,
            )
        return out


def integer_codes(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return int8 codes [outputs, inputs] and scales [outputs]."""
    weight = integer_weight(layer)
    return weight.codes, weight.scale


def float_codes(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return float8 codes [outputs, inputs] and scales [outputs]."""
    grid = layer.grid
    if not isinstance(grid, FloatGrid):
        raise TypeError(f"layer {layer.name!r} has no float8 weights")
    return grid.codes.view(FLOAT8), grid.scale.float().flatten().expand(grid.codes.shape[0]).contiguous()
