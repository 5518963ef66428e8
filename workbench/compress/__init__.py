"""Compression: real changes to real tensors, step by step, each promise checked on the tensors afterwards.

Importing this package registers the built-in methods, each in the file that carries it out, with its facts
(`workbench.compress.method`); one folder holds a family.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from workbench.calibration.statistics import Statistics
from workbench.compress import prefix_cache
from workbench.compress.core.batch import know_finite
from workbench.compress.core.context import Work, dense_copy
from workbench.compress.core.coverage import Coverage, coverage_of
from workbench.compress.core.invariants import check_all
from workbench.compress.core.layer_report import LayerReport, effective_bits_of, layer_reports
from workbench.compress.distillation.distill import Distill
from workbench.compress.distillation.transfer import Transfer
from workbench.compress.low_rank.lowrank import LowRank
from workbench.compress.low_rank.repair import Repair
from workbench.compress.placed import refuse
from workbench.compress.pruning.prune import Prune
from workbench.compress.quantization.activations import Activations
from workbench.compress.quantization.kv_cache import KVCache
from workbench.compress.quantization.qat import QAT
from workbench.compress.quantization.quantize import Quantize
from workbench.compress.registry import METHODS
from workbench.compress.unrouted import say_unrouted
from workbench.compress.vocabulary import besides
from workbench.errors import CompressionError, LayerSkipped
from workbench.kernels import weight_trials
from workbench.kernels.weight_trials import WEIGHT_PASSES
from workbench.modules.checkpoint_types import round_to_checkpoint
from workbench.modules.layer import Layer
from workbench.modules.sharing import SHARED_COPIES, copied_whole, own_parameters
from workbench.modules.vocabulary import vocabulary_of
from workbench.recipe import Recipe, Step
from workbench.tasks.base import Task
from workbench.util.progress import Look, Progress, Training, no_progress

__all__ = [
    "QAT",
    "Activations",
    "Compressed",
    "Distill",
    "KVCache",
    "LayerReport",
    "LowRank",
    "Prune",
    "Quantize",
    "Repair",
    "Transfer",
    "Work",
    "compress",
]


@dataclass(frozen=True)
class Compressed:
    """A compressed model: an ordinary module that runs anywhere, and what is known about each of its
    weights.
    """

    model: nn.Module
    recipe: Recipe
    layers: tuple[Layer, ...]
    report: tuple[LayerReport, ...]
    curve: tuple[tuple[int, float], ...] = ()  # (training step, loss) of a Distill step
    warnings: tuple[str, ...] = ()
    looks: tuple[Look, ...] = ()  # at held-out items while it was trained, steps counted along the curve
    coverage: Coverage | None = None  # what share of the weights was touched; None: nobody counted

    @property
    def effective_bits(self) -> float | None:
        """Return the bits a weight that the quantized layers take on average, scales and zero points
        included; None without any.
        """
        return effective_bits_of([layer for layer in self.layers if layer.grid is not None])


def compress(
    task: Task,
    recipe: Recipe,
    statistics: Statistics | None = None,
    progress: Progress = no_progress,
    *,
    shared: bool = False,
    training: Training | None = None,
) -> Compressed:
    """Apply every step of `recipe` to a copy of the task's model; the task's model is not changed.

    The same recipe, seed and device give the same bits. `progress(what, done, total)` is called between
    layers and training steps; an exception from it (`Cancelled`) stops the work. With `shared`, parameters
    that no step changed are those of the dense model themselves: quick, and to be left alone; without,
    everything is the result's own. `training` watches training steps and may end them early: the result's
    recipe then says where, and gives the same bits again.

    Raises:
        RecipeError: a target names no layer, or two steps of one kind take the same layer.
        CompressionError: a step finds no layer that it can take, or numbers stop being finite.
        BrokenPromiseError: a later step broke what an earlier one promised (a defect).
    """
    refuse(recipe, task.model)
    facts = statistics or Statistics(task, progress)
    facts.kept.begin()
    refused: dict[int, dict[str, str]] = {}  # by the place of the step: layers that cannot take it
    while True:
        work = begin(task, recipe, facts, progress, training or Training())
        try:
            done = carried_out(recipe, work, refused)
        except StepAgain:
            continue
        break
    finish(recipe, work)
    covered = coverage_of(work)  # before tensors that are the dense ones are cloned, or others rounded
    on_grids = [layer.parameter for layer in work.layers.values() if layer.grid is not None]
    round_to_checkpoint(work.model, task.model, on_grids)
    if not shared:
        own_parameters(work.model)
    return Compressed(
        work.model,
        Recipe(*done),
        tuple(work.layers.values()),
        layer_reports(work),
        tuple(work.curve),
        (*work.warnings, *work.refusals.words()),
        tuple(work.looks),
        covered,
    )


class StepAgain(Exception):  # noqa: N818  no failure
    """A layer turned out unable to take a step: all is done again without it there."""


def begin(task: Task, recipe: Recipe, statistics: Statistics, progress: Progress, training: Training) -> Work:
    """Return work to start with: a copy of the dense model, or what is kept of the recipe's first steps."""
    begun = prefix_cache.begun(recipe.steps, statistics) if statistics.task is task else None
    if begun is not None:
        work = begun.continued(task, statistics, progress, training)
        work.steps = list(begun.done)
        return work
    work = Work(dense_copy(task, statistics), task, statistics, progress, training)
    if statistics.task is task:
        know_finite(list(work.layers.values()), statistics)
    if copied_whole(work.model, task.model):
        work.refusals.note(SHARED_COPIES, "a module holds others outside the module tree")
    for device, dtype in {(layer.parameter.device, layer.parameter.dtype) for layer in work.layers.values()}:
        work.refusals.note(WEIGHT_PASSES, weight_trials.failed(device, dtype))
    return work


def carried_out(recipe: Recipe, work: Work, refused: dict[int, dict[str, str]]) -> list[Step]:
    """Carry out the steps that are left, and return all as they were done.

    refused: by the place of a step, the layers that cannot take it and why; what is found out is added.

    Raises:
        StepAgain: something was added. Else as `compress`.
    """
    task, statistics = work.task, work.statistics
    done = work.steps
    for place, step in enumerate(recipe.steps[len(done) :], len(done) + 1):
        changes, method = work.changes, METHODS.of(step)
        work.refused = refused.get(place, {})
        work.reads = frozenset() if method.reads is None else method.reads(step)
        try:
            done.append(method.apply(step, work) or step)
        except LayerSkipped as refusal:
            fresh = {work.origin(name): reason for name, reason in refusal.layers.items()}
            if not fresh.keys() - work.refused.keys() or not fresh.keys() <= work.dense.keys():
                raise  # it is not up to layers, or the method does not leave out what it is told to
            refused[place] = {**fresh, **work.refused}
            raise StepAgain from None
        say_unrouted(step, work)
        if work.changes == changes:
            raise CompressionError(f"{step!r} fits no layer of {task.model_name}: {work.reasons()}")
        check_all(list(work.layers.values()), work.dense)
        if place < len(recipe) and statistics.task is task:
            prefix_cache.keep(recipe.steps[:place], done, work)
    return done


def finish(recipe: Recipe, work: Work) -> None:
    """Do what a recipe ends with on the weights of the vocabulary."""
    steps = besides(recipe, vocabulary_of(work.task.model, work.dense.values()))
    for step in steps:
        method = METHODS.of(step)
        work.refused, work.reads = {}, frozenset() if method.reads is None else method.reads(step)
        method.apply(step, work)
        for layer in work.layers.values():
            if step.takes(*layer.names, head=True):
                work.say(layer, f"{step.kind()} took it besides, as no target names it")
    if steps:
        check_all(list(work.layers.values()), work.dense)
