"""What a method is given: the copy of the model that it may change, and everything it may read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from workbench.errors import CompressionError, RecipeError
from workbench.modules.checkpoint_types import checkpoint_types
from workbench.modules.layer import (
    Layer,
    bare_parameters,
    find_layers,
    holders_of,
    layers_among,
    output_head,
)
from workbench.modules.sharing import can_share, sharing_copy, twin
from workbench.recipe import picks
from workbench.util.fast_path import Refusals
from workbench.util.progress import Look, Progress, Training, no_progress
from workbench.util.text import nearest

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics
    from workbench.recipe import Step
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
    training: Training = field(default_factory=Training)
    layers: dict[str, Layer] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, list[str]] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (training step, loss) of a Distill step
    looks: list[Look] = field(default_factory=list)  # at held-out items, steps counted along the curve
    warnings: list[str] = field(default_factory=list)
    refusals: Refusals = field(default_factory=Refusals)  # fast paths that were switched off
    moved: dict[str, str | None] = field(
        default_factory=dict
    )  # blocks of the dense model that stand elsewhere now (None: removed)
    changes: int = 0  # layers changed so far, each step counted

    def __post_init__(self) -> None:
        """Find the layers of the model."""
        holders = holders_of(self.model)
        self.layers, self.left = layers_among(holders)
        shared = {alias: layer.name for layer in self.layers.values() for alias in layer.others}
        self.shared = frozenset(shared)  # names of modules whose weight is counted under another one
        bare = bare_parameters(self.model)
        self.left |= bare
        reported = {*self.layers, *self.left, *shared}
        self.outcomes = {
            name: [f"its weight is that of {shared[name]}"] if name in shared else []
            for name in (*holders, *bare)
            if name in reported
        }
        self.taken: dict[str, list[str]] = {}
        self.steps: list[Step] = []  # done so far, as they were done
        self.reads = frozenset[str]()  # of calibration, by the method of the step at hand
        self.refused: dict[str, str] = {}  # layers that could not take the step at hand, and why
        self.done: dict[tuple[str, str], Step] = {}  # the last step of a kind that changed a layer

    @cached_property
    def head(self) -> str | None:
        """Return the name of the layer that makes the logits, in the dense model as in this one."""
        return (
            self.statistics.once("output head", lambda: output_head(self.task.model))
            if self.statistics.task is self.task
            else output_head(self.task.model)
        )

    @cached_property
    def file_types(self) -> dict[str, torch.dtype]:
        """Return the types in which the checkpoint holds the tensors of the model as it is."""
        return checkpoint_types(self.model)

    @cached_property
    def dense(self) -> dict[str, Layer]:
        """Return the layers of the dense model, by name."""
        return (
            self.statistics.layers if self.statistics.task is self.task else find_layers(self.task.model)[0]
        )

    def say(self, layer: Layer | str, outcome: str) -> None:
        """Record what happened to a layer, for the report."""
        for name in (layer,) if isinstance(layer, str) else (layer.origin, *layer.others):
            if outcome not in self.outcomes[name]:
                self.outcomes[name].append(outcome)

    def select(self, step: Step) -> Iterator[Layer]:
        """Iterate over the layers that `step` names, reporting progress; see `choose`."""
        chosen = self.choose(step)
        for index, layer in enumerate(chosen):
            self.progress(step.kind(), index, len(chosen))
            yield layer
        self.progress(step.kind(), len(chosen), len(chosen))

    def choose(self, step: Step) -> list[Layer]:
        """Return the layers that `step` names; every other one gets its reason in the report.

        Raises:
            RecipeError: a target names no weight, or a layer already taken by an earlier step of the same
                kind.
            CompressionError: none of the layers can be taken.
        """
        self.check_targets(step)
        self.check_once(step)
        for name, reason in self.left.items():
            if step.matches(name):
                self.say(name, f"{step.kind()} skipped: {reason}")
        chosen = []
        for layer in self.layers.values():
            if self.takes(step, layer):
                chosen.append(layer)
            elif step.claim not in self.taken.get(layer.origin, []) and (reason := self.why_not(step, layer)):
                self.say(layer, reason)
        if not chosen:
            raise CompressionError(
                f"{step!r} finds no layer that it can take:"
                f" {'; '.join(f'{n}: {r}' for n, r in list(self.left.items())[:3]) or 'none matches'}"
            )
        able = [layer for layer in chosen if self.able(step, layer)]
        if not able:
            raise CompressionError(f"{step!r} fits no layer of {self.task.model_name}: {self.reasons()}")
        return able

    def able(self, step: Step, layer: Layer) -> bool:
        """Return whether a layer could take the step so far, and calibration says of it what the method
        reads; if not, the report says why.
        """
        reason = self.refused.get(layer.origin) or self.unread(layer)
        if reason:
            self.say(layer, f"{step.kind()} skipped: {reason}")
        return not reason

    def unread(self, layer: Layer) -> str:
        """Return why calibration cannot say what the method at hand reads of a layer, "" if it can.

        What a method does with tables, which multiply nothing, is up to it.
        """
        statistics, wanted = self.statistics, self.reads
        if statistics.task is not self.task or not wanted:
            return ""
        reason = ""
        if "moments" in wanted and not layer.table:
            reason = statistics.without_inputs().get(layer.origin, "")
        if not reason and "gradients" in wanted:
            reason = statistics.without_gradients(tables=layer.table).get(layer.origin, "")
        return reason

    def reasons(self) -> str:
        """Return why layers were skipped, what holds back most of them first."""
        said = Counter(outcome[-1] for outcome in self.outcomes.values() if outcome)
        first = {outcome[-1]: name for name, outcome in reversed(self.outcomes.items()) if outcome}
        told = [f"{first[outcome]}: {outcome}" for outcome, _ in said.most_common()]
        return f"{'; '.join(told[:3])}{' ...' if len(told) > 3 else ''}"

    def why_not(self, step: Step, layer: Layer) -> str:
        """Return why the targets do not pick a layer, empty if they just do not name it."""
        left_out = step.excluded(*layer.names)
        if left_out is not None:
            return f"{step.kind()} left out by target {left_out!r}"
        head = (
            "the output head"
            if not layer.others
            else f"the output head, whose weight is shared with {', '.join(layer.others)},"
        )
        what = head if layer.origin == self.head else layer.reserved
        return (
            f"{step.kind()} skipped: {what} stays dense unless targets name it"
            if step.takes(*layer.names)
            else ""
        )

    def takes(self, step: Step, layer: Layer) -> bool:
        """Return whether the targets of `step` pick a layer; its name and that of its origin both count."""
        return step.takes(*layer.names, head=layer.origin == self.head or bool(layer.reserved))

    def check_targets(self, step: Step) -> None:
        """Refuse a target that names no weight, also one that leaves out."""
        names = list(
            dict.fromkeys([*self.left, *(name for layer in self.layers.values() for name in layer.names)])
        )
        for target in step.targets:
            if not any(picks(target.removeprefix("!"), name) for name in names):
                raise RecipeError(
                    f"target {target!r} of {step.kind()} names no layer;"
                    f" {nearest(target.removeprefix('!'), names)}"
                )

    def check_once(self, step: Step) -> None:
        """Refuse two steps of one kind on the same layer."""
        for layer in self.layers.values() if self.taken else ():
            if self.takes(step, layer) and step.claim in self.taken.get(layer.origin, []):
                raise RecipeError(
                    f"layer {layer.origin!r} is already taken by an earlier {step.kind()} step: narrow the"
                    " targets of one of them"
                )

    def took(self, step: Step, layer: Layer, outcome: str) -> None:
        """Record that `step` changed this layer."""
        self.changes += 1
        for name in (layer.origin, *layer.others):
            if past := self.outcomes[name]:
                overruled = re.compile(
                    f"{step.kind()} (left out by |skipped: .* stays dense unless )"
                )  # another step of this kind left it to this one
                self.outcomes[name] = [told for told in past if not overruled.match(told)]
        self.done[layer.origin, step.kind()] = step
        self.taken.setdefault(layer.origin, [])
        if step.claim not in self.taken[layer.origin]:
            self.taken[layer.origin].append(step.claim)
        self.say(layer, outcome)

    def origin(self, name: str) -> str:
        """Return the dense model's name of a layer, or of one of its factors."""
        return self.layers[name].origin if name in self.layers else name

    def place(self, name: str) -> str | None:
        """Return where a module of the dense model stands now, None if it was removed with its block."""
        for block, now in self.moved.items():
            if name == block or name.startswith(f"{block}."):
                return None if now is None else now + name.removeprefix(block)
        return name

    def origin_of(self, name: str) -> str:
        """Return the dense model's name of a module of this one."""
        for block, now in self.moved.items():
            if now is not None and (name == now or name.startswith(f"{now}.")):
                return block + name.removeprefix(now)
        return name

    def move(self, blocks: dict[str, str | None]) -> None:
        """Note where blocks of this model stand from now on (None: removed).

        Their layers get new names, or leave.
        """
        suffixes = {
            name: layer.name.removeprefix(layer.place or layer.origin) for name, layer in self.layers.items()
        }
        self.moved |= {self.origin_of(block): now for block, now in blocks.items()}
        stay = {name: layer for name, layer in self.layers.items() if self.place(layer.origin) is not None}
        for name, layer in stay.items():
            place = str(self.place(layer.origin))
            if place != (layer.place or layer.origin):
                layer.place, layer.name = place, place + suffixes[name]
        self.layers = {layer.name: layer for layer in stay.values()}


def dense_copy(task: Task, statistics: Statistics) -> nn.Module:
    """Return a copy of the dense model in eval mode, which shares its tensors where it can.

    Whether it can is looked up once.
    """
    shareable = statistics.task is task and statistics.once("can be shared", lambda: can_share(task.model))
    return twin(task.model, evaluating=True) if shareable else sharing_copy(task.model).eval()
