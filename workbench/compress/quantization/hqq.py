"""HQQ: zero points that are no integers, found by half-quadratic splitting; reads no data.

Badri & Shaji 2023. With scales fixed, the errors W - W' are taken apart into a sparse part (outliers, by a
generalised soft threshold of an l_p norm below 1) and a rest, whose mean over each group moves the zero
point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.compress.quantization.scales import Scales, Spec
from workbench.formats.stored_forms import OffsetGrid

NORM, PENALTY, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20  # p, beta, kappa and the iterations of the paper's code


@torch.no_grad()
def solve(stack: Tensor, scales: Scales, spec: Spec, masks: Tensor | None = None) -> OffsetGrid:
    """Return the stacked form of least mean absolute error over the iterations, group by group.

    stack: float32 [layers, outputs, inputs]. Where `masks` (bool) is given, only weights that stay count, and
    the others are zero by the mask, since the grid itself need not hold zero.
    """
    groups = spec.grouped(stack)
    kept = None if masks is None else spec.grouped(masks)
    count = groups.shape[3] if kept is None else kept.sum(3).clamp_min(1)
    scale = scales.scale.unsqueeze(-1)
    half = torch.tensor(scales.half, device=stack.device)[:, None, None]
    zero = torch.zeros_like(scales.scale) + (
        float(1 << (spec.bits - 1)) if scales.zero is None else scales.zero.float()
    )
    penalty, best, least = PENALTY, zero, None
    for _ in range(ROUNDS):
        codes = (groups / scale + zero.unsqueeze(-1)).round_().clamp_(0, spec.levels)
        lost = torch.addcmul(groups, codes - zero.unsqueeze(-1), scale, value=-1)
        error = (lost.abs() if kept is None else lost.abs() * kept).sum(3)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        least, best = (
            error if least is None else torch.where(better, error, least),
            torch.where(better, zero, best),
        )
        target = codes - (groups - shrink(lost, penalty)) / scale
        moved = (target if kept is None else target * kept).sum(3) / count
        zero = torch.where(half, moved.clamp_(-65504, 65504).half().float(), moved)
        penalty *= GROWTH
    codes = (groups / scale + best.unsqueeze(-1)).round_().clamp_(0, spec.levels).to(torch.uint8)
    return OffsetGrid(codes.view(stack.shape), scales.scale, best, spec.bits, masks)


def shrink(values: Tensor, penalty: float) -> Tensor:
    """Return the generalised soft threshold of the l_p norm: sign(x) max(|x| - p |x|^(p-1) / beta, 0), 0 at
    0; shaped as the values.
    """
    size = values.abs()
    return values.sign() * (size - size.clamp_min(1e-12).pow(NORM - 1) / penalty).clamp_min_(0)
