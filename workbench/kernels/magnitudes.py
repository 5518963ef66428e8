"""Magnitudes of 16-bit weights as integers, and what stays of weights whose magnitudes were counted: plain
operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.kernels.selection import first_true
from workbench.util.device import placed

VALUES = 2**15  # of |w|, infinity and NaN among them


def keys(stored: Tensor) -> Tensor:
    """Return integers that are ordered as the magnitudes of 16-bit numbers: int16 in [0, 2^15), of the same
    shape.
    """
    return stored.view(torch.int16) & (VALUES - 1)


def keep(stored: Tensor, below: Tensor, removed: Sequence[int]) -> Tensor:
    """Return a mask (bool, [layers, weights]) that keeps the largest of each layer but for `removed[layer]`.

    Ties go to the first.

    Args:
        stored: finite 16-bit weights [layers, weights].
        below: how many of them have at most each magnitude, int [layers, 32768].
        removed: how many go from each layer.
    """
    threshold, stay = thresholds(below, removed)
    size, edge = keys(stored), threshold.to(torch.int16)
    return (size > edge) | first_true(size == edge, stay)


def thresholds(below: Tensor, removed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return (the magnitude of each layer above which weights stay, how many of those equal to it stay), int
    [layers, 1].

    Args:
        below: how many weights have at most each magnitude, int [layers, 32768].
        removed: how many go from each layer.
    """
    gone = placed(removed, torch.int32, below.device)[:, None]
    place = torch.searchsorted(below, gone, right=True).clamp_(
        max=VALUES - 1
    )  # the last stands for "above all"
    return place, below.gather(1, place) - gone
