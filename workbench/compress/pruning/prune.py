"""Prune: remove weights or structure. This file sets single weights to zero."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch, attempt, matrices_in_place, reported
from workbench.compress.core.context import Work
from workbench.compress.core.moments import NO_MOMENT
from workbench.compress.method import GRADIENTS, SHARED_OUT, Reads
from workbench.compress.pruning import allocation, magnitude_histogram, predicted, sparsegpt
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.evidence import Evidence, evidence_for
from workbench.compress.pruning.importance import importance, input_norms
from workbench.compress.pruning.options import Prune
from workbench.compress.pruning.schedule import rounds
from workbench.compress.pruning.structured import remove_structure
from workbench.compress.registry import METHODS
from workbench.kernels import column_solver, magnitudes, weight_passes
from workbench.kernels.column_solver import COLUMNS
from workbench.kernels.selection import keep_of_groups
from workbench.modules.layer import Layer

__all__ = ["Prune", "prune"]


def why_not_placed(step: Prune) -> str:
    """Return why a step cannot be taken block by block, "" if it can."""
    if step.structured:
        return "taking out structure rebuilds modules across blocks"
    if step.train_steps or "gradients" in CRITERIA[step.criterion].reads:
        return GRADIENTS
    return SHARED_OUT if step.allocation != "uniform" else ""


def reads(step: Prune) -> frozenset[Reads]:
    """Return the statistics that a step reads."""
    own: frozenset[Reads] = CRITERIA[step.criterion].reads
    return own | {"moments", "gradients"} if step.allocation == "sensitivity" else own


@METHODS.register(
    Prune,
    shapes=predicted.shapes,
    errors=predicted.error_table,
    strength=lambda sparsity: sparsity,
    trains=lambda step: bool(step.train_steps),
    placed=why_not_placed,
    reads=reads,
    alone=True,
)
def prune(step: Prune, work: Work) -> None:
    """Zero weights and leave the mask as a promise to later steps, or take out structure."""
    if step.structured:
        remove_structure(step, work)
        return
    layers = takeable(step, work)
    if not layers:
        return
    final: dict[str, int] = {}
    for number, sparsity in enumerate(rounds(step, work)):
        evidence = evidence_for(step, work, layers, now=number > 0 or bool(step.penalty))
        counts, final = removed(step, layers, evidence, sparsity, final)
        for batch in reported(step, work, layers, whole=in_place(step, layers)):
            attempt(batch, partial(prune_batch, step, evidence=evidence, counts=counts, sparsity=sparsity))
    for layer in layers:
        work.took(step, layer, words(step, layer, counts[layer.name]))


def takeable(step: Prune, work: Work) -> list[Layer]:
    """Return the layers that the step names and the pattern fits.

    Every other one gets its reason in the report.
    """
    fitting = []
    for layer in work.choose(step):
        if reason := why_not(step, layer):
            work.say(layer, f"prune skipped: {reason}")
        else:
            fitting.append(layer)
    return fitting


def why_not(step: Prune, layer: Layer) -> str:
    """Return why single weights of a layer cannot be removed as the step says, "" if they can."""
    columns, total = layer.shape[1], layer.parameter.numel()
    if layer.table and "moments" in reads(step):
        return NO_MOMENT
    if step.group is not None:
        of = step.group[1]
        return f"groups of {of} do not divide its {columns} inputs" if columns % of else ""
    if step.allocation != "global" and round(step.sparsity * total) == total:
        return (
            f"sparsity={step.sparsity:g} removes all its {total} weights: give at most"
            f" {int(1000 * (total - 1) / total) / 1000:g}"
        )
    return ""


def removed(
    step: Prune, layers: list[Layer], evidence: Evidence, sparsity: float, final: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return (how many weights each layer has lost after this round, how many after the last one by
    sensitivity).

    Sensitivity divides the whole budget once, before the first round; a round takes its share of that from
    every layer.
    """
    if step.group is not None:
        return {layer.name: 0 for layer in layers}, final
    if step.allocation == "global":
        return allocation.by_threshold(step, layers, evidence, sparsity), final
    if step.allocation == "sensitivity":
        final = final or allocation.by_sensitivity(step, layers, evidence, step.sparsity)
        share = sparsity / step.sparsity if step.sparsity else 0.0
        return {name: round(share * count) for name, count in final.items()}, final
    return allocation.uniform(layers, sparsity), final


def prune_batch(
    step: Prune, batch: Batch, evidence: Evidence, counts: dict[str, int], sparsity: float
) -> None:
    """Remove weights of layers of one shape, and leave the masks.

    counts: how many weights each layer has lost after this round, by name.
    """
    gone = [counts[layer.name] for layer in batch.layers]
    group = None if step.group is None else kept_of_group(step.group, sparsity / step.sparsity)
    if magnitude_histogram.countable(step, batch.layers):
        promise(batch, zeroed(batch, magnitude_histogram.counts(batch, evidence.work.statistics), gone))
        return
    if (weights := by_rows(step, batch)) is not None:
        pruned, kept = weight_passes.prune_rows(weights, input_norms(batch, evidence), gone)
        batch.put(pruned)
        promise(batch, kept)
        return
    matrices = batch.matrices()
    if CRITERIA[step.criterion].makes_up:
        masks = batch.masks()
        kept = torch.ones_like(matrices, dtype=torch.bool) if masks is None else masks
        matrices, kept = sparsegpt.solve(
            matrices, sparsegpt.inverse_factors(batch.layers, evidence), gone, group, kept
        )
        if group is None:
            evidence.work.refusals.note(COLUMNS, column_solver.failed(matrices.device))
    else:
        kept = chosen(step, importance(step, batch, matrices, evidence), gone, group)
        matrices.mul_(kept)
    batch.write(matrices)
    promise(batch, kept)


def in_place(step: Prune, layers: list[Layer]) -> bool:
    """Return whether kernels prune all these layers where they lie: those of one shape at once then, since
    that takes no memory.
    """
    return (magnitude_histogram.countable(step, layers) or rows_fit(step, layers)) and matrices_in_place(
        layers
    ) is not None


def by_rows(step: Prune, batch: Batch) -> list[Tensor] | None:
    """Return the weights where they lie if one kernel prunes their rows by `wanda`, None if it does not."""
    return batch.in_place() if rows_fit(step, batch.layers) else None


def rows_fit(step: Prune, layers: Sequence[Layer]) -> bool:
    """Return whether each row is pruned by `wanda` alone, and is short enough for one program of a kernel."""
    alone = CRITERIA[step.criterion].kernel == "rows" and step.allocation != "global" and step.group is None
    return alone and all(layer.mask is None and layer.shape[1] <= weight_passes.WIDEST for layer in layers)


def zeroed(batch: Batch, below: Tensor, counts: list[int]) -> Tensor:
    """Set the smallest counted magnitudes to zero; return which weights stay, bool [layers, rows, columns].

    `below`: see `magnitude_histogram.counts`.
    """
    if (weights := batch.in_place()) is not None:
        pruned, kept = weight_passes.prune(weights, *magnitudes.thresholds(below, counts))
        batch.put(pruned)
        return kept
    matrices = batch.finite()
    kept = magnitudes.keep(matrices.flatten(1), below, counts).view_as(matrices)
    batch.write(matrices.mul_(kept))
    return kept


def promise(batch: Batch, kept: Tensor) -> None:
    """Leave the masks [layers, outputs, inputs] as promises to later steps."""
    for layer, mask in zip(batch.layers, kept, strict=True):
        layer.mask = mask


def chosen(step: Prune, scores: Tensor, counts: list[int], group: tuple[int, int] | None) -> Tensor:
    """Return which weights stay, bool [layers, outputs, inputs], from their importance."""
    return keep_of_groups(scores, *group) if group is not None else allocation.mask_of(step, scores, counts)


def kept_of_group(group: tuple[int, int], share: float) -> tuple[int, int]:
    """Return (kept, m) after a round that has removed this share of what goes from every group.

    At the end n of m are kept.
    """
    kept, of = group
    return of - round((of - kept) * share), of


def words(step: Prune, layer: Layer, count: int) -> str:
    """Return a few words on the zeros of a layer, for the report."""
    said = (
        step.label()
        if step.allocation == "uniform"
        else f"{count / layer.parameter.numel():.1%} sparse ({step.allocation}, {step.sparsity:.0%} in all)"
    )
    return f"{said} by {step.criterion}" + (f" in {step.rounds} rounds" if step.rounds > 1 else "")
