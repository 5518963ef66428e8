"""Products of integers against float64, in torch and in ONNX Runtime, for every rounding.

Caches, fallbacks, instructions.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from integer_models import KIND, One, grid_for, items_of, layer_of, reference
from torch import nn

from workbench.modules.input_quantizer import InputFormat
from workbench.modules.layer import patches
from workbench.runtime import int8
from workbench.runtime.int8_torch import TorchInt8
from workbench.runtime.onnx_engine import OnnxRuntime

ROUNDINGS = [
    InputFormat(bits, "integer", dynamic, per_token, symmetric)
    for bits, dynamic, per_token, symmetric in itertools.product(
        (8, 5), (True, False), (True, False), (True, False)
    )
    if dynamic or not per_token
]
INPUTS, OUTPUTS = 37, 13  # no multiple of anything


def values(rows: int = 11, inputs: int = INPUTS) -> torch.Tensor:
    rows_of_inputs = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    rows_of_inputs[3] = 0  # a token of nothing but zeros
    rows_of_inputs[5] = 0.25  # and one that is constant
    rows_of_inputs[7, 0] = 90.0  # and an outlier
    return rows_of_inputs


def close(computed: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Float32 rounding of a sum that was exact in integers: a few parts in ten million of the row's size."""
    return bool(
        ((computed.double() - wanted).abs() <= 2e-6 * wanted.abs().amax(-1, keepdim=True) + 1e-7).all()
    )


def in_onnx(model: nn.Module, layers: tuple, given: torch.Tensor) -> nn.Module:
    return OnnxRuntime().build(model, layers, KIND, items_of(given), lambda _key, compute: compute())


@pytest.mark.skipif(not int8.wide_bytes(), reason="this CPU has no VNNI")
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda rounding: rounding.words())
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (3, False)])
def test_the_torch_kernel_computes_what_float64_does(rounding, bits, symmetric):
    layer = layer_of(
        nn.Linear(INPUTS, OUTPUTS),
        grid_for(OUTPUTS, INPUTS, bits, symmetric=symmetric),
        rounding,
        smooth=torch.linspace(0.5, 2, INPUTS),
    )
    assert not TorchInt8().serves(layer, "cpu")
    computed = TorchInt8().build(layer)(values().view(11, 1, INPUTS))
    assert computed.shape == (11, 1, OUTPUTS)
    assert close(computed[:, 0], reference(layer, values()))
    assert close(layer.module(values()), reference(layer, values()))  # so the simulation is the same


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda rounding: rounding.words())
def test_onnx_runtime_computes_what_float64_does(rounding):
    grid = grid_for(OUTPUTS, INPUTS, 8 if rounding.bits == 8 else 4, symmetric=rounding.per_token)
    layer = layer_of(nn.Linear(INPUTS, OUTPUTS), grid, rounding, smooth=torch.linspace(0.5, 2, INPUTS))
    session = in_onnx(One(layer.module), (layer,), values())
    with torch.inference_mode():
        assert close(KIND.logits(session, items_of(values())), reference(layer, values()))


@pytest.mark.parametrize(
    "rounding",
    [
        InputFormat(),
        InputFormat(per_token=False, symmetric=False),
        InputFormat(symmetric=False),
        InputFormat(dynamic=False, per_token=False),
    ],
    ids=lambda r: r.words(),
)
@pytest.mark.parametrize(
    "form",
    [{"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (1, 3), "dilation": 2, "bias": False}],
)
def test_convolutions_of_integers_agree_with_float64(rounding, form):
    conv = nn.Conv2d(5, 7, **form)
    grid = grid_for(7, conv.weight[0].numel(), 8, symmetric=False)
    layer = layer_of(conv, grid, rounding)
    norm = nn.BatchNorm2d(7).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, -2, 2)
    given = torch.randn(3, 5, 9, 8, generator=torch.Generator().manual_seed(2))
    model = One(layer.module, norm).requires_grad_(False).eval()
    with torch.inference_mode():
        rounded = layer.module.prepared(given)  # checked above for rows; here an image is one
        weight = grid.dequantize().double()
        bias = 0 if conv.bias is None else conv.bias.double()
        flat = patches(conv, rounded).double() @ weight.t() + bias
        size = layer.module(given).shape[2:]
        wanted = norm.double()(flat.view(3, -1, 7).transpose(1, 2).reshape(3, 7, *size))
        norm.float()
        session = in_onnx(model, (layer,), given)
        computed = KIND.logits(session, items_of(given))
    assert not [node for node in session.session.get_inputs() if node.name != "pixel_values"]
    assert float((computed - wanted).abs().max() / wanted.abs().max()) < 2e-6


def test_unsigned_weights_where_signed_ones_overflow(monkeypatch):
    monkeypatch.setattr(int8, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(int8.platform, "machine", lambda: "x86_64")
    assert not int8.wide_bytes()
    layer = layer_of(nn.Linear(INPUTS, OUTPUTS), grid_for(OUTPUTS, INPUTS, 8, symmetric=False), InputFormat())
    session = in_onnx(One(layer.module), (layer,), values())
    with torch.inference_mode():
        assert close(KIND.logits(session, items_of(values())), reference(layer, values()))
    assert "no VNNI" in TorchInt8().here("cpu")


def test_a_cpu_without_the_instructions_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(int8, "cpu_flags", lambda: frozenset({"sse2"}))
    layer = layer_of(nn.Linear(INPUTS, OUTPUTS), grid_for(OUTPUTS, INPUTS, 8, symmetric=False), InputFormat())
    assert "no instructions for products of bytes" in OnnxRuntime().why_not_narrow(layer)
    assert OnnxRuntime().how(layer) == "floats"


@pytest.mark.parametrize("group", [0, 16, 32, 128, 48])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_four_bit_weights_agree_with_float64(group, symmetric):
    inputs = 384 if group != 48 else 144
    layer = layer_of(
        nn.Linear(inputs, OUTPUTS), grid_for(OUTPUTS, inputs, 4, symmetric=symmetric, group=group), None
    )
    assert OnnxRuntime().how(layer) == "packed"
    given = torch.randn(5, inputs, generator=torch.Generator().manual_seed(3))
    session = in_onnx(One(layer.module), (layer,), given)
    wanted = given.double() @ layer.grid.dequantize().double().t() + layer.module.bias.detach().double()
    with torch.inference_mode():
        computed = KIND.logits(session, items_of(given))
    assert float((computed - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 8, "group": 8}, "a scale for every 8 inputs"),
        ({"bits": 3, "group": 0, "inputs": None}, "its inputs are not quantized"),
        ({"bits": 8, "group": 0, "inputs": InputFormat(number_format="float8")}, "float8, not integers"),
    ],
)
def test_what_is_not_served_says_why(change, reason):
    grid = grid_for(OUTPUTS, 40, change["bits"], symmetric=True, group=change["group"])
    layer = layer_of(nn.Linear(40, OUTPUTS), grid, change.get("inputs", InputFormat()))
    assert reason in TorchInt8().serves(layer, "cpu")
    assert reason in OnnxRuntime().why_not_narrow(layer)
    assert OnnxRuntime().how(layer) == "floats"


def test_another_recipe_of_the_same_structure_is_not_exported_again(monkeypatch):
    from workbench.runtime import onnx_engine

    exports, kept = [], {}
    monkeypatch.setattr(
        onnx_engine, "export", lambda *given, make=onnx_engine.export: exports.append(1) or make(*given)
    )

    def once(key, compute):
        return kept[key] if key in kept else kept.setdefault(key, compute())

    for seed in (0, 1):
        layer = layer_of(
            nn.Linear(INPUTS, OUTPUTS),
            grid_for(OUTPUTS, INPUTS, 8, symmetric=False, seed=seed),
            InputFormat(),
        )
        session = OnnxRuntime().build(One(layer.module), (layer,), KIND, items_of(values()), once)
        with torch.inference_mode():
            assert close(KIND.logits(session, items_of(values())), reference(layer, values()))
    assert len(exports) == 1
    layer = layer_of(
        nn.Linear(INPUTS, OUTPUTS),
        grid_for(OUTPUTS, INPUTS, 8, symmetric=False),
        InputFormat(symmetric=False),
    )  # other rounding, same tensors' shapes or not
    OnnxRuntime().build(One(layer.module), (layer,), KIND, items_of(values()), once)
    assert len(exports) == 2


def test_a_session_has_as_many_threads_as_torch():
    layer = layer_of(nn.Linear(INPUTS, OUTPUTS), grid_for(OUTPUTS, INPUTS, 8, symmetric=True), InputFormat())
    session = in_onnx(One(layer.module), (layer,), values())
    assert session.session.get_session_options().intra_op_num_threads == torch.get_num_threads()
