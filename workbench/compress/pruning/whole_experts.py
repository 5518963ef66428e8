"""Prune whole experts, by routed importance: how much an expert adds for the tokens that are routed to it.

REAP (Lasby et al. 2025): the mean over an expert's calibration tokens of the router's weight times the norm
of the expert's output. The experts that add least leave every block alike, the router's rows with them, and
config.json states the new number. An expert without tokens adds nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.calibration.routing import routing
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.mixtures import Mixture, find_mixtures, tell_numbers
from workbench.compress.pruning.surgery import keep, narrow, own_config
from workbench.errors import CompressionError, RecipeError
from workbench.modules.layer import can_hold
from workbench.util.library_internals import children_of

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune


def remove_experts(step: Prune, work: Work) -> None:
    """Take the experts of least routed importance (of least random number with the criterion `random`) out of
    every block.

    Raises:
        CompressionError: the model has no experts that can go, or so few are asked for that none goes.
        RecipeError: it does not ask for the same number everywhere, which is all that config.json can say.
    """
    mixtures, skipped = find_mixtures(work.model)
    check(step, work, mixtures, skipped)
    scores = importance(step, work, mixtures)
    for block in mixtures:
        take_out(step, work, block, scores[block.name])
    block = mixtures[0]
    left = block.left(step.sparsity)
    config = own_config(work)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = [] if config is None else [config] if text is config else [config, text]
    for holder in [*settings, *work.model.modules()]:  # whole models keep the number too
        tell_numbers(holder, block.experts, left, block.most_picked(left))


def check(step: Prune, work: Work, mixtures: list[Mixture], skipped: dict[str, str]) -> None:
    """Refuse what cannot be done, or not so that config.json could say it; raises as `remove_experts`."""
    if not mixtures or skipped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:2])
        raise CompressionError(
            f"{step!r}: {work.task.model_name} has no experts that it can remove"
            f" ({reasons or 'it has no experts'})"
        )
    if step.allocation != "uniform":
        raise RecipeError(
            f"{step!r}: every block has to keep the same number of experts, which config.json states once;"
            " use allocation='uniform'"
        )
    kept_whole = [block.name for block in mixtures if not may_go(block, step, work)]
    if kept_whole:
        raise RecipeError(
            f"{step!r}: every block has to keep the same number of experts, which config.json states once,"
            f" but targets leave out {kept_whole[0]!r}"
        )
    if len({(block.experts, block.groups, block.picked) for block in mixtures}) > 1:
        numbers = sorted({block.experts for block in mixtures})
        raise CompressionError(
            f"{step!r}: the blocks have different numbers of experts"
            f" ({', '.join(map(str, numbers))}): what is left could not be said in config.json"
        )
    size = mixtures[0].experts // mixtures[0].groups
    if step.sparsity and mixtures[0].left(step.sparsity) == mixtures[0].experts:
        raise CompressionError(
            f"{step!r} removes nothing: {step.sparsity:.3g} of {size} experts"
            f"{' of a group' if mixtures[0].groups > 1 else ''} is less than half of one; it starts at"
            f" sparsity={0.5 / size:.3g}"
        )


def may_go(block: Mixture, step: Prune, work: Work) -> bool:
    """Return whether the targets pick a layer of a block and leave out none."""
    layers = [layer for layer in work.layers.values() if layer.name.startswith(f"{block.name}.")]
    return any(work.takes(step, layer) for layer in layers) and not any(
        step.excluded(*layer.names) for layer in layers
    )


def importance(step: Prune, work: Work, mixtures: list[Mixture]) -> dict[str, Tensor]:
    """Return the routed importance of every expert, float64 [experts] by block; kept while no weight has
    changed.
    """
    if CRITERIA[step.criterion].units == "draw":
        generator = torch.Generator().manual_seed(step.seed)
        return {
            block.name: torch.rand(block.experts, generator=generator, dtype=torch.float64)
            for block in mixtures
        }
    pristine = all(layer.pristine for layer in work.layers.values()) and work.statistics.task is work.task
    table = (
        work.statistics.routing()
        if pristine
        else routing(dataclasses.replace(work.task, model=work.model), work.progress)
    )
    return {block.name: table[block.name][1] / table[block.name][0].clamp_min(1) for block in mixtures}


def least(block: Mixture, scores: Tensor, sparsity: float) -> list[int]:
    """Return the experts that stay: of each group those of the highest scores, ties to the earlier one."""
    size = block.experts // block.groups
    stays = block.left(sparsity) // block.groups
    order = scores.view(block.groups, size).sort(descending=True, stable=True).indices[:, :stays]
    return sorted((order + size * torch.arange(block.groups)[:, None]).flatten().tolist())


def take_out(step: Prune, work: Work, block: Mixture, scores: Tensor) -> None:
    """Take experts out of one block and its router, give those that stay their new numbers, and report."""
    kept = least(block, scores, step.sparsity)
    say(step, work, block, scores, kept)
    experts = work.model.get_submodule(block.name)
    modules = children_of(experts)
    stay = [modules.pop(str(place)) for place in range(block.experts)]
    modules.update({str(place): stay[before] for place, before in enumerate(kept)})
    cut_router(work, block, torch.tensor(kept))
    for module in [work.model.get_submodule(block.holder), *work.model.get_submodule(block.holder).modules()]:
        tell_numbers(module, block.experts, len(kept), block.most_picked(len(kept)))
    work.move(
        {
            f"{block.name}.{place}": f"{block.name}.{kept.index(place)}" if place in kept else None
            for place in range(block.experts)
        }
    )


def cut_router(work: Work, block: Mixture, kept: Tensor) -> None:
    """Leave a router the entries of the experts that stay."""
    layer = work.layers.get(block.router)
    done = set[str]()
    if can_hold(router := work.model.get_submodule(block.router)):
        narrow(router, rows=kept)
        done = {f"{block.router}.{name}" for name in ("weight", "bias")}
        if layer is not None:
            layer.keep(kept, None)
            layer.finite = False
    for name, dimension in block.tensors.items():
        if name not in done:
            owner, _, last = name.rpartition(".")
            keep(work.model.get_submodule(owner), last, dimension, kept)


def say(step: Prune, work: Work, block: Mixture, scores: Tensor, kept: list[int]) -> None:
    """Say for every layer of an expert whether that went and why, and of the router what it lost."""
    gone = block.experts - len(kept)
    given = gone / block.experts
    asked = "" if abs(given - step.sparsity) < 5e-4 else f", {step.sparsity:.3g} asked, {given:.3g} given"
    by = "random choice" if CRITERIA[step.criterion].units == "draw" else "routed importance"
    name = work.origin_of(block.name)
    for place in range(block.experts):
        outcome = (
            f"{'kept' if place in kept else 'removed'} with its expert: {by} {float(scores[place]):.3g}"
            f" ({gone} of {block.experts} experts of {name} removed{asked})"
        )
        for layer in work.layers.values():
            if layer.name.startswith(f"{block.name}.{place}."):
                work.took(step, layer, outcome)
    lost = f"{gone} of {block.experts} rows removed with their experts"
    router = work.origin_of(block.router)
    if block.router in work.layers:
        work.took(step, work.layers[block.router], lost)
    elif router in work.outcomes:
        skipped = f"{step.kind()} skipped: "
        work.outcomes[router] = [told for told in work.outcomes[router] if not told.startswith(skipped)]
        work.say(router, lost)


def experts_left(model: nn.Module, sparsity: float) -> dict[str, tuple[Mixture, int]]:
    """Return every mixture with the number of experts that stay, by the block's name; none where they cannot
    go.
    """
    mixtures, skipped = find_mixtures(model)
    alike = len({(block.experts, block.groups) for block in mixtures}) == 1
    return {block.name: (block, block.left(sparsity)) for block in mixtures} if alike and not skipped else {}
