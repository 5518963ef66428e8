"""How much each unit matters: what its weights matter, added up over every module that it touches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch, grouped
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.evidence import Evidence, evidence_for
from workbench.compress.pruning.importance import raw_importance

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune
    from workbench.compress.pruning.prunable_units import Space


def unit_scores(step: Prune, work: Work, spaces: list[Space]) -> list[Tensor]:
    """Return the importance of the units of each space, float64 [units] on the CPU.

    How weights' importance makes up a unit's is a fact of the criterion (`units`): a norm of its weights (a
    group norm, as in Li et al. 2017), a sum of changes of the loss (Molchanov et al. 2019), or a draw.
    """
    if CRITERIA[step.criterion].units == "draw":
        generator = torch.Generator().manual_seed(step.seed)
        return [torch.rand(space.units, generator=generator, dtype=torch.float64) for space in spaces]
    names = list(dict.fromkeys(name for space in spaces for name in space.modules() if name in work.layers))
    layers = [work.layers[name] for name in names]

    def compute() -> dict[tuple[str, str], Tensor]:
        return side_sums(step, work, names)

    kept = all(layer.pristine for layer in layers)
    sums = (
        work.statistics.once(("unit scores", step.criterion, *names), compute, lasting=True)
        if kept
        else compute()
    )
    scores = [
        torch.stack(
            [
                sums[part.module, part.axis][part.index].sum(1)
                for part in space.parts
                if part.module in work.layers
            ]
        ).sum(0)
        for space in spaces
    ]
    return [score.sqrt() for score in scores] if CRITERIA[step.criterion].units == "norm" else scores


def side_sums(step: Prune, work: Work, names: list[str]) -> dict[tuple[str, str], Tensor]:
    """Return the importance of the weights of each row and each input channel, float64 on the CPU, by (layer,
    axis).
    """
    layers = [work.layers[name] for name in names]
    evidence = evidence_for(step, work, layers)
    sums: dict[tuple[str, str], Tensor] = {}
    for batch in grouped(layers):
        rows, channels = batch_sums(step, batch, evidence)
        for place, layer in enumerate(batch.layers):
            sums[layer.name, "rows"], sums[layer.name, "columns"] = rows[place], channels[place]
    return sums


def batch_sums(step: Prune, batch: Batch, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Return the sums over each row [layers, outputs] and each input channel [layers, channels], float64 on
    the CPU.
    """
    scores = raw_importance(step, batch, batch.matrices(), evidence)
    if CRITERIA[step.criterion].units == "norm":
        scores = scores.square()
    channels = scores.sum(1, dtype=torch.float64).unflatten(1, (-1, batch.layers[0].patch)).sum(2)
    return scores.sum(2, dtype=torch.float64).cpu(), channels.cpu()
