"""What a step that removes structure leaves, computed from shapes: which units go does not matter, only how
many.

Known where every place loses the same fraction, and where all blocks that may go are alike; else None, which
is shown as unknown before it is measured.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from workbench.calibration.statistics import Statistics
from workbench.compress.pruning.block_lists import find_block_lists
from workbench.compress.pruning.prunable_units import Space, removed_count
from workbench.compress.pruning.structured import find_spaces
from workbench.compress.pruning.whole_experts import experts_left
from workbench.modules.weight_shapes import StoredTensor, Weight
from workbench.shapes.outline import Anatomy, Outline
from workbench.tasks.base import Task


def anatomy_of(task: Task, statistics: Statistics) -> Anatomy:
    """Return where a task's model has units. Channels are followed when they are first asked for, and kept
    with the statistics.
    """
    return Anatomy(
        lambda step: find_spaces(step, task.model, task, statistics, pristine=True),
        lambda: (
            statistics.once(
                "block lists", lambda: find_block_lists(task.model, task.kind, task.calibration)
            ).places
        ),
        lambda sparsity: experts_left(task.model, sparsity),
    )


def after_structure(outline: Outline, step: Any) -> Outline | None:
    """Return the outline after a structured step, or None where shapes do not say what goes."""
    if outline.anatomy is None or step.allocation != "uniform":
        return None
    if step.pattern == "experts":
        return after_experts(outline, step)
    return after_blocks(outline, step) if step.pattern == "layers" else after_units(outline, step)


def after_experts(outline: Outline, step: Any) -> Outline | None:
    """Return the outline without the last experts of every block, which stand for those that go, and without
    their rows of the routers; None where they cannot go.
    """
    assert outline.anatomy is not None  # noqa: S101  for the type checker
    mixtures = outline.anatomy.experts(step.sparsity)
    if not mixtures or any(not goes(outline, f"{name}.", step) for name in mixtures):
        return None
    gone = tuple(
        f"{name}.{place}." for name, (block, left) in mixtures.items() for place in range(left, block.experts)
    )
    routers = {
        name: (dimension, left)
        for block, left in mixtures.values()
        for name, dimension in block.tensors.items()
    }
    rows = {
        name.removesuffix(".weight"): block.experts - left
        for block, left in mixtures.values()
        for name in block.tensors
    }
    return dataclasses.replace(
        outline,
        weights=tuple(
            narrowed(weight, rows.get(weight.name, 0), 0)
            for weight in outline.weights
            if not weight.name.startswith(gone)
        ),
        rest=tuple(
            resized(entry, *routers[entry.name]) if entry.name in routers else entry
            for entry in outline.rest
            if not entry.name.startswith(gone)
        ),
    )


def resized(entry: StoredTensor, dimension: int, size: int) -> StoredTensor:
    """Return a tensor with another size of one dimension."""
    shape = (*entry.shape[:dimension], size, *entry.shape[dimension + 1 :])
    return dataclasses.replace(entry, shape=shape, bytes=entry.bytes // entry.shape[dimension] * size)


def after_units(outline: Outline, step: Any) -> Outline:
    """Return the outline without the units that go."""
    assert outline.anatomy is not None  # noqa: S101  for the type checker
    weights = {weight.name: weight for weight in outline.weights}
    rows: dict[str, int] = {}
    channels: dict[str, int] = {}
    for space in outline.anatomy.spaces(step).spaces:
        if cut_by(space, step, outline, weights):
            gone = removed_count(space.units, step.sparsity)
            for part in space.parts:
                side = rows if part.axis == "rows" else channels
                side[part.module] = side.get(part.module, 0) + gone * part.index.shape[1]
    smaller = tuple(
        narrowed(weight, rows.get(weight.name, 0), channels.get(weight.name, 0)) for weight in outline.weights
    )
    return dataclasses.replace(
        outline, weights=smaller, rest=tuple(shortened(entry, rows) for entry in outline.rest)
    )


def cut_by(space: Space, step: Any, outline: Outline, weights: dict[str, Weight]) -> bool:
    """Return whether a step cuts a space: the rule of `structured.may_be_cut`, on shapes."""
    norms = {entry.name.rpartition(".")[0] for entry in outline.rest if len(entry.shape) == 1}
    if any(name not in weights and name not in norms for name in space.modules()):
        return False
    mine = [weights[name] for name in space.modules() if name in weights]
    left_out = any(weight.others or step.excluded(weight.name, weight.origin) is not None for weight in mine)
    return not left_out and any(outline.takes(weight, step) for weight in mine)


def narrowed(weight: Weight, rows: int, channels: int) -> Weight:
    """Return a weight with so many outputs and input channels fewer."""
    if not rows and not channels:
        return weight
    kernel = math.prod(weight.shape[2:])
    outputs, inputs = weight.rows - rows, weight.columns // kernel - channels
    shape = (inputs, outputs) if weight.transposed else (outputs, inputs, *weight.shape[2:])
    return dataclasses.replace(weight, shape=shape, rows=outputs, columns=inputs * kernel)


def shortened(entry: StoredTensor, rows: dict[str, int]) -> StoredTensor:
    """Return a bias, or a tensor of a batch norm, with so many entries fewer."""
    gone = rows.get(entry.name.rpartition(".")[0], 0) if len(entry.shape) == 1 else 0
    if not gone:
        return entry
    count = entry.shape[0] - gone
    return dataclasses.replace(entry, shape=(count,), bytes=entry.bytes // entry.shape[0] * count)


def after_blocks(outline: Outline, step: Any) -> Outline | None:
    """Return the outline without its last blocks, which stand for those that go where all blocks are
    alike.
    """
    assert outline.anatomy is not None  # noqa: S101  for the type checker
    blocks = outline.anatomy.blocks()
    lists = {name: length for name in blocks if (length := block_count(outline, name)) > 1}
    candidates = [
        (name, place)
        for name in lists
        for place in blocks[name]
        if place < lists[name] and goes(outline, f"{name}.{place}.", step)
    ]
    gone = math.floor(step.sparsity * len(candidates) + 0.5 + 1e-9)
    if not candidates or not gone:
        return outline
    if gone == len(candidates) and all(
        place >= lists[name] - sum(owner == name for owner, _ in candidates) > 0 for name, place in candidates
    ):
        dropped = tuple(
            f"{name}.{place}." for name, place in candidates
        )  # all that may go, and they are the last ones
    elif len(lists) == 1 and alike(
        outline, [f"{name}.{place}." for name, length in lists.items() for place in range(length)]
    ):
        ((name, length),) = lists.items()
        dropped = tuple(f"{name}.{place}." for place in range(length - min(gone, length - 1), length))
    else:
        return None
    return dataclasses.replace(
        outline,
        weights=tuple(weight for weight in outline.weights if not weight.name.startswith(dropped)),
        rest=tuple(entry for entry in outline.rest if not entry.name.startswith(dropped)),
    )


def block_count(outline: Outline, name: str) -> int:
    """Return how many blocks of a list the outline still has."""
    names = [weight.name for weight in outline.weights]
    return len(
        {
            weight_name[len(name) + 1 :].partition(".")[0]
            for weight_name in names
            if weight_name.startswith(f"{name}.")
        }
    )


def goes(outline: Outline, block: str, step: Any) -> bool:
    """Return whether the targets pick a weight of a block and leave out none."""
    mine = [weight for weight in outline.weights if weight.name.startswith(block)]
    return any(outline.takes(weight, step) for weight in mine) and not any(
        step.excluded(weight.name, weight.origin) for weight in mine
    )


def alike(outline: Outline, blocks: list[str]) -> bool:
    """Return whether blocks hold tensors of the same names, shapes and promises."""

    def content(block: str) -> object:
        weights = [
            dataclasses.replace(weight, name=weight.name.removeprefix(block), origin="")
            for weight in outline.weights
            if weight.name.startswith(block)
        ]
        rest = [
            dataclasses.replace(entry, name=entry.name.removeprefix(block))
            for entry in outline.rest
            if entry.name.startswith(block)
        ]
        return weights, rest

    return all(content(block) == content(blocks[0]) for block in blocks[1:])
