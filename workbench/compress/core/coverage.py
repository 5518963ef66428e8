"""What share of a model's weights a recipe touched, and why the rest stayed as it was.

Counted on the models themselves: every parameter of the dense one once, however many modules share it. A
weight is touched if a step changed it, removed it, or weighed it against others that it removed.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from workbench.compress.core.context import Work

HALF = 0.5  # below this share the verdict warns
VECTORS = "biases, norms and other vectors"
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name


@dataclass(frozen=True)
class UntouchedPart:
    """Weights that no step touched: those of alike names, left for the same reason.

    `name` is dotted, with * where numbers differ. `layers` says whether each has a row of its own in the
    report of layers; a parameter beside the layers has none.
    """

    name: str
    weights: int
    tensors: int
    reason: str
    layers: bool


@dataclass(frozen=True)
class Coverage:
    """How many weights a model has, how many of them a recipe touched, and what it left, largest first."""

    weights: int
    touched: int
    untouched: tuple[UntouchedPart, ...]

    @property
    def share(self) -> float:
        """Return the share of the model's weights that was touched, 0 to 1."""
        return self.touched / self.weights if self.weights else 0.0

    @property
    def little(self) -> bool:
        """Return whether the recipe changes weights, but fewer than half of them."""
        return 0 < self.share < HALF

    def words(self) -> str:
        """Return such as `62.3% of 135M weights`."""
        return f"{share_words(self.share)} of {self.weights:,} weights"

    def warning(self) -> str:
        """Return which part is the largest of what was left, and why, where that is more than half of the
        weights; else "".
        """
        if not self.little or not self.untouched:
            return ""
        largest = self.untouched[0]
        alike = f" ({largest.tensors} tensors)" if largest.tensors > 1 else ""
        return (
            f"only {share_words(self.share)} of the model's weights are touched: the largest part that is not"
            f" is {largest.name}{alike} with {share_words(largest.weights / self.weights)}: {largest.reason}"
        )


def share_words(share: float) -> str:
    """Return a share as a percentage; neither 0% nor 100% where it is not."""
    if 0 < share < 0.001:
        return "under 0.1%"
    return "over 99.9%" if 0.999 < share < 1 else f"{share:.1%}".replace(".0%", "%")


@dataclass(frozen=True)
class Beside:
    """A parameter that belongs to no layer: its name, and the tensor of the dense model."""

    name: str
    tensor: Tensor


def coverage_of(work: Work) -> Coverage:
    """Return the share of the weights that the steps so far have touched, and the untouched ones.

    Reads names and which tensors are which; values only where a model was copied whole or trained.
    """
    task = work.task
    beside = (
        work.statistics.once("beside the layers", lambda: list(beside_layers(task.model, work)))
        if work.statistics.task is task
        else list(beside_layers(task.model, work))
    )
    total = touched = 0
    left: dict[tuple[str, str, bool], list[int]] = {}
    for name, layer in work.dense.items():
        count = layer.parameter.numel()
        total += count
        if work.taken.get(name):
            touched += count
        else:
            reason = "; ".join(work.outcomes[name]) or "no target names it"
            left.setdefault((NUMBER.sub("*", name), reason, True), []).append(count)
    for parameter in beside:
        count = parameter.tensor.numel()
        total += count
        if held(work, parameter):
            pattern = NUMBER.sub("*", parameter.name) if parameter.tensor.ndim > 1 else VECTORS
            left.setdefault((pattern.removesuffix(".weight"), *reason_of(work, parameter)), []).append(count)
        else:
            touched += count
    untouched = [
        UntouchedPart(name, sum(counts), len(counts), reason, layers)
        for (name, reason, layers), counts in left.items()
    ]
    return Coverage(total, touched, tuple(sorted(untouched, key=lambda part: -part.weights)))


def beside_layers(model: nn.Module, work: Work) -> Iterator[Beside]:
    """Yield the parameters of the dense model that are no layer's, nor hold one."""
    starts: dict[torch.device, list[int]] = {}
    mine: set[int] = set()
    for layer in work.dense.values():
        weight = layer.parameter
        mine.add(id(weight))
        starts.setdefault(weight.device, []).append(weight.data_ptr())
    for places in starts.values():
        places.sort()
    for name, tensor in model.named_parameters():
        if id(tensor) in mine:
            continue
        places, first = starts.get(tensor.device, []), tensor.data_ptr()
        place = bisect_left(places, first)
        within = place < len(places) and places[place] < first + tensor.nbytes
        if not within or not tensor.nbytes:
            yield Beside(name, tensor)


def held(work: Work, parameter: Beside) -> bool:
    """Return whether the model still holds a parameter as it was, in its place."""
    place = work.place(parameter.name)
    if place is None:
        return False
    owner, _, last = place.rpartition(".")
    try:
        now = getattr(work.model.get_submodule(owner), last, None)
    except AttributeError:  # its module is another one now
        return False
    if now is parameter.tensor:
        return True
    return (
        isinstance(now, Tensor)
        and (now.shape, now.dtype, now.device)
        == (parameter.tensor.shape, parameter.tensor.dtype, parameter.tensor.device)
        and torch.equal(now, parameter.tensor)
    )


def reason_of(work: Work, parameter: Beside) -> tuple[str, bool]:
    """Return why a parameter beside the layers was left, and whether the report has a row for it."""
    owner, _, last = parameter.name.rpartition(".")
    row = owner if last == "weight" and owner in work.outcomes else parameter.name
    if row in work.outcomes:
        return "; ".join(work.outcomes[row]) or work.left.get(row, "no target names it"), True
    if parameter.tensor.ndim < 2:
        return "they are no matrices: no method takes them", False
    return f"{last} is a parameter beside the layers, not a layer's weight: no method takes it", False
