"""Caches, and recipes that fill them."""

from __future__ import annotations

import torch

import workbench as wb
from workbench.calibration.disk_cache import DiskCache
from workbench.calibration.memory_cache import Budget, Cache
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


def keeping(budget: Budget, disk: DiskCache | None = None) -> Cache:
    return Cache(CPU, budget, disk)
