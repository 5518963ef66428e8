"""How many weights each layer gives up: the same fraction everywhere, one threshold over all, or by what a
layer can spare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch, grouped
from workbench.compress.pruning import magnitude_histogram
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.evidence import Evidence
from workbench.compress.pruning.importance import comparable, importance
from workbench.errors import CompressionError
from workbench.kernels.selection import keep_fewer, spread
from workbench.modules.layer import Layer

if TYPE_CHECKING:
    from workbench.compress.pruning.options import Prune

CANDIDATES = 9  # sparsities between the least and the most that a layer may get
BINS = 2**16


def weights_of(layer: Layer) -> int:
    """Return how many weights a layer has."""
    return layer.parameter.numel()


def uniform(layers: list[Layer], sparsity: float) -> dict[str, int]:
    """Return round(sparsity * weights) of each layer."""
    return {layer.name: round(sparsity * weights_of(layer)) for layer in layers}


# --- one threshold


def by_threshold(step: Prune, layers: list[Layer], evidence: Evidence, sparsity: float) -> dict[str, int]:
    """Return how many weights of each layer lie below one threshold over all of them.

    The sum is exactly round(sparsity * all).

    The threshold is found in two histograms, of the upper and the lower halves of the importances' bits
    (positive floats are ordered as their bits are), so nothing is sorted and no more than one batch is held.
    Weights that tie with the threshold are removed from the last layers.
    """
    target = round(sparsity * sum(map(weights_of, layers)))
    if target == 0:
        return dict.fromkeys((layer.name for layer in layers), 0)

    countable = magnitude_histogram.countable(step, layers)
    less, ties = (
        magnitude_histogram.below_threshold(layers, evidence.work.statistics, target)
        if countable
        else below_threshold(step, layers, evidence, target)
    )
    left = target - sum(less.values())
    counts = {}
    for layer in reversed(layers):
        more = min(left, ties[layer.name])
        counts[layer.name], left = less[layer.name] + more, left - more
    emptied = [layer for layer in layers if counts[layer.name] == weights_of(layer)]
    if emptied:
        evidence.work.warnings.append(
            f"prune: one threshold for sparsity={sparsity:g} removes every weight of {emptied[0].name!r}"
            + f" and {len(emptied) - 1} more" * (len(emptied) > 1)
        )
    return {layer.name: counts[layer.name] for layer in layers}


def below_threshold(
    step: Prune, layers: list[Layer], evidence: Evidence, target: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many weights of each layer lie below the `target`-th smallest importance of all, and how
    many are equal to it.
    """

    def keys() -> Iterator[tuple[Batch, Tensor]]:
        for batch in grouped(layers):
            scores = comparable(step, batch, batch.matrices(), evidence)
            yield (
                batch,
                torch.where(scores < 0, 0, scores.view(torch.int32) + 1).flatten(1),
            )  # what an earlier round has taken comes first

    upper, below = bin_of(
        torch.stack([torch.bincount((key >> 16).flatten(), minlength=BINS) for _, key in keys()]).sum(0),
        target,
    )
    inside = (key.flatten() for _, key in keys())
    lower, _ = bin_of(
        torch.stack(
            [torch.bincount(key[key >> 16 == upper] & (BINS - 1), minlength=BINS) for key in inside]
        ).sum(0),
        target - below,
    )
    threshold = (upper << 16) | lower
    counted = [
        (batch, torch.stack([(key < threshold).sum(1), (key == threshold).sum(1)])) for batch, key in keys()
    ]
    less: dict[str, int] = {}
    ties: dict[str, int] = {}
    for batch, numbers in counted:
        for layer, smaller, equal in zip(batch.layers, *numbers.tolist(), strict=True):
            less[layer.name], ties[layer.name] = smaller, equal
    return less, ties


def bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Return (the bin of a histogram [bins] that holds the element of this rank, counted from 1; how many
    elements lie in the bins before it).
    """
    reached = histogram.cumsum(0)
    place = int(torch.searchsorted(reached, torch.tensor(rank, device=reached.device)))
    return place, int(reached[place] - histogram[place])


# --- sensitivity


@dataclass(frozen=True)
class Piece:
    """From one candidate of a layer to a higher one: how many weights more, and how much error each costs."""

    layer: str
    removed: int
    slope: float


def by_sensitivity(step: Prune, layers: list[Layer], evidence: Evidence, sparsity: float) -> dict[str, int]:
    """Return how many weights each layer gives up so that the estimated harm is least.

    The sum is exactly round(sparsity * all).

    A layer's harm at a candidate sparsity is its relative output error, tr(D M D^T) / tr(W M W^T) with D the
    weights that the criterion would remove and M the inputs' second moment, times its weight in the loss,
    sum(w^2 E[g^2]) / 2 (the linearity of small perturbations, as in HIGGS, Malinovskii et al. 2024). Between
    nine candidates the harm's lower convex hull is taken, and the budget is spent where the next weight costs
    least. No layer keeps fewer than half of the weights, or loses fewer by half of the rest, than uniform:
    its sparsity is within (1 - sparsity) / 2 of the one asked for.
    """
    room = (1 - sparsity) / 2
    fractions = [
        max(0.0, sparsity + room * (2 * index / (CANDIDATES - 1) - 1)) for index in range(CANDIDATES)
    ]
    total = round(sparsity * sum(map(weights_of, layers)))
    counts: dict[str, int] = {}
    pieces: list[Piece] = []
    for batch in grouped(layers):
        points = candidates(weights_of(batch.layers[0]), fractions)
        for layer, harm in zip(batch.layers, harms(step, batch, evidence, points), strict=True):
            counts[layer.name] = points[0]
            pieces += hull(layer.name, points, harm)
    left = total - sum(counts.values())
    for piece in sorted(
        pieces, key=lambda piece: piece.slope
    ):  # stable: a layer's pieces stay in order, their slopes grow
        taken = min(left, piece.removed)
        counts[piece.layer] += taken
        left -= taken
    if left:
        raise CompressionError(
            f"sparsity={sparsity:g} of {total} weights cannot be divided over {len(layers)} layers by"
            " sensitivity: give allocation='uniform'"
        )
    return {layer.name: counts[layer.name] for layer in layers}


def candidates(total: int, fractions: list[float]) -> list[int]:
    """Return how many of a layer's weights may go: the first rounded down and the last up (but never all), so
    that every budget between fits.
    """
    between = [round(fraction * total) for fraction in fractions[1:-1]]
    return sorted(
        {math.floor(fractions[0] * total), *between, min(total - 1, math.ceil(fractions[-1] * total))}
    )


def harms(step: Prune, batch: Batch, evidence: Evidence, points: list[int]) -> list[list[float]]:
    """Return the estimated harm of removing each number of weights, for each layer of the batch."""
    matrices = batch.matrices()
    scores = importance(step, batch, matrices, evidence)
    moments = torch.stack([evidence.moment(layer) for layer in batch.layers])
    fisher = torch.stack([evidence.gradients(layer).square for layer in batch.layers])
    energy = ((matrices @ moments) * matrices).flatten(1).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    loads = (matrices.square() * fisher).flatten(1).sum(1) / 2 / energy
    by_count = []
    for count in points:
        gone = matrices * ~mask_of(step, scores, [count] * len(batch.layers))
        by_count.append(loads * ((gone @ moments) * gone).flatten(1).sum(1))
    return [list(map(float, row)) for row in torch.stack(by_count, 1).tolist()]


def hull(layer: str, points: list[int], harm: list[float]) -> list[Piece]:
    """Return the pieces of the lower convex hull of harm over points, from the first point to the last.

    Slopes grow.
    """
    corners = [0]
    for index in range(1, len(points)):
        while len(corners) > 1 and slope(points, harm, corners[-2], corners[-1]) >= slope(
            points, harm, corners[-1], index
        ):
            corners.pop()
        corners.append(index)
    return [Piece(layer, points[b] - points[a], slope(points, harm, a, b)) for a, b in pairwise(corners)]


def slope(points: list[int], harm: list[float], a: int, b: int) -> float:
    """Return the harm of each weight between two points."""
    return (harm[b] - harm[a]) / (points[b] - points[a])


def mask_of(step: Prune, scores: Tensor, removed: list[int]) -> Tensor:
    """Return which weights stay, bool [layers, outputs, inputs], with exactly `removed[i]` gone from layer i.

    A criterion that compares within each row (`by_row`), unless one threshold goes over all layers: row r
    gives up removed // rows weights, the first removed % rows one more. Any other compares within the layer.
    """
    layers, rows, columns = scores.shape
    if CRITERIA[step.criterion].by_row and step.allocation != "global":
        return keep_fewer(
            scores.reshape(layers * rows, columns),
            [count for total in removed for count in spread(total, rows)],
        ).view_as(scores)
    return keep_fewer(scores.flatten(1), removed).view_as(scores)
