"""What low rank and its terms leave and cost, before it is done: shapes, and how far outputs move."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from workbench.compress.core.layer_sample import LayerSample
from workbench.compress.low_rank.options import LowRank, Repair
from workbench.compress.method import ErrorTable, Recovery
from workbench.modules.factored import Form, Shape, cost, factor_shapes, form_for
from workbench.modules.weight_shapes import Weight
from workbench.shapes.outline import Outline

RATIOS = tuple(index / 32 for index in range(33))
SLACK = 256  # bytes of header a weight, where ranks are shared out by values
REPAIRED = 3.0  # times the rank that a repair adds: the share of the error that it takes away, as a rule


def lowrank_shapes(outline: Outline, step: LowRank) -> Outline:
    """Return the outline after low rank; ranks that are shared out by values make other layers two than
    uniform ones, which stand for all.
    """
    slack = SLACK * len(outline.weights) if step.rank_allocation != "uniform" else 0
    return dataclasses.replace(outline.each(step, factors), slack=outline.slack + slack)


def factors(weight: Weight, step: LowRank) -> list[Weight]:
    """Return the factors of a weight, or the weight where they save nothing."""
    shape = weight.form_shape
    form = form_for(shape, step.conv, step.rank_ratio)
    if weight.others or cost(shape, form) >= weight.count:
        return [weight]
    return [
        part(weight, str(index), stored, form.ranks[min(index, len(form.ranks) - 1)])
        for index, stored in enumerate(factor_shapes(shape, form))
    ]


def part(weight: Weight, name: str, stored: tuple[int, ...], rank: int) -> Weight:
    """Return one of the weights that take the place of another."""
    return Weight(
        f"{weight.origin}.{name}",
        weight.origin,
        stored,
        stored[0],
        math.prod(stored[1:]),
        weight.dtype,
        rank=rank,
        table=weight.table and name == "0",
        file_dtype=weight.file_dtype,
    )


def lowrank_errors(step: LowRank) -> ErrorTable:
    """Return the errors of truncated weights: the energy of the directions that are cut off, all outputs
    alike. Ranks that are shared out count as if each layer got the same ratio.
    """

    def works(shape: Shape) -> bool:
        return cost(shape, form_for(shape, step.conv, step.rank_ratio)) < shape.count

    return ErrorTable((step.factorization,), RATIOS, lambda about: errors(step, about), works)


def errors(step: LowRank, about: LayerSample) -> Tensor:
    """Return the errors of the truncated weight at `RATIOS` of its full rank, [knots].

    Factors of a convolution as if they were of a matrix.
    """
    weight, moment = about.layer.matrix().double(), about.moment.double()
    seen = weight @ moment @ weight.mT
    if step.factorization == "whitened" and not about.layer.table:
        carried = torch.linalg.eigvalsh(seen).flip(0).clamp_min(0)[: min(weight.shape)]
    else:
        _, values, right = torch.linalg.svd(weight, full_matrices=False)
        carried = values.square() * ((right @ moment) * right).sum(1)
    # [full rank + 1]: what is lost with that many directions
    left = torch.cat([carried.flip(0).cumsum(0).flip(0), carried.new_zeros(1)])
    ratios = torch.tensor(RATIOS, dtype=torch.float64, device=weight.device)
    kept = (ratios * len(carried)).round().clamp(1, len(carried)).long()
    return (left[kept] / left[0].clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1).float()


def repair_shapes(outline: Outline, step: Repair) -> Outline:
    """Return the outline after repair."""
    return outline.each(step, repaired)


def repaired(weight: Weight, step: Repair) -> list[Weight]:
    """Return the weight with two small ones beside it, where something was lost and they take less than the
    weight itself.
    """
    rank = step.rank(weight.rows, weight.columns)
    untouched = weight.kept is None and not weight.bits
    if (
        untouched
        or weight.table
        or weight.others
        or weight.rank is not None
        or rank * (weight.rows + weight.columns) >= weight.count
    ):
        return [weight]
    first, second = factor_shapes(weight.form_shape, Form("channel", (rank,)))
    return [
        part(weight, "first", first, rank),
        part(weight, "second", second, rank),
        dataclasses.replace(weight, name=f"{weight.origin}.base"),
    ]


def repair_errors(step: Repair) -> Recovery:
    """Return the share of the error of zeros and bits that a term of this rank leaves, as a rule."""
    left = 1 - min(0.9, REPAIRED * step.repair_ratio)
    return Recovery(left, left, ("prune", "quantize"))
