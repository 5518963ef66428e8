"""Stored forms besides integers: what their codes stand for, what they take, and that zero is zero in
each."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.compress.quantization.scales import Spec, fit, form_of
from workbench.formats.affine import Grid
from workbench.formats.number_formats import FORMATS
from workbench.formats.number_formats.nf4 import LEVELS as NF4
from workbench.formats.stored_forms import (
    Cast,
    FloatGrid,
    InputScaled,
    OffsetGrid,
    effective_bits,
    kind_of,
    split,
    stacked,
)
from workbench.modules.layer import Layer
from workbench.modules.packing import pack_model, unpack_state

SPECS = {
    "row": Spec(5),
    "group": Spec(3, 8),
    "tensor": Spec(4, whole=True),
    "symmetric": Spec(2, 4, symmetric=True),
} | {
    f"{record.name} {way}": Spec(record.bits, group, record.name, whole=whole)
    for record in FORMATS
    if not record.affine
    for way, group, whole in (("row", 0, False), ("group", 8, False), ("tensor", 0, True))
    if record.cast is None or way == "row"  # casts have no scales
}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def form(matrix: torch.Tensor, spec: Spec):
    """Return the form of one layer."""
    stack = matrix.unsqueeze(0)
    if spec.bits == 16:
        return split(form_of(stack, None, spec), (False,))[0]
    scales = fit(stack, spec)
    return split(form_of(stack, scales, spec), scales.half)[0]


def forms(matrix: torch.Tensor, kept: torch.Tensor | None = None):
    """Return every form of a matrix, those that methods make included."""
    by_name = {name: form(matrix, spec) for name, spec in SPECS.items()}
    codes = torch.randint(8, matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8).to(
        matrix.device
    )
    groups = matrix.shape[1] // 8
    by_name["offset"] = OffsetGrid(
        codes,
        gaussian(len(matrix), groups).abs().half().to(matrix.device),
        gaussian(len(matrix), groups, seed=2).half().to(matrix.device) + 3,
        3,
        kept,
    )
    by_name["scaled"] = InputScaled(
        form(matrix, SPECS["group"]), (gaussian(matrix.shape[1], seed=3).abs() + 0.5).half().to(matrix.device)
    )
    by_name["scaled nf4"] = InputScaled(
        form(matrix, SPECS["nf4 group"]),
        (gaussian(matrix.shape[1], seed=3).abs() + 0.5).half().to(matrix.device),
    )
    return by_name


# --- what codes stand for


def test_nf4_levels_are_those_of_the_paper():
    # Dettmers et al. 2023, appendix E: quantiles of the standard normal at evenly spaced probabilities from 1
    # - offset on, 8 above zero and 7 below
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([above, torch.zeros(1), below]).sort().values
    assert torch.allclose(levels / levels.max(), torch.tensor(NF4), atol=2e-6)
    assert NF4.index(0.0) == 7


def test_nf4_takes_the_nearest_level():
    matrix = gaussian(16, 32)
    stored = form(matrix, Spec(4, 8, "nf4", search=False))
    scale = matrix.view(16, 4, 8).abs().amax(2).half()
    assert torch.equal(stored.scale, scale)  # the largest of the group, as the paper's absolute maximum
    levels = torch.tensor(NF4)
    for row in range(16):
        for column in range(32):
            value, size = float(matrix[row, column]), float(scale[row, column // 8])
            best = min(range(16), key=lambda code: abs(value / size - float(levels[code])))
            assert int(stored.codes[row, column]) == best
            assert float(stored.dequantize()[row, column]) == pytest.approx(
                float(levels[best]) * size, rel=1e-6
            )


@pytest.mark.parametrize("whole", [False, True])
def test_float8_is_torchs_own_after_one_scale(whole):
    matrix = gaussian(6, 40)
    stored = form(matrix, Spec(8, 0, "float8", whole=whole))
    scale = (matrix.abs().max() if whole else matrix.abs().amax(1, keepdim=True)) / 448
    assert torch.equal(stored.scale, scale.view(stored.scale.shape))
    assert stored.scale.dtype == torch.float32
    assert torch.equal(stored.dequantize(), (matrix / scale).to(torch.float8_e4m3fn).float() * scale)
    assert (
        float((stored.dequantize() - matrix).norm() / matrix.norm()) < 0.03
    )  # three bits after the leading one


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_are_casts(dtype):
    matrix = gaussian(6, 40)
    assert torch.equal(
        form(matrix, Spec(16, 0, str(dtype).removeprefix("torch."))).dequantize(), matrix.to(dtype).float()
    )


@pytest.mark.parametrize("number_format", ["nf4", "integer"])
def test_the_scale_search_never_does_worse_group_by_group(number_format):
    matrix = gaussian(64, 64)
    errors = [
        (form(matrix, Spec(4, 16, number_format, search=search)).dequantize() - matrix)
        .view(64, 4, 16)
        .norm(dim=2)
        for search in (True, False)
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    assert float(errors[0].square().sum()) < 0.97 * float(errors[1].square().sum())


# Mean squared error on unit Gaussian weights, 64 to a group, for absolute-maximum NF4: seen here .00846 over
# 1M weights, below symmetric integers; no 4-bit code does better than 4^-4 = .0039.
def test_nf4_on_gaussian_weights():
    matrix = gaussian(1024, 1024)
    error = float(
        (form(matrix, Spec(4, 64, "nf4", search=False)).dequantize() - matrix).double().square().mean()
    )
    uniform = float(
        (form(matrix, Spec(4, 64, symmetric=True, search=False)).dequantize() - matrix)
        .double()
        .square()
        .mean()
    )
    assert 4.0**-4 < error < uniform


def test_one_scale_for_all_is_the_per_tensor_fake_quantization_of_torch():
    import torch.ao.quantization.fx._decomposed

    matrix = gaussian(12, 40)
    for search in (True, False):
        stored = form(matrix, Spec(4, whole=True, search=search))
        assert stored.scale.shape == (1, 1)
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(
            matrix, float(stored.scale), int(stored.zero_point), 0, 15, torch.uint8
        )
        assert torch.equal(stored.codes, codes)
        assert torch.equal(
            stored.dequantize(),
            torch.ops.quantized_decomposed.dequantize_per_tensor(
                codes, float(stored.scale), int(stored.zero_point), 0, 15, torch.uint8
            ),
        )


# --- what must hold for every form


@given(name=st.sampled_from(sorted(SPECS)), data=st.data())
@settings(max_examples=100)
def test_any_matrix_keeps_the_rules(name, data):
    number = st.floats(-1e4, 1e4, width=32) | st.just(0.0) | st.floats(-(2.0**-20), 2.0**-20, width=32)
    matrix = torch.tensor(data.draw(st.lists(number, min_size=32, max_size=32))).view(2, 16)
    stored = form(matrix, SPECS[name])
    values = stored.dequantize()
    assert torch.isfinite(values).all()
    assert (values[matrix == 0] == 0).all()
    assert torch.equal(stored.snap(values).dequantize(), values)  # what lies on the grid stays where it is


@pytest.mark.parametrize("name", forms(gaussian(4, 16)))
def test_forms_are_stacked_and_split_without_changing_a_bit(name, device):
    first, second = (forms(gaussian(4, 16, seed=seed).to(device))[name] for seed in (0, 1))
    both = stacked([first, second])
    assert kind_of(first) == kind_of(second)
    assert torch.equal(both.dequantize(), torch.stack([first.dequantize(), second.dequantize()]))
    assert torch.equal(both.snap(torch.stack([first.dequantize()] * 2)).dequantize()[0], first.dequantize())
    for whole, part in zip((first, second), split(both, (not name.startswith("float8"),) * 2), strict=True):
        assert torch.equal(part.dequantize(), whole.dequantize())
        assert part.overhead_bits == whole.overhead_bits


def test_forms_of_different_kinds_are_told_apart():
    by_name = forms(gaussian(4, 16), torch.ones(4, 16, dtype=torch.bool)) | {
        "kept not": forms(gaussian(4, 16))["offset"],
        "wider": form(gaussian(4, 16), Spec(6)),
        "none": None,
    }
    assert len({kind_of(part) for part in by_name.values()}) == len(by_name)
    tiny = form(gaussian(4, 16) * 1e-9, Spec(5))
    assert (tiny.scale.dtype, by_name["row"].scale.dtype) == (torch.float32, torch.float16)
    assert kind_of(tiny) == kind_of(by_name["row"])  # either precision of scales may stand together
    assert torch.equal(stacked([tiny, by_name["row"]]).dequantize()[0], tiny.dequantize())


def layer_of(
    stored, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Layer]:
    module = nn.Linear(16, 4, bias=False, dtype=dtype)
    layer = Layer("0", "0", module, mask=mask, grid=stored)
    layer.write(stored.dequantize())
    return nn.Sequential(module), layer


@pytest.mark.parametrize("name", forms(gaussian(4, 16)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_packed_unpacks_to_the_same_bits(name, dtype, masked):
    kept = gaussian(4, 16, seed=9) > 1.2 if masked else None
    matrix = gaussian(4, 16) if kept is None else gaussian(4, 16) * kept
    stored = forms(matrix, kept)[name]
    model, layer = layer_of(stored, kept, dtype)
    layer.check()
    packed = pack_model(model, (layer,))
    assert torch.equal(unpack_state(packed.tensors, packed.manifest())["0.weight"], model[0].weight)
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())
    count = 64 if kept is None else int(torch.count_nonzero(model[0].weight))
    assert packed.theoretical_bytes == math.ceil(stored.bits * count / 8)
    if not masked and stored.bits < 16:
        assert packed.packed_bytes * 8 == 64 * stored.bits + stored.overhead_bits + (
            -(64 * stored.bits + stored.overhead_bits) % 8
        )


def test_a_grid_without_zero_is_zero_by_its_mask():
    kept = gaussian(4, 16, seed=9) > 0
    stored = forms(gaussian(4, 16), kept)["offset"]
    assert bool((stored.dequantize()[~kept] == 0).all())
    assert bool((stored.snap(torch.full((4, 16), 7.0)).dequantize()[~kept] == 0).all())
    model, layer = layer_of(stored, kept)
    assert pack_model(model, (layer,)).encodings["0.weight"].kind == "grid+bitmask"  # zeros are nowhere else
    assert stored.overhead_bits == 16 * 2 * 8 + 64


def test_effective_bits_by_hand():
    row, group = form(gaussian(4, 16), Spec(4)), form(gaussian(4, 16), Spec(3, 8))
    assert row.overhead_bits == 4 * (16 + 4)
    assert group.overhead_bits == 8 * (16 + 3)
    assert form(gaussian(4, 16), Spec(4, whole=True)).overhead_bits == 16 + 4
    assert form(gaussian(4, 16), Spec(4, symmetric=True)).overhead_bits == 4 * 16
    assert effective_bits([(row, 64, 32)]) == 4 + 4 * 20 / 64
    assert (
        effective_bits([(row, 64, 32), (group, 64, 32), (None, 128, 32)])
        == (64 * 4 + 80 + 64 * 3 + 152 + 128 * 32) / 256
    )
    assert effective_bits([(InputScaled(row, torch.ones(16).half()), 64, 32)]) == 4 + (80 + 256) / 64
    assert effective_bits([]) == 0


def test_classes_say_their_widths():
    by_name = forms(gaussian(4, 16))
    assert {name: part.bits for name, part in by_name.items()} == {
        **{name: spec.bits for name, spec in SPECS.items()},
        "offset": 3,
        "scaled": 3,
        "scaled nf4": 4,
    }
    assert {type(part) for part in by_name.values()} == {Grid, FloatGrid, OffsetGrid, InputScaled, Cast}
