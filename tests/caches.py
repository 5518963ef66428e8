"""Caches, and recipes that fill them."""

from __future__ import annotations

import torch

import workbench as wb
from workbench.calibration.disk_cache import DiskCache
from workbench.calibration.memory_cache import Budget, Cache
from workbench.calibration.statistics import Gradients
from workbench.recipe import Recipe

CPU = torch.device("cpu")
MB = 2**20

RECIPES = (
    Recipe(wb.Quantize(weight_bits=3, rounding="gptq")),
    Recipe(wb.LowRank(rank_ratio=0.3), wb.Prune(sparsity=0.5, criterion="wanda")),
    Recipe(wb.Prune(sparsity=0.5, criterion="sparsegpt")),
    Recipe(wb.Prune(sparsity=0.4, criterion="fisher"), wb.Quantize(weight_bits=4)),
    Recipe(wb.LowRank(rank_ratio=0.3, rank_allocation="loss")),
    Recipe(wb.Quantize(weight_bits=3.5)),
)


def numbers(count: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def plain_value(whole: torch.Tensor) -> dict[object, object]:
    """A value of every sort of plain data, with views of one storage and one object twice."""
    return {
        "a": (whole, whole.t(), None, True),
        ("b", 1): [Gradients(whole[1:3], whole.half()), 0.1 + 0.2, float("inf")],
        "same": whole,
    }


def check_same(again: dict[object, object], whole: torch.Tensor) -> None:
    """Assert that a value is `plain_value(whole)` bit by bit, with its views, strides and shared objects."""
    assert list(again) == list(plain_value(whole))
    first, turned, *rest = again["a"]
    again_found, *numbers = again["b", 1]
    assert again["same"] is first
    assert turned.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert turned.stride() == whole.t().stride()
    assert rest == [None, True]
    assert numbers == [0.1 + 0.2, float("inf")]
    assert isinstance(again_found, Gradients)
    pairs = (
        (first, whole),
        (turned, whole.t()),
        (again_found.mean, whole[1:3]),
        (again_found.square, whole.half()),
    )
    for mine, yours in pairs:
        assert mine.dtype == yours.dtype
        assert torch.equal(mine, yours)


def keeping(budget: Budget, disk: DiskCache | None = None) -> Cache:
    return Cache(CPU, budget, disk)
