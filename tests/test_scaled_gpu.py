"""8-bit products on a GPU against float64, and what they refuse."""

import pytest
import torch
from torch import nn

from workbench.formats.affine import Grid
from workbench.formats.stored_forms import FloatGrid
from workbench.modules.input_quantizer import InputFormat, quantized_like
from workbench.modules.layer import Layer
from workbench.runtime.scaled_matmul import ScaledProduct


def layer_of(
    rows: int,
    inputs: int,
    rounding: InputFormat,
    *,
    bits: int = 8,
    zero_point: bool = False,
    groups: int = 1,
    smooth: bool = False,
    device: str = "cpu",
    dtype=torch.float32,
) -> Layer:
    """Return a layer with random weights on a grid, and rounded inputs."""
    linear = nn.Linear(inputs, rows, device=device, dtype=dtype).requires_grad_(False)
    if rounding.number_format == "float8":
        codes = torch.randn(rows, inputs, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
        grid = FloatGrid(codes, torch.rand(rows, groups, device=device) + 0.1, "float8")
    else:
        zero = (
            torch.randint(1 << bits, (rows, groups), device=device, dtype=torch.uint8) if zero_point else None
        )
        grid = Grid(
            torch.randint(1 << bits, (rows, inputs), device=device, dtype=torch.uint8),
            (torch.rand(rows, groups, device=device) + 0.1).half() / 100,
            zero,
            bits,
        )
    scale, zero_input = (
        (None, None)
        if rounding.dynamic
        else (torch.tensor(0.03, device=device), torch.tensor(0, dtype=torch.int32, device=device))
    )
    layer = Layer(
        "fc",
        "fc",
        quantized_like(
            linear, rounding, torch.rand(inputs, device=device) + 0.5 if smooth else None, scale, zero_input
        ),
        grid=grid,
    )
    layer.write(grid.dequantize())
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (layer_of(16, 64, InputFormat(), zero_point=True), "without zero points"),
        (layer_of(16, 64, InputFormat(), bits=4), "not 8-bit"),
        (layer_of(16, 64, InputFormat(symmetric=False)), "without a zero point"),
        (layer_of(16, 64, InputFormat(), groups=2), "group_size 0"),
        (layer_of(12, 64, InputFormat()), "12 outputs of 64 inputs"),
        (Layer("fc", "fc", nn.Linear(64, 16)), "not rounded"),
    ],
)
def test_what_cannot_be_multiplied_is_refused_with_the_reason(layer, reason):
    assert reason in ScaledProduct().serves(layer, "cpu")


def test_what_can_is_served_but_not_on_a_cpu():
    assert not ScaledProduct().serves(layer_of(16, 64, InputFormat()), "cpu")
    assert "CUDA" in ScaledProduct().here("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    "rounding",
    [
        InputFormat(),
        InputFormat(per_token=False),
        InputFormat(dynamic=False, per_token=False),
        InputFormat(number_format="float8"),
    ],
    ids=InputFormat.words,
)
@pytest.mark.parametrize(("rows", "inputs"), [(64, 96), (1000, 576), (256, 11008)])
def test_products_agree_with_float64_on_fresh_inputs(rows, inputs, rounding, smooth):
    layer = layer_of(rows, inputs, rounding, smooth=smooth, device="cuda", dtype=torch.bfloat16)
    engine = ScaledProduct()
    if rows % 16:
        assert bool(engine.serves(layer, "cuda")) == (rounding.number_format == "float8")
        if rounding.number_format == "float8":
            return
    assert not engine.serves(layer, "cuda")
    built = engine.build(layer)
    for count in (1, 16, 17, 100):
        x = 3 * torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16)
        values = x.double() if layer.module.smooth is None else x.double() / layer.module.smooth.double()
        format_ = layer.module.input_format
        low, high = layer.module.extremes(values.float())
        scale, zero = (
            format_.parameters(low, high)
            if rounding.dynamic
            else (layer.module.input_scale, layer.module.input_zero.float())
        )
        rounded = format_.rounded(values.float(), scale, zero).double()
        wanted = rounded @ layer.grid.dequantize().double().t() + layer.module.bias.double()
        product = built(x.view(1, count, inputs))
        assert product.shape == (1, count, rows)
        assert float((product[0].double() - wanted).norm() / wanted.norm()) < 8e-3, count


@pytest.mark.gpu
def test_rows_of_zeros_stay_zero():
    built = ScaledProduct().build(layer_of(64, 96, InputFormat(), device="cuda", dtype=torch.bfloat16))
    bias = built.bias.clone()
    torch.testing.assert_close(
        built(torch.zeros(3, 96, device="cuda", dtype=torch.bfloat16)), bias.expand(3, -1)
    )
