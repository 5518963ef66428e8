"""Weights that already lie on a grid, such as those of a model that was loaded from a quantized file.

Rounding such weights to the same grid again costs nothing, and says nothing about other weights: the user is
told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.calibration.passes import gathered
from workbench.compress.core.batch import grouped
from workbench.modules.layer import find_layers

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics

SAMPLES = 32  # groups looked at in each layer
GROUPS = (0, 128, 64, 32)  # sizes tried, the largest first; 0 is a whole row
FEWEST = 24  # inputs of a group below which few values say nothing
MOST = 128  # inputs looked at in each group
FIRST = 8  # of which so many are tried first: they rule out nearly every layer that lies on no grid
NONE = 256  # stands for no grid: more steps than any
ROOM = 2**24  # weights compared with grids at once
SHARE = 0.95  # of the groups that must lie on a grid
# Of one group to seem to lie on one by accident; that nearly all of them do is then out of the question
CHANCE = 0.05


class Sample(NamedTuple):
    """What layers that are compared together have in common: groups and weights looked at, the groups' size
    (0: rows), their type's precision.
    """

    groups: int
    weights: int
    group: int
    eps: float


def notes(statistics: Statistics) -> tuple[str, ...]:
    """Return a sentence for each grid that the dense model's weights lie on already, () if they lie on none.
    Looked at once.
    """

    def compute() -> tuple[str, ...]:
        layers = [layer for layer in find_layers(statistics.task.model)[0].values() if not layer.table]
        names: list[str] = []

        def stacks() -> Iterator[Tensor]:
            for batch in grouped(layers):
                names.extend(layer.name for layer in batch.layers)
                yield batch.stored()

        grids = known_grids(stacks())
        return words({name: grid for name, grid in zip(names, grids, strict=True) if grid}, len(layers))

    return statistics.once("weights on a grid", compute)


def words(by_name: dict[str, tuple[int, int]], layers: int) -> tuple[str, ...]:
    """Return one sentence for each grid that some layers lie on. by_name: (bits, group size or 0)."""
    said = []
    for (bits, group), count in Counter(by_name.values()).most_common():
        first = next(name for name, grid in by_name.items() if grid == (bits, group))
        where = f"group {group}" if group else "one scale a row"
        said.append(
            f"quantize: the weights of {count} of {layers} layers, such as {first!r}, already lie on a"
            f" {bits}-bit grid ({where}): what {bits} bits or more cost at that grouping, little where the"
            " zero of that grid is one of its steps, says nothing of other models"
        )
    return tuple(said)


def known_grids(stacks: Iterable[Tensor]) -> list[tuple[int, int] | None]:
    """Return (bits, group size or 0 for rows) of the grid that each layer's weights lie on, None if on none.

    Each stack: [layers, outputs, inputs].

    What is looked at of all layers is compared together: a GPU would wait for being asked about each.
    """
    by_layer: list[tuple[int, int] | None] = []
    samples: dict[Sample, list[Tensor]] = {}
    places: dict[Sample, list[int]] = {}
    for stack in stacks:
        for group in GROUPS:
            size = group or stack.shape[2]
            if size >= FEWEST and stack.shape[2] % size == 0 and (not group or size < stack.shape[2]):
                values = sampled(stack, size)
                key = Sample(values.shape[1], values.shape[2], group, torch.finfo(stack.dtype).eps)
                samples.setdefault(key, []).append(values)
                places.setdefault(key, []).extend(range(len(by_layer), len(by_layer) + len(stack)))
        by_layer += [None] * len(stack)
    for group in GROUPS:
        for key in (key for key in samples if key.group == group):
            for place, bits in zip(
                places[key], widths(torch.cat(gathered(samples[key])), key.eps), strict=True
            ):
                if bits and by_layer[place] is None:
                    by_layer[place] = bits, group
    return by_layer


def sampled(stack: Tensor, size: int) -> Tensor:
    """Return some weights of some groups of `size` inputs, float64 [layers, groups, weights]. stack: [layers,
    outputs, inputs].
    """
    groups = stack.unflatten(2, (-1, size)).flatten(1, 2)
    picked, seen = (
        spaced(count, most, stack.device) for count, most in ((groups.shape[1], SAMPLES), (size, MOST))
    )
    values: Tensor = groups[:, picked][:, :, seen].double()
    return values


def widths(values: Tensor, eps: float) -> list[int]:
    """Return the bits of the grid that the groups of each layer lie on, 0 for none. values: [layers, groups,
    weights], rounded to `eps` of their size.
    """
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    spread = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    places = (values - low) / spread  # 0 to 1
    blur = (eps * values.abs().amax(2, keepdim=True) / spread).squeeze(
        2
    )  # what the dtype's rounding moves a value by, in these places
    free = ((values.sort(2).values.diff(dim=2) > 0).sum(2) - 1).clamp_min(
        0
    )  # different values besides the two ends
    varied = ~(high == low).squeeze(2)
    some = places[:, :, spaced(places.shape[2], FIRST, places.device)]
    maybe = torch.nonzero(
        share_of(fewest_steps(some, blur, free) < NONE, varied) >= SHARE
    ).flatten()  # a grid without some weights is none of all
    fewest = torch.full_like(free, NONE)
    if len(maybe):
        fewest[maybe] = fewest_steps(places[maybe], blur[maybe], free[maybe])
    on = (fewest < NONE) & varied
    share = share_of(on, varied)
    widest = torch.where(on, fewest, 0).amax(1)
    return [
        int(most).bit_length() if good >= SHARE and most else 0
        for good, most in zip(share.tolist(), widest.tolist(), strict=True)
    ]


def share_of(on: Tensor, varied: Tensor) -> Tensor:
    """Return which share of the groups that are not constant lies on a grid: float32 [layers] of bool
    [layers, groups].
    """
    return (on & varied).sum(1) / varied.sum(1).clamp_min(1)


def fewest_steps(places: Tensor, blur: Tensor, free: Tensor) -> Tensor:
    """Return the least number of steps of a grid that all weights of a group lie on, `NONE` without one:
    int64 [layers, groups].

    places: [layers, groups, weights], 0 to 1; blur [layers, groups], how far each may be off; free [layers,
    groups], how many different ones there are.
    """
    fewest = torch.full_like(free, NONE)
    for steps in torch.arange(1, 256, device=places.device, dtype=torch.float64).split(
        max(1, ROOM // max(1, places.numel()))
    ):
        scaled = places * steps[:, None, None, None]
        off = (scaled - scaled.round()).abs().amax(3)
        allowed = steps[:, None, None] * blur + 1e-3
        chance = (2 * allowed).pow(free) * steps[
            :, None, None
        ]  # that so many values lie so near to some grid by accident
        fits = (off <= allowed) & (chance < CHANCE)
        fewest = torch.minimum(fewest, torch.where(fits, steps.long()[:, None, None], NONE).amin(0))
    return fewest


def spaced(count: int, most: int, device: torch.device) -> Tensor:
    """Return at most `most` indices below `count`, evenly spaced: int64 [indices]."""
    return torch.linspace(0, count - 1, min(most, count), device=device).round().long()
