"""Whole blocks as units, by block influence: how far a block turns the direction of what flows through it.

Block influence is 1 - E[cos(input, output)] over the calibration data (ShortGPT, Men et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.compress.pruning.block_lists import (
    BlockLists,
    find_block_lists,
    states_given,
    states_made,
    why_none,
)
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.surgery import drop_blocks
from workbench.compress.pruning.surgery.depths import check_mixtures, settle_depths
from workbench.errors import CompressionError

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune
    from workbench.modules.layer import Layer


def remove_blocks(step: Prune, work: Work) -> None:
    """Take out the blocks of least influence (of least random number with the criterion `random`).

    All removable blocks of the model are ranked together; of every list of blocks at least one stays.
    """
    found = block_lists(work)
    lists = found.places
    lengths = {name: len(list(work.model.get_submodule(name).children())) for name in lists}
    candidates = [
        (name, place)
        for name, places in lists.items()
        if lengths[name] > 1
        for place in places
        if may_go(f"{name}.{place}", step, work)
    ]
    if not candidates:
        raise CompressionError(
            f"{step!r}: {work.task.model_name} has no layers that it can remove ({why_none(found)})"
        )
    scores = block_scores(step, work, candidates)
    gone = weakest(candidates, scores, math.floor(step.sparsity * len(candidates) + 0.5 + 1e-9), lengths)
    if step.sparsity and not gone:
        raise CompressionError(
            f"{step!r} removes nothing: {step.sparsity:.3g} of {len(candidates)} blocks is less than half of"
            f" one; it starts at sparsity={0.5 / len(candidates):.3g}"
        )
    report(step, work, candidates, scores, gone)
    for block, reason in found.staying.items():
        for layer in within(block, work):
            work.say(layer, f"prune skipped: its block stays: {reason}")
    kept = {
        name: [place for place in range(length) if (name, place) not in gone]
        for name, length in lengths.items()
    }
    settle_depths(step, work, kept, lengths)
    for name in lists:
        take_out(work, name, kept[name], lengths[name])
    check_mixtures(step, work)


def block_lists(work: Work) -> BlockLists:
    """Return the lists of blocks of the model as it is; those of the dense one are found once."""

    def find() -> BlockLists:
        return find_block_lists(work.model, work.task.kind, work.task.calibration)

    untouched = not work.moved and work.statistics.task is work.task
    return work.statistics.once("block lists", find) if untouched else find()


def may_go(block: str, step: Prune, work: Work) -> bool:
    """Return whether the targets pick a layer of a block and leave out none."""
    layers = within(block, work)
    return any(work.takes(step, layer) for layer in layers) and not any(
        step.excluded(*layer.names) for layer in layers
    )


def within(block: str, work: Work) -> list[Layer]:
    """Return the layers of a block."""
    return [layer for layer in work.layers.values() if layer.name.startswith(f"{block}.")]


def weakest(
    candidates: list[tuple[str, int]], scores: list[float], count: int, lengths: dict[str, int]
) -> list[tuple[str, int]]:
    """Return up to `count` blocks of the lowest scores, of every list at least one left.

    Ties go to the later block.
    """
    left, gone = dict(lengths), list[tuple[str, int]]()
    for _, place in sorted((score, -place) for place, score in enumerate(scores)):
        block = candidates[-place]
        if len(gone) < count and left[block[0]] > 1:
            gone.append(block)
            left[block[0]] -= 1
    return sorted(gone)


def block_scores(step: Prune, work: Work, candidates: list[tuple[str, int]]) -> list[float]:
    """Return the block influence of each candidate, or random numbers.

    Computed once while no weight has changed.
    """
    if CRITERIA[step.criterion].units == "draw":
        return torch.rand(
            len(candidates), generator=torch.Generator().manual_seed(step.seed), dtype=torch.float64
        ).tolist()
    names = [f"{name}.{place}" for name, place in candidates]

    def compute() -> dict[str, float]:
        return influence(work, names)

    untouched = all(layer.pristine for layer in work.layers.values())
    influences = (
        work.statistics.once(("block influence", *names), compute, lasting=True) if untouched else compute()
    )
    return [influences[name] for name in names]


def influence(work: Work, names: list[str]) -> dict[str, float]:
    """Return 1 - E[cos(input, output)] of each block over the calibration data, positions that a mask leaves
    out not counted.

    Raises:
        CompressionError: a block passes on what is not finite, or not what it was given in shape.
    """
    sums: dict[str, Tensor] = {}
    weights: list[Tensor | None] = [None]

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        # Torch calls it so
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            before, after = states_given(given, named), states_made(out)
            if before is None or after is None or before.shape != after.shape:
                shapes = [None if one is None else list(one.shape) for one in (before, after)]
                raise CompressionError(
                    f"block {name!r} cannot be removed: it turns {shapes[0]} into {shapes[1]}"
                )
            along = (
                1 if before.ndim == 4 else -1
            )  # [items, channels, rows, columns] or [items, tokens, width]
            angles = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=along)
            counted = (
                weights[0]
                if weights[0] is not None and weights[0].shape == angles.shape
                else torch.ones_like(angles)
            )
            new = torch.stack([((1 - angles) * counted).sum().double(), counted.sum().double()])
            sums[name] = sums[name] + new if name in sums else new

        return hook

    task, device = work.task, next(work.model.parameters()).device
    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            hooks.callback(
                work.model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True).remove
            )
        for start in range(0, len(task.calibration), task.batch_size):
            work.progress("calibration", start, len(task.calibration))
            items = task.calibration[start : start + task.batch_size].to(device)
            mask = items.inputs.get("attention_mask")
            weights[0] = None if mask is None else mask.float()
            task.kind.logits(work.model, items)
    totals = torch.stack([sums[name] for name in names]).tolist()
    influences = {name: total / number for name, (total, number) in zip(names, totals, strict=True)}
    bad = next((name for name, value in influences.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise CompressionError(f"block {bad!r} passes on infinite or NaN values during calibration")
    return influences


def report(
    step: Prune,
    work: Work,
    candidates: list[tuple[str, int]],
    scores: list[float],
    gone: list[tuple[str, int]],
) -> None:
    """Say for every layer of a candidate whether its block went and why, what was asked for and what was
    given.
    """
    given = len(gone) / len(candidates)
    asked = "" if abs(given - step.sparsity) < 5e-4 else f", {step.sparsity:.3g} asked, {given:.3g} given"
    by = "random choice" if CRITERIA[step.criterion].units == "draw" else "block influence"
    for (name, place), score in zip(candidates, scores, strict=True):
        went = (name, place) in gone
        outcome = (
            f"{'removed with' if went else 'kept with'} block {work.origin_of(f'{name}.{place}')}: {by}"
            f" {score:.3g} ({len(gone)} of {len(candidates)} blocks removed{asked})"
        )
        for layer in within(f"{name}.{place}", work):
            work.took(step, layer, outcome)
        for left in work.left:
            if (work.place(left) or "").startswith(f"{name}.{place}."):
                work.say(left, outcome)


def take_out(work: Work, name: str, kept: list[int], length: int) -> None:
    """Keep some blocks of one list, and give the layers of the later ones their new names."""
    if len(kept) == length:
        return
    drop_blocks(work.model, name, kept)
    work.move(
        {
            f"{name}.{place}": f"{name}.{kept.index(place)}" if place in kept else None
            for place in range(length)
        }
    )
