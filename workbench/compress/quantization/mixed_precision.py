"""Mixed precision: every layer at a width of its own, their average given, where it costs the loss least.

What each width costs each layer is estimated once: E[change of the loss] = 1/2 sum over outputs of f_o *
E[((W' - W) x)_o^2], with f_o the diagonal Fisher information of an output (as if gradients and inputs were
independent; Martens & Grosse 2015, Dong et al. 2019 for widths by curvature). The widths are then the exact
optimum of a multiple-choice knapsack. What it does not see: how the errors of layers interact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from workbench.compress.core.batch import Batch, grouped
from workbench.compress.core.context import Work
from workbench.compress.core.moments import second_moment_of
from workbench.compress.quantization.awq import output_error
from workbench.compress.quantization.scales import Spec, fit, form_of, ranges
from workbench.modules.layer import Layer

Weigh = Callable[[Tensor], Tensor]  # errors [layers, outputs, inputs] -> cost of each layer
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# The finest division of the budget; sizes that it does not divide are rounded up, so the budget always holds
UNITS = 2**14


def costs(layers: Iterable[Layer], spec: Spec, work: Work) -> dict[str, list[float]]:
    """Return the estimated cost of each of `WIDTHS`, in nats of the loss, by layer. Those of the dense model
    are kept.
    """
    kept: dict[str, list[float]] = work.statistics.once(("costs of widths", spec), dict)
    by_layer: dict[str, list[float]] = {}
    fresh = []
    for layer in layers:
        if layer.pristine and layer.origin in kept:
            by_layer[layer.name] = kept[layer.origin]
        else:
            fresh.append(layer)
    done = 0
    for batch in grouped(fresh):
        work.progress("costs of widths", done, len(fresh))

        def rows(batch: Batch = batch) -> list[list[float]]:
            return batch_costs(batch, spec, work)

        pristine = all(layer.pristine for layer in batch.layers)
        fresh_rows = (
            work.statistics.once(
                ("costs of widths", spec, tuple(layer.origin for layer in batch.layers)), rows, lasting=True
            )
            if pristine
            else rows()
        )
        for layer, row in zip(batch.layers, fresh_rows, strict=True):
            by_layer[layer.name] = row
            if layer.pristine:
                kept[layer.origin] = row
        done += len(batch.layers)
    return by_layer


def batch_costs(batch: Batch, spec: Spec, work: Work) -> list[list[float]]:
    """Return the estimated cost of each of `WIDTHS`, in nats of the loss, of each layer of one shape."""
    stack = batch.matrices()
    weigh = by_fisher if batch.layers[0].table else by_outputs
    felt, extremes = weigh(batch, work), ranges(stack, spec)
    by_width = []
    for bits in WIDTHS:
        at = Spec(bits, spec.group_size, symmetric=spec.symmetric, search=spec.search, whole=spec.whole)
        error = form_of(stack, fit(stack, at, extremes), at).dequantize() - stack
        by_width.append(felt(error))
    return torch.stack(by_width, 1).double().tolist()


def by_outputs(batch: Batch, work: Work) -> Weigh:
    """Return the cost of errors [layers, outputs, inputs] in the metric of inputs' second moments and
    outputs' Fisher information.
    """
    moments = torch.stack([second_moment_of(layer, work) for layer in batch.layers])
    roots = torch.stack([output_information(layer, work) for layer in batch.layers]).sqrt()
    return lambda error: output_error(error * roots.unsqueeze(2), moments) / 2


def by_fisher(batch: Batch, work: Work) -> Weigh:
    """Return the cost of errors by the Fisher information of every weight alone: rows that are looked up have
    no second moment.
    """
    squares = torch.stack([work.statistics.gradients(layer.origin).square for layer in batch.layers])
    return lambda error: (error.square() * squares).flatten(1).sum(1) / 2


def output_information(layer: Layer, work: Work) -> Tensor:
    """Return the Fisher information of each output, [outputs]: that of its row of weights over the energy of
    the inputs.

    The outputs of the first of two factors are felt through the second; those of any other factor but the
    last alike.
    """
    square = work.statistics.gradients(layer.origin).square
    square = square if layer.columns is None else square[:, layer.columns]
    energy = work.statistics.second_moment(layer.origin).diagonal()
    energy = energy if layer.columns is None else energy[layer.columns]
    felt = square.sum(1) / energy.sum().clamp_min(torch.finfo(torch.float32).tiny)
    felt = felt if layer.rows is None else felt[layer.rows]
    rows = layer.shape[0]
    if layer.rank is None or rows == len(felt):
        return felt
    following = work.layers.get(f"{layer.place or layer.origin}.1")
    if following is None or following is layer or following.matrix().shape != (len(felt), rows):
        return felt.mean().expand(rows)
    return following.matrix().square().t() @ felt


def allocate(costs: dict[str, list[float]], sizes: dict[str, int], average: float) -> dict[str, int]:
    """Return the width of each layer: least total cost with at most `average` bits a weight over all of them.

    costs: of the widths 2..8, by layer; sizes: weights of each layer. A dynamic program over the budget,
    exact where the sizes share a divisor that leaves at most 2^14 units (as those of transformers do), else
    for sizes rounded up by less than 1 in 2^14 of the budget. Of two allocations that cost the same the first
    in order of widths is taken.
    """
    names = list(costs)
    total = sum(sizes[name] for name in names)
    budget = math.floor(average * total + 1e-6) - WIDTHS[0] * total  # bits beyond 2 a weight
    unit = max(reduce(math.gcd, (sizes[name] for name in names)), -(-max(budget, 1) // UNITS))
    room = max(0, budget) // unit
    best = np.zeros(room + 1)
    choices = []
    for name in names:
        taken = [-(-sizes[name] * extra // unit) for extra in range(len(WIDTHS))]
        options = np.full((len(WIDTHS), room + 1), np.inf)
        for index, (units, cost) in enumerate(zip(taken, costs[name], strict=True)):
            if units <= room:
                options[index, units:] = best[: room + 1 - units] + cost
        picked = options.argmin(0)
        best = np.take_along_axis(options, picked[None], 0)[0]
        choices.append((picked, taken))
    widths = {}
    left = room
    for name, (picked, taken) in zip(reversed(names), reversed(choices), strict=True):
        index = int(picked[left])
        widths[name] = WIDTHS[index]
        left -= taken[index]
    return {name: widths[name] for name in names}
