"""Which tokens of the calibration data go to which expert: how many each gets, and what it adds.

An expert that gets none has no inputs to be compressed by. What is known of its weights alone then decides:
second moments are the identity, so that Wanda and SparseGPT go by magnitude, GPTQ and AWQ round to the
nearest, and a whitened factorisation is the plain one; gradients are so small that it counts for next to
nothing beside others, and alike within it; ranges are those of the experts beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.modules.experts import (
    LAST,
    ParallelExperts,
    RoutedExperts,
    SeparateExperts,
    expert_of,
    experts_in,
    routes,
    routing_of,
)
from workbench.modules.layer import Layer
from workbench.modules.offload import HOST, device_of, streams_to
from workbench.util.hooks import of_this_thread
from workbench.util.progress import Progress

if TYPE_CHECKING:
    from workbench.tasks.base import Task

GRADIENT, SQUARE = 1e-10, 1e-20  # of weights that no token has met: E[g] and E[g^2]


def routing(task: Task, progress: Progress) -> dict[str, Tensor]:
    """Return, by the name of each block of experts, float64 [2, experts] on the host: how many calibration
    tokens each expert got, and the sum over them of the router's weight times the norm of its output.

    A block of `ParallelExperts` knows no weights: its sums are 0.
    """
    blocks = experts_in(task.model)
    by_block = {
        name: torch.zeros(2, block.num_experts, dtype=torch.float64) for name, block in blocks.items()
    }
    device = device_of(task.model)
    with ExitStack() as hooks, torch.no_grad():
        for name, block in blocks.items():
            for handle in watched(block, by_block[name]):
                hooks.callback(handle.remove)
        for start in range(0, len(task.calibration) if blocks else 0, task.batch_size):
            progress("routing", start, len(task.calibration))
            task.kind.logits(task.model, task.calibration[start : start + task.batch_size].to(device))
    return by_block


def watched(block: SeparateExperts, totals: Tensor) -> Iterable[Any]:
    """Yield the hooks that count a block's tokens into `totals` [2, experts], as `routing` says."""
    gates: dict[int, Tensor] = {}

    def chosen(_module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        _, index, weights = routing_of(given, named)
        gates.clear()
        gates.update({place: own for place, _, own in routes(index, weights, block.num_experts)})

    def counted(place: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], outputs: Tensor) -> None:  # noqa: ARG001
            totals[0, place] += len(outputs)
            if isinstance(block, RoutedExperts):
                size = block.normed(outputs).float().norm(dim=-1)
                totals[1, place] += float((gates[place].float().abs() * size).sum())
            elif not isinstance(block, ParallelExperts):  # its inputs were multiplied by the weights before
                totals[1, place] += float(outputs.float().norm(dim=-1).sum())

        return hook

    if isinstance(block, RoutedExperts):
        yield block.register_forward_pre_hook(of_this_thread(chosen), with_kwargs=True)
    for place, expert in enumerate(block.experts().values()):
        last = expert if isinstance(block, ParallelExperts) else expert.get_submodule(LAST)
        yield last.register_forward_hook(of_this_thread(counted(place)))


def without_tokens(model: nn.Module, names: Iterable[str], reached: Collection[str]) -> list[str]:
    """Return the layers of experts, among `names`, that are not `reached`."""
    blocks = experts_in(model)
    return [name for name in names if name not in reached and expert_of(name, blocks)[0]] if blocks else []


def neutral_moments(
    model: nn.Module, layers: Mapping[str, Layer], reached: Collection[str]
) -> dict[str, Tensor]:
    """Return the identity, one object for each number of inputs, as the second moment of the experts' layers
    that no token reached.
    """
    identities: dict[int, Tensor] = {}
    by_layer = {}
    for name in without_tokens(model, layers, reached):
        weight, columns = layers[name].parameter, layers[name].shape[1]
        where = HOST if streams_to(weight) is not None else weight.device
        if columns not in identities:
            identities[columns] = torch.eye(columns, device=where)
        by_layer[name] = identities[columns]
    return by_layer


def ranges_beside(
    model: nn.Module, names: Iterable[str], low: dict[str, Tensor], high: dict[str, Tensor]
) -> None:
    """Give the experts' layers that no token reached the ranges of the same layer in the block's other
    experts, in place.
    """
    blocks = experts_in(model)
    for name in without_tokens(model, names, set(low)):
        block, _, rest = expert_of(name, blocks)
        part = rest.partition(".")[2]
        beside = [
            sibling
            for place in range(blocks[block].num_experts)
            if (sibling := f"{block}.{place}.{part}".removesuffix(".")) in low
        ]
        if beside:
            low[name] = torch.stack([low[sibling] for sibling in beside]).amin(0)
            high[name] = torch.stack([high[sibling] for sibling in beside]).amax(0)
