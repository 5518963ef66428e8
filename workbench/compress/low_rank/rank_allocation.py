"""How many directions each layer keeps under one budget of weights: where a step of rank saves the most error
per weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from workbench.modules.factored import Form, Shape, carried, cost, most_rank


@dataclass(frozen=True)
class Candidate:
    """A layer that may be split: `kind` of its form, the uniform rank, and what each further direction is
    worth per weight.

    `worth` float64 [most_rank + 1] on the CPU, from `slopes`: it never grows, and the last step makes the
    layer whole.
    """

    name: str
    shape: Shape
    kind: str
    rank: int
    worth: Tensor

    @property
    def step(self) -> int:
        """Return the weights that one more rank takes."""
        return cost(self.shape, Form(self.kind, (1,)))

    @property
    def most(self) -> int:
        """Return the largest rank that saves weights; beyond it the layer stays whole."""
        return most_rank(self.shape, self.kind)

    @property
    def least(self) -> int:
        """Return half of the uniform rank, which no layer falls below."""
        return -(-self.rank // 2)


def allocate(candidates: list[Candidate]) -> dict[str, int | None]:
    """Return each layer's rank, None where it stays whole, with no more weights in all than uniform ranks
    would take.

    Greedy: from half the uniform ranks on, the step that takes away most error per weight, until the budget
    is spent. Staying whole is the last step of a layer: it takes away all that is left.
    """
    budget = sum(min(layer.rank * layer.step, layer.shape.count) for layer in candidates)
    ranks: dict[str, int | None] = {
        layer.name: layer.least if layer.least <= layer.most else None for layer in candidates
    }
    budget -= sum(
        layer.least * layer.step if ranks[layer.name] is not None else layer.shape.count
        for layer in candidates
    )
    free = [layer for layer in candidates if ranks[layer.name] is not None]
    if not free:
        return ranks
    worth = torch.cat([layer.worth[layer.least :] for layer in free])
    owner = torch.cat(
        [torch.full((layer.most + 1 - layer.least,), index) for index, layer in enumerate(free)]
    )
    price = torch.cat([prices(layer.shape, layer.kind)[layer.least :] for layer in free])
    order = worth.argsort(descending=True, stable=True)
    taken = owner[order[price[order].cumsum(0) <= budget]].bincount(minlength=len(free)).tolist()
    for layer, steps in zip(free, taken, strict=True):
        ranks[layer.name] = layer.least + steps if layer.least + steps <= layer.most else None
    return ranks


def prices(shape: Shape, kind: str) -> Tensor:
    """Return the weights that each step of a layer takes, int64 [most_rank + 1].

    The last one makes it whole.
    """
    most, step = most_rank(shape, kind), cost(shape, Form(kind, (1,)))
    steps = torch.full((most + 1,), step)
    steps[-1] = shape.count - most * step
    return steps


def slopes(shape: Shape, kind: str, gains: Tensor, total: float) -> Tensor:
    """Return the error that each step takes away per weight, float64 [most_rank + 1], on the upper hull, so
    that it never grows.

    gains: float64 [most_rank], the error that each direction takes away; total: that of the layer without
    any.
    """
    rest = max(0.0, total - float(gains.sum()))
    heights = [0.0, *gains.clamp_min(0).cumsum(0).tolist()]
    heights.append(heights[-1] + rest)
    places = [0, *prices(shape, kind).cumsum(0).tolist()]
    hull = [0]
    for point in range(1, len(places)):
        while len(hull) > 1 and slope(places, heights, hull[-2], hull[-1]) <= slope(
            places, heights, hull[-1], point
        ):
            hull.pop()
        hull.append(point)
    per_weight = [
        slope(places, heights, left, right) for left, right in pairwise(hull) for _ in range(right - left)
    ]
    return torch.tensor(per_weight, dtype=torch.float64)


def slope(places: list[int], heights: list[float], left: int, right: int) -> float:
    """Return the gain per weight between two points."""
    run = places[right] - places[left]
    return (heights[right] - heights[left]) / run if run else math.inf


def direction_energies(left: Tensor, right: Tensor, moment: Tensor, sensitivity: Tensor | None) -> Tensor:
    """Return the error of the outputs that each direction left_t right_t carries, float64 [layers, k].

    left [layers, o, k], right [layers, k, i], moment [layers, i, i]; sensitivity [layers, o] weighs outputs,
    None: all alike.
    """
    left, right, moment = left.double(), right.double(), moment.double()
    heard = ((right @ moment) * right).sum(2)
    spread = left.square() if sensitivity is None else left.square() * sensitivity.double().unsqueeze(2)
    return heard * spread.sum(1)


def spatial_energies(
    first: Tensor, last: Tensor, moment: Tensor, shape: Shape, sensitivity: Tensor | None
) -> Tensor:
    """Return the error of the outputs that each direction of a spatial form carries, float64 [k]. first [k,
    c, h, 1], last [o, k, 1, w], moment [i, i], sensitivity [o] or None.
    """
    wide = last.shape[3]
    seen = carried([first.double()], shape).view(len(first), wide, -1)
    blocks = torch.einsum("kwi,ij,kvj->kwv", seen, moment.double(), seen)
    heard = torch.einsum("okw,kwv,okv->ok", last.double().squeeze(2), blocks, last.double().squeeze(2))
    return (heard if sensitivity is None else heard * sensitivity.double().unsqueeze(1)).sum(0)


def output_energy(weight: Tensor, moment: Tensor, sensitivity: Tensor | None) -> Tensor:
    """Return the energy of all outputs, float64 [layers]. weight [layers, o, i], moment [layers, i, i],
    sensitivity [layers, o] or None.
    """
    weight = weight.double()
    heard = ((weight @ moment.double()) * weight).sum(2)
    return (heard if sensitivity is None else heard * sensitivity.double()).sum(1)
