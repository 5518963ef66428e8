"""What a method is given: the copy of the model that it may change, and everything it may read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from workbench.compress.layers import Layer, Progress, find_layers, no_progress, output_head
from workbench.errors import CompressionError, RecipeError
from workbench.words import nearest

if TYPE_CHECKING:
    from workbench.recipe import Step
    from workbench.statistics import Statistics
    from workbench.tasks.base import Task


@dataclass
class Work:
    """A compression in progress. `model` is a copy; `task.model` is the dense model and must not be changed.

    `outcomes` holds, for every weight of the dense model, what each step did to it or why it did not.
    """

    model: nn.Module
    task: Task
    statistics: Statistics
    progress: Progress = no_progress
    layers: dict[str, Layer] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, list[str]] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (training step, loss) of a Distill step
    warnings: list[str] = field(default_factory=list)
    changes: int = 0  # layers changed so far, each step counted

    def __post_init__(self) -> None:
        """Find the layers of the model."""
        self.layers, self.left = find_layers(self.model)
        self.outcomes = {name: [] for name, _ in self.model.named_modules(remove_duplicate=False) if name in self.layers or name in self.left}
        self.head = output_head(self.model)
        self.taken: dict[str, list[str]] = {}

    def say(self, layer: Layer | str, words: str) -> None:
        """Record what happened to a layer, for the report."""
        origin = layer if isinstance(layer, str) else layer.origin
        if words not in self.outcomes[origin]:
            self.outcomes[origin].append(words)

    def select(self, step: Step) -> Iterator[Layer]:
        """Iterate over the layers that `step` names, reporting progress; every other one gets its reason in the report.

        Raises:
            RecipeError: a target names no weight, or a layer already taken by an earlier step of the same kind.

        """
        self.check_targets(step)
        self.check_once(step)
        for name, reason in self.left.items():
            if step.matches(name):
                self.say(name, f"{step.kind()} skipped: {reason}")
        everything = step.targets == ("*",)
        chosen = []
        for layer in self.layers.values():
            if everything and layer.origin == self.head:
                self.say(layer, f"{step.kind()} skipped: the output head stays dense unless targets name it")
            elif step.matches(layer.name) or step.matches(layer.origin):
                chosen.append(layer)
        if not chosen:
            raise CompressionError(f"{step!r} finds no layer that it can take: {'; '.join(f'{n}: {r}' for n, r in list(self.left.items())[:3]) or 'none matches'}")
        for index, layer in enumerate(chosen):
            self.progress(step.kind(), index, len(chosen))
            yield layer
        self.progress(step.kind(), len(chosen), len(chosen))

    def check_targets(self, step: Step) -> None:
        """Refuse a target that names no weight."""
        names = [*self.layers, *self.left, *(layer.origin for layer in self.layers.values())]
        for target in step.targets:
            alone = dataclasses.replace(step, targets=(target,))
            if not any(alone.matches(name) for name in names):
                raise RecipeError(f"target {target!r} of {step.kind()} names no layer; {nearest(target, names)}")

    def check_once(self, step: Step) -> None:
        """Refuse two steps of one kind on the same layer."""
        for layer in self.layers.values():
            if (step.matches(layer.name) or step.matches(layer.origin)) and step.kind() in self.taken.get(layer.origin, []):
                raise RecipeError(f"layer {layer.origin!r} is already taken by an earlier {step.kind()} step: narrow the targets of one of them")

    def took(self, step: Step, layer: Layer, words: str) -> None:
        """Record that `step` changed this layer."""
        self.changes += 1
        self.taken.setdefault(layer.origin, [])
        if step.kind() not in self.taken[layer.origin]:
            self.taken[layer.origin].append(step.kind())
        self.say(layer, words)
