"""Convolutions in smaller convolutions, against the dense convolution of the kernel that they multiply out
to."""

from __future__ import annotations

import itertools

import pytest
import torch
from recorded import recorded_inputs
from test_statistics import custom_task
from torch import nn

import workbench as wb
from workbench.compress import compress
from workbench.compress.low_rank.convolution import spatial, tucker2
from workbench.modules.factored import Factors, Form, Shape, cost, factor_shapes, factors_like, form_of
from workbench.recipe import Recipe

OPTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": (5, 3), "dilation": (1, 2), "padding": (3, 1), "stride": (2, 3)},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 3, "padding": (2, 0), "padding_mode": "replicate"},
    {"kernel_size": (1, 3), "padding": (1, 1), "stride": (2, 1)},
    {"kernel_size": (3, 1)},
]


def kernel_of(factors: Factors) -> torch.Tensor:
    """Return the kernel that the factors multiply out to, one element at a time, in float64."""
    weights = [part.weight.detach().double().cpu() for part in factors]
    if len(weights) == 3:
        first, core, last = weights[0][:, :, 0, 0], weights[1], weights[2][:, :, 0, 0]
        return sum(
            torch.einsum("o,hw,c->ochw", last[:, p], core[p, q], first[q])
            for p, q in itertools.product(range(core.shape[0]), range(core.shape[1]))
        )
    first, last = weights
    if tuple(last.shape[2:]) == (1, 1):
        return sum(torch.einsum("o,chw->ochw", last[:, r, 0, 0], first[r]) for r in range(len(first)))
    return sum(torch.einsum("ow,ch->ochw", last[:, r, 0], first[r, :, :, 0]) for r in range(len(first)))


def dense_like(module: nn.Conv2d, kernel: torch.Tensor) -> nn.Conv2d:
    """Return the same convolution in float64 with another kernel."""
    convolution = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        bias=module.bias is not None,
        padding_mode=module.padding_mode,
    ).double()
    convolution.weight = nn.Parameter(kernel)
    if module.bias is not None:
        convolution.bias = nn.Parameter(module.bias.detach().double().cpu())
    return convolution


@pytest.mark.parametrize("conv", ["channel", "spatial", "tucker2"])
@pytest.mark.parametrize("factorization", ["svd", "whitened"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_factors_do_what_one_convolution_of_their_product_would(options, conv, factorization, device):
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, **options))
    task = custom_task(body, body(torch.zeros(1, 1, 8, 8)).numel(), device)
    compressed = compress(
        task, Recipe(wb.LowRank(rank_ratio=0.3, factorization=factorization, conv=conv, targets=("body.1",)))
    )
    factors, dense = compressed.model.body[1], task.model.body[1]
    assert isinstance(factors, Factors)
    assert len(factors) == (3 if conv == "tucker2" else 2)
    assert sum(part.weight.numel() for part in factors) < dense.weight.numel()
    kernel = kernel_of(factors)
    torch.testing.assert_close(factors.weight.detach().double().cpu(), kernel, rtol=1e-5, atol=1e-6)
    assert factors.weight.shape == dense.weight.shape
    x = torch.randn(5, 8, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        factors(x.to(device)).double().cpu(), dense_like(dense, kernel)(x.double()), rtol=1e-4, atol=1e-5
    )
    assert factors.bias is dense.bias or torch.equal(factors.bias, dense.bias)
    row = next(row for row in compressed.report if row.name == "body.1")
    original = dense.weight.detach().double().cpu()
    assert row.relative_error == pytest.approx(float((kernel - original).norm() / original.norm()), rel=1e-4)
    assert row.weights == sum(part.weight.numel() for part in factors)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_spatial_is_the_best_of_its_rank(rank):
    kernel = torch.randn(6, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, last = spatial(kernel, rank)
    assert (first.shape, last.shape) == ((rank, 5, 3, 1), (6, rank, 1, 4))
    product = torch.einsum("rch,orw->ochw", first[..., 0], last[:, :, 0])
    values = torch.linalg.svdvals(kernel.permute(1, 2, 0, 3).reshape(15, 24))
    assert float((kernel - product).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-9)


def test_tucker_is_exact_at_full_ranks_and_never_worse_than_its_start():
    kernel = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def lost(factors: list[torch.Tensor]) -> float:
        return float(
            (
                torch.einsum("op,pqhw,qc->ochw", factors[2][..., 0, 0], factors[1], factors[0][..., 0, 0])
                - kernel
            ).norm()
        )

    assert lost(tucker2(kernel, 5, 6)) < 1e-12 * float(kernel.norm())
    for rank_in, rank_out in ((1, 1), (2, 3), (4, 5)):
        side_in = torch.linalg.svd(kernel.transpose(0, 1).flatten(1))[0][:, :rank_in]
        side_out = torch.linalg.svd(kernel.flatten(1))[0][:, :rank_out]
        core = torch.einsum("ochw,cq,op->pqhw", kernel, side_in, side_out)
        start = lost([side_in.t()[..., None, None], core, side_out[..., None, None]])
        assert lost(tucker2(kernel, rank_in, rank_out)) <= start * (1 + 1e-12)


@pytest.mark.parametrize("conv", ["spatial", "tucker2"])
def test_the_last_factor_fits_the_outputs_no_worse_than_any_other_would(conv):
    torch.manual_seed(5)
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
    task = custom_task(body, body(torch.zeros(1, 1, 8, 8)).numel())
    rows = recorded_inputs(task)["body.2"].double()
    dense = task.model.body[2].weight.detach().double().flatten(1)
    lost = {}
    for factorization in ("svd", "whitened"):
        factors = compress(
            task,
            Recipe(wb.LowRank(rank_ratio=0.3, factorization=factorization, conv=conv, targets=("body.2",))),
        ).model.body[2]
        kernel = kernel_of(factors)
        lost[factorization] = float((rows @ (kernel.flatten(1) - dense).t()).norm())
        front = [part.weight.detach().double() for part in list(factors)[:-1]]
        patch = rows.view(-1, 8, 3, 3)
        for weight in front:
            patch = torch.nn.functional.conv2d(patch, weight)
        fitted = torch.linalg.lstsq(
            patch.flatten(1), rows @ dense.t()
        ).solution  # by another way than the workbench's
        best = float((patch.flatten(1) @ fitted - rows @ dense.t()).norm())
        assert lost[factorization] >= best * (1 - 1e-6)
        if factorization == "whitened":
            assert lost[factorization] == pytest.approx(best, rel=1e-4)
    assert lost["whitened"] < 0.99 * lost["svd"]


def test_a_kernel_of_one_pixel_has_only_channels_to_split():
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 1))
    task = custom_task(body, body(torch.zeros(1, 1, 8, 8)).numel())
    for conv in ("spatial", "tucker2"):
        compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.3, conv=conv)))
        assert form_of(compressed.model.body[1]) == Form("channel", (2,))
        assert (
            next(row.outcome for row in compressed.report if row.name == "body.1")
            == "rank 2 of 8 by whitened"
        )


def test_ranks_that_save_nothing_are_stated():
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3))
    task = custom_task(body, body(torch.zeros(1, 1, 8, 8)).numel())
    compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.7, conv="tucker2")))
    outcomes = {row.name: row.outcome for row in compressed.report}
    assert "save no weights" in outcomes["body.0"]
    assert outcomes["body.1"] == "ranks 6 of 8 in and 8 of 12 out by whitened, tucker2"


@pytest.mark.parametrize(
    "form", [Form("channel", (3,)), Form("spatial", (3,)), Form("tucker2", (2, 3))], ids=str
)
def test_forms_know_their_shapes_and_come_back_from_json_and_modules(form):
    module = nn.Conv2d(4, 6, (3, 5), padding=(1, 2))
    factors = factors_like(module, form)
    shape = Shape(6, 60, (3, 5), convolution=True)
    assert [tuple(part.weight.shape) for part in factors] == factor_shapes(shape, form)
    assert cost(shape, form) == sum(part.weight.numel() for part in factors)
    assert Form.from_json(form.to_json()) == form_of(factors) == form
    with pytest.raises(ValueError, match="unknown form of low rank"):
        Form.from_json(["cp", 3])
