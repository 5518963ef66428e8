"""Weights that already lie on a grid, such as those of a model that was loaded from a quantized file.

Rounding such weights to the same grid again costs nothing, and says nothing about other weights: the user is told.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.batch import grouped
from workbench.compress.layers import find_layers

if TYPE_CHECKING:
    from workbench.statistics import Statistics

SAMPLES = 32  # groups looked at in each layer
GROUPS = (0, 128, 64, 32)  # sizes tried, the largest first; 0 is a whole row
FEWEST = 24  # inputs of a group below which few values say nothing
MOST = 128  # inputs looked at in each group
SHARE = 0.95  # of the groups that must lie on a grid
CHANCE = 0.05  # of one group to seem to lie on one by accident; that nearly all of them do is then out of the question


def notes(statistics: Statistics) -> tuple[str, ...]:
    """Return what the user should know about the dense model's weights, empty if they lie on no grid; looked at once."""

    def compute() -> tuple[str, ...]:
        layers = [layer for layer in find_layers(statistics.task.model)[0].values() if not layer.table]
        found = {layer.name: grid for batch in grouped(layers) for layer, grid in zip(batch.layers, known_grids(batch.stored()), strict=True) if grid}
        return words(found, len(layers))

    return statistics.once("weights on a grid", compute)


def words(found: dict[str, tuple[int, int]], layers: int) -> tuple[str, ...]:
    """Return one sentence for each grid that some layers lie on. found: (bits, group size or 0) by layer."""
    said = []
    for (bits, group), count in Counter(found.values()).most_common():
        first = next(name for name, grid in found.items() if grid == (bits, group))
        where = f"group {group}" if group else "one scale a row"
        said.append(
            f"quantize: the weights of {count} of {layers} layers, such as {first!r}, already lie on a {bits}-bit grid ({where}): "
            f"{bits} bits or more at that grouping change little here, which other models would not show"
        )
    return tuple(said)


def known_grids(stack: Tensor) -> list[tuple[int, int] | None]:
    """Return (bits, group size or 0 for rows) of the grid that each layer's weights lie on, None if on none. stack: [layers, outputs, inputs]."""
    columns = stack.shape[2]
    found: list[tuple[int, int] | None] = [None] * len(stack)
    for group in GROUPS:
        size = group or columns
        if size < FEWEST or columns % size or (group and size >= columns):
            continue
        missing = [index for index, grid in enumerate(found) if grid is None]
        if not missing:
            break
        for index, bits in zip(missing, widths(stack[missing], size), strict=True):
            if bits:
                found[index] = bits, group
    return found


def widths(stack: Tensor, size: int) -> list[int]:
    """Return the bits of the grid that groups of `size` inputs lie on, 0 for none. stack: [layers, outputs, inputs], in its own dtype."""
    groups = stack.unflatten(2, (-1, size)).flatten(1, 2)  # [layers, groups, size]
    picked, seen = (spaced(count, most, stack.device) for count, most in ((groups.shape[1], SAMPLES), (size, MOST)))
    values = groups[:, picked][:, :, seen].double()
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    spread = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    places = (values - low) / spread  # 0 to 1
    blur = torch.finfo(stack.dtype).eps * values.abs().amax(2, keepdim=True) / spread  # what the dtype's rounding moves a value by, in these places
    free = ((values.sort(2).values.diff(dim=2) > 0).sum(2) - 1).clamp_min(0)  # different values besides the two ends
    fewest = torch.zeros_like(free)
    for steps in range(255, 0, -1):  # the coarsest grid that fits is the last that is written
        scaled = places * steps
        off = (scaled - scaled.round()).abs()
        allowed = steps * blur + 1e-3
        chance = (2 * allowed.squeeze(2)).pow(free) * steps  # that so many values lie so near to some grid by accident
        fewest = torch.where((off <= allowed).all(2) & (chance < CHANCE), steps, fewest)
    constant = (high == low).squeeze(2)
    fits = (fewest > 0) & ~constant
    share = fits.sum(1) / (~constant).sum(1).clamp_min(1)
    widest = torch.where(fits, fewest, 0).amax(1)
    return [int(most).bit_length() if good >= SHARE and most else 0 for good, most in zip(share.tolist(), widest.tolist(), strict=True)]


def spaced(count: int, most: int, device: torch.device) -> Tensor:
    """Return at most `most` indices below `count`, evenly spaced, int64."""
    return torch.linspace(0, count - 1, min(most, count), device=device).round().long()
