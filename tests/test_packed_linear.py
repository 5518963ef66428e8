"""Packed weights: the layout of units, the layers that share a product, and on a GPU every kernel against
float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.formats.affine import Grid
from workbench.kernels.matmul_layout import pack_units, unpack_units
from workbench.modules.layer import Layer
from workbench.runtime.packed_linear import (
    PackedLinear,
    join_siblings,
    multiply,
    packed_weight,
    unpacked,
    why_not,
)
from workbench.runtime.packed_triton import PackedTriton

WIDTHS = range(2, 9)


def random_grid(
    rows: int,
    inputs: int,
    bits: int,
    group: int,
    *,
    zero_point: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Grid:
    """Return a grid with random codes, scales of several sizes, and zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // group if group else 1
    codes = torch.randint(1 << bits, (rows, inputs), dtype=torch.uint8, generator=generator)
    scale = (
        (torch.rand(rows, groups, generator=generator) * 3 + 0.1)
        .mul(10 ** (3 * torch.rand(rows, 1, generator=generator) - 2))
        .half()
    )
    zero = (
        torch.randint(1 << bits, (rows, groups), dtype=torch.uint8, generator=generator)
        if zero_point
        else None
    )
    return Grid(codes.to(device), scale.to(device), None if zero is None else zero.to(device), bits)


def reference(grid: Grid, x: torch.Tensor) -> torch.Tensor:
    """Return x W^T in float64, written from the definition of the grid alone."""
    rows, inputs = grid.codes.shape
    group = inputs // grid.scale.shape[1]
    weight = torch.empty(rows, inputs, dtype=torch.float64, device=x.device)
    for column in range(inputs):
        zero = (
            (1 << (grid.bits - 1))
            if grid.zero_point is None
            else grid.zero_point[:, column // group].double()
        )
        weight[:, column] = (grid.codes[:, column].double() - zero) * grid.scale[:, column // group].double()
    return x.double() @ weight.t()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 200), st.integers(0, 2**31))
def test_units_hold_every_code_in_its_bits_and_no_more(bits, rows, inputs, seed):
    codes = torch.randint(
        1 << bits, (rows, inputs), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack_units(codes, bits)
    assert packed.nbytes * 8 == rows * -(-inputs // 32) * 32 * bits
    assert torch.equal(unpack_units(packed, bits, inputs), codes)


@pytest.mark.parametrize("bits", [1, 9])
def test_units_refuse_other_widths(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        pack_units(torch.zeros(2, 32, dtype=torch.uint8), bits)


def test_the_first_code_lies_in_the_lowest_bits_of_the_first_word():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 9], codes[0, 10], codes[0, 30] = (
        5,
        3,
        7,
        6,
    )  # 3 bits: ten whole codes a word, two in what is left over
    word = pack_units(codes, 3)[0, :, 0].tolist()
    assert word[0] & 0xFFFFFFFF == 5 | 3 << 27 | (6 & 3) << 30
    assert word[1] & 0x3FFFFFFF == 7
    assert (word[1] >> 30) & 1 == 6 >> 2


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("rows", "inputs", "group", "zero_point"), [(5, 64, 32, True), (7, 192, 64, False), (3, 45, 0, True)]
)
def test_a_packed_layer_multiplies_as_its_grid_says(bits, rows, inputs, group, zero_point):
    grid = random_grid(rows, inputs, bits, group, zero_point=zero_point)
    bias = torch.randn(rows)
    layer = PackedLinear(packed_weight(grid), bias, torch.float32)
    x = torch.randn(2, 3, inputs)
    wanted = reference(grid, x.flatten(0, 1)).view(2, 3, rows) + bias
    assert float((layer(x).double() - wanted).norm() / wanted.norm()) < 1e-6


def test_a_group_that_cuts_units_is_refused_with_the_reason():
    assert why_not(random_grid(4, 96, 4, 48)) == "group_size 48 is no multiple of 32"
    assert not why_not(random_grid(4, 96, 4, 0))
    linear = nn.Linear(96, 4)
    assert "multiple of 32" in PackedTriton().serves(
        Layer("a", "a", linear, grid=random_grid(4, 96, 4, 16)), "cuda"
    )
    assert "shared with head" in PackedTriton().serves(
        Layer("a", "a", linear, grid=random_grid(4, 96, 4, 32), others={"head": linear}), "cuda"
    )
    assert "GPU" in PackedTriton().here("cpu")


class Siblings(nn.Module):
    """Three layers; the third may read another tensor."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        for index, (name, rows) in enumerate((("q", 6), ("k", 4), ("v", 4))):
            setattr(
                self,
                name,
                PackedLinear(packed_weight(random_grid(rows, 64, 4, 32, seed=index)), None, torch.float32),
            )

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x + 1 if self.apart else x)


@pytest.mark.parametrize("apart", [False, True])
def test_siblings_share_one_product_and_answer_as_before(apart, monkeypatch):
    model, x = Siblings(apart=apart), torch.randn(5, 64)
    alone = [part.clone() for part in model(x)]
    bits = sum(layer.words.nbytes for layer in model.children())
    join_siblings(model)
    assert model.q.shared is model.v.shared is not None
    assert bits == model.q.shared.weight.words.nbytes  # members hold views
    counted = []
    monkeypatch.setattr(
        "workbench.runtime.packed_linear.multiply", lambda *given: counted.append(1) or multiply(*given)
    )
    for _ in range(2):
        for output, wanted in zip(model(x), alone, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-3)
    assert len(counted) == (
        2 if not apart else 2 + 3
    )  # apart: found out at the first call, from then on one product each
    assert model.q.shared.seen is None or apart


def test_layers_of_different_kinds_are_not_joined():
    model = nn.Sequential(
        *(
            PackedLinear(packed_weight(random_grid(4, 64, bits, group)), None, torch.float32)
            for bits, group in ((4, 32), (4, 64), (3, 32))
        )
    )
    join_siblings(model)
    assert all(layer.shared is None for layer in model)


# --- kernels

SHAPES = [
    (70, 64, 32, True),
    (40, 320, 64, True),
    (200, 576, 64, False),
    (33, 45, 0, True),
    (1030, 4096, 128, True),
    (1000, 96, 0, False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "inputs", "group", "zero_point"), SHAPES)
def test_kernels_agree_with_float64_on_fresh_inputs(bits, rows, inputs, group, zero_point):
    grid = random_grid(
        rows,
        inputs,
        bits,
        group,
        zero_point=zero_point,
        device="cuda",
        seed=int(torch.randint(2**31, ()).item()),
    )
    weight, lock = packed_weight(grid), torch.zeros(256, dtype=torch.int32, device="cuda")
    for dtype, most in (
        ((torch.bfloat16, 8e-3), (torch.float32, 2e-6)) if bits == 4 else ((torch.bfloat16, 8e-3),)
    ):
        for count in (1, 2, 17, 64, 65):
            x = torch.randn(count, inputs, device="cuda", dtype=dtype)
            poison = torch.full(
                (4 * count, rows), torch.nan, device="cuda", dtype=dtype
            )  # what the allocator gives out next
            del poison
            product = multiply(x, weight, lock)
            wanted = reference(grid, x)
            assert float((product.double() - wanted).norm() / wanted.norm()) < most, (dtype, count)
            assert not int(lock.sum())
    assert torch.equal(unpacked(weight, torch.float32).t(), grid.dequantize())


@pytest.mark.gpu
def test_many_vectors_are_multiplied_part_by_part(monkeypatch):
    monkeypatch.setattr("workbench.runtime.packed_linear.CHUNK", 64 * 512 * 2)
    grid = random_grid(300, 512, 4, 64, device="cuda")
    x = torch.randn(1100, 512, device="cuda", dtype=torch.bfloat16)
    wanted = reference(grid, x)
    for weight in (packed_weight(grid), packed_weight(grid).part(32, 300)):
        product = multiply(x, weight, torch.zeros(64, dtype=torch.int32, device="cuda"))
        assert float((product.double() - wanted[:, -weight.rows :]).norm() / wanted.norm()) < 8e-3


@pytest.mark.gpu
def test_large_activations_do_not_overflow_and_small_ones_do_not_vanish():
    grid = random_grid(64, 256, 4, 64, device="cuda")
    weight, lock = packed_weight(grid), torch.zeros(64, dtype=torch.int32, device="cuda")
    for size in (1e-9, 1.0, 1e9):
        x = size * torch.randn(1, 256, device="cuda")
        wanted = reference(grid, x)
        assert float((multiply(x, weight, lock).double() - wanted).norm() / wanted.norm()) < 2e-6, size


@pytest.mark.gpu
def test_a_packed_layer_can_be_captured_and_replayed():
    grid = random_grid(300, 512, 3, 64, device="cuda")
    layer = PackedLinear(packed_weight(grid), None, torch.bfloat16)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        wanted = reference(grid, x)
        assert float((y.double() - wanted).norm() / wanted.norm()) < 8e-3


@pytest.mark.gpu
def test_kernels_run_on_the_gpu_where_their_tensors_lie():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, and torch sees {torch.cuda.device_count()}")
    grid = random_grid(200, 576, 4, 64, device="cuda:1")
    weight, lock = packed_weight(grid), torch.zeros(256, dtype=torch.int32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    for count in (1, 17, 65):
        x = torch.randn(count, 576, device="cuda:1", dtype=torch.bfloat16)
        product, wanted = multiply(x, weight, lock), reference(grid, x)
        assert product.device == x.device
        assert float((product.double() - wanted).norm() / wanted.norm()) < 8e-3, count
