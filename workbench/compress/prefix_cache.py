"""The state after the first steps of a recipe, kept so that a move of a later slider begins there."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from workbench.compress.registry import METHODS
from workbench.modules.offload import streams_to
from workbench.modules.sharing import can_share, twin
from workbench.util.progress import Training, no_progress

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics
    from workbench.compress.core.context import Work
    from workbench.modules.layer import Layer
    from workbench.recipe import Step
    from workbench.tasks.base import Task
    from workbench.util.progress import Progress

MOST = 3  # states kept
# Beginnings of recipes that are remembered, so that one is kept at its second use: dragging the first slider
# keeps nothing
REMEMBERED = 8
OWN = ("task", "statistics", "progress", "training")  # of each compression


@dataclass(frozen=True)
class Snapshot:
    """The work after some steps, and the steps as they were done.

    Shares tensors with whatever came of it: nobody changes those in place.
    """

    work: Work
    done: tuple[Step, ...]

    def continued(self, task: Task, statistics: Statistics, progress: Progress, training: Training) -> Work:
        """Return work of its own that goes on from here."""
        work = twin_of(self.work)
        assert work is not None  # noqa: S101  what was copied once can be copied again
        work.task, work.statistics, work.progress, work.training = task, statistics, progress, training
        return work


@dataclass
class Beginnings:
    """Which beginnings of recipes were seen lately, and under which of them a state is kept."""

    seen: OrderedDict[tuple[Step, ...], None] = field(default_factory=OrderedDict)
    kept: OrderedDict[tuple[Step, ...], None] = field(default_factory=OrderedDict)

    def again(self, steps: tuple[Step, ...]) -> bool:
        """Return whether a beginning was seen before, and remember it."""
        seen_before = steps in self.seen
        self.seen[steps] = None
        self.seen.move_to_end(steps)
        while len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        return seen_before


def begun(steps: tuple[Step, ...], statistics: Statistics) -> Snapshot | None:
    """Return the state after the longest beginning of `steps` that is kept (never all of them), None without
    any.
    """
    for count in range(len(steps) - 1, 0, -1):
        kept = statistics.kept.get(("state", steps[:count]))
        if kept is not None:
            snapshot: Snapshot = kept[0]
            return snapshot
    return None


def keep(steps: tuple[Step, ...], done: Iterable[Step], work: Work) -> None:
    """Keep the state after `steps` if they were begun with before, hold no training, and there is room."""
    cache = work.statistics.kept
    beginnings: Beginnings = cache.once("beginnings", Beginnings)
    if (
        not beginnings.again(steps)
        or any(trains(step) for step in steps)
        or streams_to(work.model) is not None
    ):
        return
    copied = twin_of(work)
    if copied is None:
        return
    copied.progress, copied.training = no_progress, Training()  # whoever goes on has its own
    vars(copied)["statistics"] = None  # they hold this
    cache.put(("state", steps), Snapshot(copied, tuple(done)), first_out=True)
    beginnings.kept[steps] = None
    beginnings.kept.move_to_end(steps)
    while len(beginnings.kept) > MOST:
        cache.pop(("state", beginnings.kept.popitem(last=False)[0]))


def trains(step: Step) -> bool:
    """Return whether a step may train, as one does whose method does not say: what it leaves is not kept."""
    trains = METHODS.of(step).trains
    return trains is None or trains(step)


def twin_of(work: Work) -> Work | None:
    """Return work of its own on the same tensors: a model of new modules, layers that point into it, tables
    of its own. None where modules hang together in other ways.
    """
    if not can_share(work.model):
        return None
    places = {id(module): name for name, module in work.model.named_modules(remove_duplicate=False)}
    model = twin(work.model)
    copied = copy.copy(work)
    for name, value in vars(work).items():
        if name not in OWN and type(value) in {dict, list}:
            setattr(copied, name, own_table(value))
    copied.model, copied.refusals = model, copy.deepcopy(work.refusals)
    own_config(model, work)
    try:
        copied.layers = {name: moved_layer(layer, places, model) for name, layer in work.layers.items()}
    except KeyError:  # a layer's module that is not in the tree
        return None
    return copied


def own_config(model: nn.Module, work: Work) -> None:
    """Give a copy of the model of `work` a configuration of its own, if that has one: a step that removes
    structure writes into it.
    """
    config = getattr(model, "config", None)
    if config is None or config is getattr(work.task.model, "config", None):
        return
    own = copy.deepcopy(config)
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = own


def own_table(table: dict[object, object] | list[object]) -> object:
    """Return a copy of a dict or list, and of the lists in a dict."""
    if isinstance(table, dict):
        return {key: list(value) if isinstance(value, list) else value for key, value in table.items()}
    return list(table)


def moved_layer(layer: Layer, places: dict[int, str], model: nn.Module) -> Layer:
    """Return a copy of a layer that points to the modules in the same places of another model."""
    copied = copy.copy(layer)
    copied.module = model.get_submodule(places[id(layer.module)])
    copied.others = {name: model.get_submodule(places[id(module)]) for name, module in layer.others.items()}
    return copied
