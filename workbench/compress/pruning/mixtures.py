"""Whole experts as units: where a model has them, and what else counts them.

A mixture is a block of experts with the router that picks among them. What belongs to the router is found by
its sizes: the tensors beside the experts that have an entry for each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from workbench.compress.pruning.prunable_units import removed_count
from workbench.modules.experts import ParallelExperts, SeparateExperts, experts_in

TOPS = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "router_top_k")
GROUPS = ("num_group", "n_group", "num_groups", "n_groups")  # of experts, of which a token picks some first
PICKED = ("topk_group", "topk_groups")
ROUTERS = ("router", "gate")  # how what picks is called, where sizes alone do not tell


@dataclass(frozen=True)
class Mixture:
    """A block of experts: its name, that of the module that holds it and its router, and the router's tensors
    by name with the dimension that counts experts.

    `groups`: of equally many experts; a token picks among the experts of `picked` of them.
    """

    name: str
    holder: str
    router: str
    tensors: dict[str, int]
    experts: int
    groups: int
    picked: int

    def left(self, sparsity: float) -> int:
        """Return how many experts stay: as many of each group."""
        size = self.experts // self.groups
        return self.groups * (size - removed_count(size, sparsity))

    def most_picked(self, left: int) -> int:
        """Return how many experts a token can pick when so many are left."""
        return left * self.picked // self.groups


def find_mixtures(model: nn.Module) -> tuple[list[Mixture], dict[str, str]]:
    """Return every mixture of a model, and why other blocks of experts cannot lose any."""
    mixtures, skipped = list[Mixture](), dict[str, str]()
    for name, block in experts_in(model).items():
        result = mixture(model, name, block)
        if isinstance(result, str):
            skipped[name] = result
        else:
            mixtures.append(result)
    return mixtures, skipped


def mixture(model: nn.Module, name: str, block: SeparateExperts) -> Mixture | str:
    """Return a block's mixture, or why its experts cannot be taken out."""
    if isinstance(block, ParallelExperts):
        return "its experts are one product each, and what picks among them is part of several"
    holder = name.rpartition(".")[0]
    count = block.num_experts
    beside = {
        part: tensor
        for part, tensor in tensors_of(model.get_submodule(holder))
        if not part.startswith(last(name))
    }
    weights = [part for part, tensor in beside.items() if tensor.ndim == 2 and tensor.shape[0] == count]
    named = [part for part in weights if any(word in part for word in ROUTERS)]
    weights = weights if len(weights) == 1 else named
    if len(weights) != 1:
        return f"{len(weights)} tensors beside its {count} experts look like a router's"
    router = weights[0].rpartition(".")[0]
    top = router.partition(".")[0]
    tensors = {f"{holder}.{weights[0]}": 0} | {
        f"{holder}.{part}": tensor.ndim - 1
        for part, tensor in beside.items()
        if tuple(tensor.shape) in {(count,), (1, count)} and part.partition(".")[0] in {top, part}
    }
    numbers = numbers_of(model.get_submodule(holder))
    groups = next((numbers[key] for key in GROUPS if key in numbers), 1)
    picked = next((numbers[key] for key in PICKED if key in numbers), groups)
    if groups < 1 or count % groups:
        return f"its {count} experts are in {groups} groups of unequal size"
    return Mixture(name, holder, f"{holder}.{router}", tensors, count, groups, min(picked, groups))


def last(name: str) -> str:
    """Return the beginning of the names of a block's parts, as the module that holds it sees them."""
    return f"{name.rpartition('.')[2]}."


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over a module's parameters and buffers, by name."""
    return itertools.chain(module.named_parameters(), module.named_buffers())


def numbers_of(holder: nn.Module) -> dict[str, int]:
    """Return the whole numbers that the modules of a mixture keep, those of the router last."""
    return {
        key: value for module in holder.modules() for key, value in vars(module).items() if type(value) is int
    }


def counts_experts(key: str) -> bool:
    """Return whether a number of this name says how many experts there are to pick from."""
    otherwise = ("shared", "per_tok", "top", "zero", "group")
    return "experts" in key and not any(word in key for word in otherwise)


def tell_numbers(holder: Any, before: int, left: int, most: int) -> None:
    """Bring the numbers of a module, or of a configuration, in line with the experts that are left: how many
    there are, and that a token picks no more than `most`.
    """
    for key, value in list(vars(holder).items()):
        if type(value) is int and counts_experts(key) and value == before:
            setattr(holder, key, left)
        elif type(value) is int and key in TOPS and value > most:
            setattr(holder, key, most)
