"""Inverses of second moments, damped until they can be taken: what GPTQ and SparseGPT start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.calibration.passes import full_precision
from workbench.errors import LayerSkipped
from workbench.modules.layer import Layer


def scaled_moments(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (moments over their mean diagonals, these means [layers], which inputs are alive: bool [layers,
    inputs]) of second moments [layers, inputs, inputs].

    The mean is that of the inputs that are not always zero. A dead input gets it in its place, so that it
    neither disturbs the others nor is disturbed.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    mean = (diagonal * alive).sum(1) / alive.sum(1).clamp_min(1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return moments / mean[:, None, None] + torch.diag_embed((~alive).float()), mean, alive


def inverted(
    scaled: Tensor, layers: Sequence[Layer], dampings: Sequence[float], instead: str
) -> tuple[Tensor, list[int]]:
    """Return (upper Cholesky factors of (scaled + damping)^-1 [layers, inputs, inputs], the place among
    `dampings` of the one that each layer took: the first with which it can be inverted).

    `instead` says what a user may ask for where none does.

    Raises:
        LayerSkipped: a matrix cannot be inverted even with the last damping; names the layer.
    """
    upper, good = damped(scaled, dampings[0])
    used = [0] * len(layers)
    for place, damping in enumerate(dampings[1:], 1):
        bad = [index for index, fine in enumerate(good.tolist()) if not fine]
        if not bad:
            break
        used = [place if index in bad else before for index, before in enumerate(used)]
        upper[bad], good[bad] = damped(scaled[bad], damping)
    if not bool(good.all()):
        worst = layers[int((~good).nonzero()[0])]
        raise LayerSkipped(
            worst.name,
            f"the second moment of its {scaled.shape[1]} inputs cannot be inverted, even with damping"
            f" {dampings[-1]:g} of its mean diagonal: its calibration inputs are too large for float32 or not"
            f" finite; try {instead} there",
        )
    return upper, used


def damped(scaled: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return (upper Cholesky factors of (scaled + damping)^-1, [layers, inputs, inputs]; for which layers
    that went well, bool [layers]).
    """
    with full_precision():
        eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
        lower, first = torch.linalg.cholesky_ex(scaled + damping * eye)
        upper, second = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, (first == 0) & (second == 0) & torch.isfinite(upper).flatten(1).all(1)


def damping_warnings(
    step: str,
    layers: Sequence[Layer],
    taken: Sequence[float],
    dampings: Sequence[float],
    seen: Sequence[tuple[int, int]],
) -> list[str]:
    """Return warnings about some inverses: which layers needed more damping, and which have seen fewer inputs
    than they have columns.

    Args:
        step: the kind of step that took them.
        layers: of which they are.
        taken: the damping of each layer, one of `dampings`.
        dampings: what was tried, the usual one first.
        seen: (rows of calibration, columns) of each layer.
    """
    said = []
    for stronger in dampings[1:]:
        raised = [layer for layer, used in zip(layers, taken, strict=True) if used == stronger]
        if raised:
            said.append(
                f"{step}: damping raised to {stronger:g} of the mean diagonal where a second moment was"
                f" singular: {listed(raised)}"
            )
    few = [
        (layer, rows, columns)
        for layer, (rows, columns) in zip(layers, seen, strict=True)
        if 0 < rows < columns  # none at all: by no inputs, which is said elsewhere
    ]
    if few:
        _, rows, columns = few[0]
        said.append(
            f"{step}: calibration has too few rows for the second moments of"
            f" {listed([layer for layer, *_ in few])} ({rows} rows for {columns} inputs): regularised by"
            f" damping of {dampings[0]:g} of the mean diagonal; give more calibration items"
        )
    return said


def listed(layers: Sequence[Layer]) -> str:
    """Return the first layer's name and how many more there are."""
    return repr(layers[0].name) + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")
