"""Least-squares reconstruction: what reads removed inputs is refitted to the inputs that stay, in closed
form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.core.moments import second_moment_of
from workbench.errors import LayerSkipped

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.modules.layer import Layer

RIDGE = 1e-4  # of the mean second moment: keeps directions that the calibration data hardly shows as they are


def rebuilt(layer: Layer, kept: Tensor, work: Work) -> Tensor:
    """Return the weight [outputs, kept inputs] whose outputs differ least, in the mean square, from those of
    the whole layer.

    W' = W_K + W_R M_RK (M_KK + ridge)^-1 with M = E[x x^T] of the calibration inputs, K the inputs kept and R
    those removed. The ridge holds W' near W_K, so that removing inputs that are always zero changes nothing.
    """
    weight, moment = layer.matrix(), second_moment_of(layer, work)
    kept = kept.to(weight.device)
    stays = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    stays[kept] = True
    gone = (~stays).nonzero().flatten()
    square = moment[kept][:, kept].double()
    square.diagonal().add_(RIDGE * square.diagonal().mean().clamp_min(1e-30))
    pull = (weight[:, gone].double() @ moment[gone][:, kept].double()).t()
    factor, failed = torch.linalg.cholesky_ex(square)
    if bool(failed):
        raise LayerSkipped(
            layer.name,
            f"the second moments of its {len(kept)} kept inputs are singular, so it cannot be refitted; use"
            " reconstruct=False or more calibration data",
        )
    return weight[:, kept] + torch.cholesky_solve(pull, factor).t().float()
