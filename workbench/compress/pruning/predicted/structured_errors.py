"""How far outputs move when structure leaves: found by taking it out of a copy at some places of the slider.

Which heads, neurons, channels or blocks go, and what reads them, is the method's own choice on the real
model; nothing is run through it. A layer that reads units that left is off by its weights for them (what a
refit makes up for is taken back); of a block that left, what its last layers pass on is lost whole. Rows that
left count where they were read.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.calibration.passes import full_precision
from workbench.compress.core.context import Work, dense_copy
from workbench.compress.core.layer_sample import LayerSample, relative, weighed
from workbench.compress.method import WholeTable
from workbench.compress.pruning.block_lists import find_block_lists
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.prunable_units import find_attentions, find_neurons
from workbench.compress.pruning.structured import remove_structure
from workbench.compress.registry import METHODS
from workbench.errors import CompressionError, RecipeError

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics
    from workbench.compress.pruning.options import Prune
    from workbench.modules.layer import Layer
    from workbench.util.progress import Progress

TRIED = ("heads", "neurons", "channels", "layers")  # benchmarks/results/prediction.md
SPARSITIES = tuple(index / 16 for index in range(16))
# What errors of structure weigh beside those of single weights, in nats: what leaves as a whole moves outputs
# together, which the diagonal of the Fisher information does not see. On `fashion-vit` and `fashion-cnn` the
# factor at which measured drops lay was from 0.5 (blocks of the latter) to 10 (heads); intervals cover that.
TIMES = 2.0


def structured_table(step: Prune) -> WholeTable | None:
    """Return the errors of structure that leaves; None for a pattern on which it was not tried, with training
    between or before, which no rule covers, and for what is refused anyway.
    """
    if (
        step.pattern not in TRIED
        or step.train_steps
        or step.penalty
        or step.rounds > 1
        or step.allocation == "sensitivity"
    ):
        return None
    seed = step.seed if CRITERIA[step.criterion].units == "draw" else 0
    key = (step.pattern, step.criterion, step.allocation, step.reconstruct, step.targets, seed)
    return WholeTable(key, SPARSITIES, partial(errors, step), TIMES)


def errors(
    step: Prune, statistics: Statistics, samples: list[LayerSample], progress: Progress
) -> Tensor | None:
    """Return the relative squared errors of the layers' outputs, float64 [layers, sparsities] on the CPU.

    None where the model has no such structure, or nobody knows what a block passes on. A sparsity below half
    a unit removes nothing; one that the method refuses counts as the one before.
    """
    last = None
    if step.pattern == "layers":
        last = block_ends(statistics, [about.layer.name for about in samples])
        if last is None:
            return None
    columns = [torch.zeros(len(samples), dtype=torch.float64)]
    refused = 0
    with torch.no_grad(), full_precision():
        for place, sparsity in enumerate(SPARSITIES[1:], 1):
            progress("predicted errors", place, len(SPARSITIES))
            layers = layers_left(dataclasses.replace(step, sparsity=sparsity), statistics, progress)
            if layers is None:
                refused += 1
                columns.append(columns[-1])
                continue
            moved = [error_of(about, layers.get(about.layer.name), last or set()) for about in samples]
            columns.append(torch.stack(moved).double().cpu())
    return None if refused == len(SPARSITIES) - 1 else torch.stack(columns, 1)


def layers_left(step: Prune, statistics: Statistics, progress: Progress) -> dict[str, Layer] | None:
    """Return the layers of a copy without the structure, by their names in the dense model; None where the
    method refuses.
    """
    task = statistics.task
    work, reads = Work(dense_copy(task, statistics), task, statistics, progress), METHODS.of(step).reads
    work.reads = frozenset() if reads is None else reads(step)
    try:
        remove_structure(step, work)
    except (CompressionError, RecipeError):
        return None
    return {layer.origin: layer for layer in work.layers.values()}


def error_of(about: LayerSample, layer: Layer | None, last: set[str]) -> Tensor:
    """Return the relative squared error of one layer's outputs, a scalar: `layer` is what is left of it, None
    where its block left; `last` are those that pass a block's result on.
    """
    if layer is None:
        return about.weight.new_tensor(float(about.layer.name in last))
    if layer.columns is None:
        return about.weight.new_zeros(())
    device = about.weight.device
    rows = torch.arange(about.layer.shape[0], device=device) if layer.rows is None else layer.rows.to(device)
    place = torch.full((about.layer.shape[0],), -1, device=device)
    place[rows] = torch.arange(len(rows), device=device)
    place = place[about.rows]
    lost = about.weight.clone()
    lost[:, layer.columns.to(device)] -= layer.matrix()[place.clamp_min(0)]
    lost[place < 0] = 0  # the row itself left
    return relative(weighed(lost, about), about)


def block_ends(statistics: Statistics, names: list[str]) -> set[str] | None:
    """Return the layers that pass on what a block adds: outputs of its attention and of its MLP; of a
    residual block, its last layer. None where a block that may go is of neither form.

    names: of all layers, in the model's order.
    """
    task = statistics.task
    lists = statistics.once(
        "block lists", lambda: find_block_lists(task.model, task.kind, task.calibration)
    ).places
    attended = {attention.output for attention in find_attentions(task.model)[0]}
    fed = {
        part.module
        for space in find_neurons(task.model).spaces
        for part in space.parts
        if part.axis == "columns"
    }
    ends: set[str] = set()
    for block in [f"{owner}.{place}" for owner, places in lists.items() for place in places]:
        inside = [name for name in names if name.startswith(f"{block}.")]
        if attended.intersection(inside) and fed.intersection(inside):
            ends |= (attended | fed).intersection(inside)
        elif hasattr(task.model.get_submodule(block), "shortcut"):
            ends |= set(inside[-1:])
        else:
            return None
    return ends
