"""A measurement in progress: looks at growing numbers of items, then everything else that is measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TypeVar

from workbench.compress import Compressed
from workbench.errors import DataError
from workbench.measure.evaluation.outputs import Outputs
from workbench.measure.kl import WHAT, Divergence, Reference, divergence
from workbench.measure.kv_cache import CacheBytes, cache_bytes, context_of
from workbench.measure.latency import measure_latency
from workbench.measure.measurement import CHANGED, Measurement, Provenance
from workbench.measure.memory import peak_memory_bytes
from workbench.measure.recent_scores import Neighbours
from workbench.measure.setting import Setting
from workbench.measure.size import Sizes, counted_sizes, sizes
from workbench.metrics.class_recall import lost_classes
from workbench.metrics.control_variates import ControlVariates
from workbench.metrics.quality import flips, quality
from workbench.metrics.scores import Scores
from workbench.metrics.sequential_looks import joint_level
from workbench.modules.placement import untimed
from workbench.runtime.plan import plan, realise
from workbench.util.environment import git_revision, now, versions
from workbench.util.progress import Progress

T = TypeVar("T")


class Partial:
    """A measurement in progress: one compressed model, scored look by look.

    All looks are declared in advance, and their intervals hold together at the bench's confidence
    (`workbench.metrics.sequential_looks`), also where reading stops early because the main change is known to
    plus or minus `margin`. Each is for the value beyond the evaluation set; those before the last use what is
    known of all items (`workbench.metrics.control_variates`).
    """

    def __init__(
        self,
        setting: Setting,
        reference: Reference,
        neighbours: Neighbours,
        compressed: Compressed,
        counts: tuple[int, ...],
        *,
        progress: Progress,
        compress_seconds: float,
        margin: float | None = None,
        resume: bool = False,
    ) -> None:
        """Find which kernels there are. With `resume`, begin where a point that stopped early did."""
        self.setting, self.reference, self.neighbours = setting, reference, neighbours
        self.compressed, self.counts, self.progress, self.margin = compressed, counts, progress, margin
        self.compress_seconds = compress_seconds
        self.start = time.perf_counter()
        begun = neighbours.begun.get(setting.context.key(compressed.recipe)) if resume else None
        self.scores: list[Scores] = [] if begun is None else [begun.scores]
        self.earlier = None if begun is None else begun.divergences
        self.outputs = setting.evaluator.outputs()
        self.last: Measurement | None = None  # the last look
        self.level = setting.statistics.once(
            ("joint level", counts, setting.confidence), lambda: joint_level(counts, setting.confidence)
        )
        self.neighbour = neighbours.nearest(compressed.recipe)
        self.plan = plan(compressed, setting.device.type, setting.runtime)

    @cached_property
    def sizes(self) -> Sizes:
        """Return the sizes by counting, which takes milliseconds of Python: while a GPU evaluates, where
        there is one.
        """
        return counted_sizes(self.compressed.model, self.compressed.layers)

    def looks(self) -> Iterator[Measurement]:
        """Iterate over the looks, until one knows enough or all items are read.

        None has latency or memory yet.
        """
        for count in self.counts:
            self.last = self.look(count)
            yield self.last
            if self.last.known_to(self.margin):
                return

    def known(self) -> ControlVariates | None:
        """Return the control variates of all evaluation items; None until the dense model has read them."""
        dense = self.reference.all_scores()
        return None if dense is None else ControlVariates(dense, self.neighbour)

    def look(self, count: int) -> Measurement:
        """Return the measurement after the first `count` evaluation items, without latency."""
        setting = self.setting
        dense = self.reference.scores(count, self.progress)
        mine = setting.evaluator.scores(
            self.compressed.model,
            self.scores,
            count,
            self.progress,
            self.outputs,
            meanwhile=lambda: self.sizes,
        )
        task = setting.task
        return Measurement(
            key=setting.context.key(self.compressed.recipe),
            recipe=self.compressed.recipe,
            context=setting.context,
            quality=quality(
                task.kind.primary,
                dense,
                mine,
                setting.confidence,
                len(self.counts),
                level=self.level,
                known=self.known(),
            ),
            flips=flips(
                dense, mine, setting.confidence, len(self.counts), level=self.level, by=task.kind.flips_by
            ),
            items=count,
            items_total=len(setting.evaluation),
            sizes=self.sizes,
            dense_sizes=setting.dense_sizes(),
            layers=self.compressed.report,
            provenance=Provenance(
                setting.statistics.once("versions", versions),
                setting.statistics.once("git revision", git_revision),
                now(),
                self.compress_seconds,
                time.perf_counter() - self.start,
                len(task.calibration),
                len(task.training),
            ),
            kernels=self.plan.kernels,
            no_kernel=self.plan.no_kernel,
            warnings=(*task.notes, *self.compressed.warnings, *setting.evaluator.slower()),
            curve=self.compressed.curve,
            held_out=self.compressed.looks,
            lost_classes=lost_classes(task.labels, setting.evaluation.labels[:count], dense, mine),
            coverage=self.compressed.coverage,
        )

    def finish(self) -> Measurement:
        """Return the last look made complete: packed sizes, divergence, latency, memory.

        Quality that has been read survives a failing timer.
        """
        setting, kind, missing = self.setting, self.setting.task.kind, dict[str, str]()
        assert self.last is not None  # noqa: S101  for the type checker: `looks` comes first
        packed = sizes(self.compressed.model, self.compressed.layers)  # not only counted
        point = self.with_divergence(self.remembered(dataclasses.replace(self.last, sizes=packed)), missing)
        if kind.flips_by is None:
            missing[CHANGED] = f"answers of {kind.name} cannot be told apart"
        dense, items = setting.task.model, setting.latency_items
        if reason := untimed(dense):
            cache = attempt("KV cache", missing, self.cache) if kind.kv_cache else None
            return dataclasses.replace(
                point, cache=cache, missing={**missing, "latency": reason, "peak memory": reason}, kernels=()
            )
        self.progress("prepare", 0, 1)
        run = realise(
            self.compressed,
            setting.device.type,
            setting.runtime,
            dense=dense,
            kind=kind,
            items=items,
            once=setting.statistics.once,
        )
        latency = attempt(
            "latency",
            missing,
            lambda: measure_latency(kind, run.dense, run.model, items, progress=self.progress),
        )
        dense_peak = attempt(
            "peak memory",
            missing,
            lambda: setting.statistics.once("dense peak", lambda: peak_memory_bytes(kind, dense, items)),
        )
        peak = attempt("peak memory", missing, lambda: peak_memory_bytes(kind, run.held, items))
        cache = attempt("KV cache", missing, self.cache) if kind.kv_cache else None
        warnings = (*point.warnings, *run.warnings)
        return dataclasses.replace(
            point,
            latency=latency,
            peak_memory_bytes=peak,
            dense_peak_memory_bytes=dense_peak,
            cache=cache,
            missing=missing,
            kernels=run.kernels,
            warnings=warnings,
        )

    def remembered(self, point: Measurement) -> Measurement:
        """Keep the scores of single items, for recipes near this one or to go on where it stopped.

        Return the point, saying why it stopped.
        """
        if point.items == point.items_total:
            self.neighbours.keep(point.recipe, self.scores[0])
            return point
        self.neighbours.begin(point.key, self.scores[0])
        return dataclasses.replace(point, margin=self.margin)

    def with_divergence(self, point: Measurement, missing: dict[str, str]) -> Measurement:
        """Return the point with its KL divergence from the dense model, where its kind has one."""
        outputs, self.outputs = self.outputs, None
        if outputs is None:
            missing[WHAT] = f"{self.setting.task.kind.name} gives no answer a distribution of probabilities"
            return point
        kl = attempt(WHAT, missing, lambda: self.divergence(outputs, point.items, missing))
        if kl is not None and point.items < point.items_total:
            self.neighbours.begin(point.key, self.scores[0], kl.each)
        return (
            point
            if kl is None
            else dataclasses.replace(point, kl=kl.kl, kl_items=kl.items, kl_answers=kl.answers)
        )

    def divergence(self, outputs: Outputs, count: int, missing: dict[str, str]) -> Divergence | None:
        """Return the KL divergence of what the model said, None with the reason in `missing` where too little
        of it is kept.
        """
        setting = self.setting
        try:
            return divergence(
                setting.evaluator,
                self.reference,
                self.compressed.model,
                outputs,
                count,
                level=self.level,
                same=not len(self.compressed.recipe),
                earlier=self.earlier,
                progress=self.progress,
            )
        except DataError as error:
            missing[WHAT] = str(error)
            return None

    def cache(self) -> CacheBytes:
        """Return the bytes that both models keep of the tokens of one window."""
        setting, window = self.setting, self.setting.evaluation[:1]
        dense = setting.statistics.once("dense cache", lambda: cache_bytes(setting.task.model, window))
        return CacheBytes(context_of(window), dense, cache_bytes(self.compressed.model, window))


def attempt(what: str, missing: dict[str, str], measure: Callable[[], T]) -> T | None:
    """Return `measure()`, or None with the reason noted in `missing` where this device or version cannot (out
    of memory, no profiler).
    """
    try:
        return measure()
    except (
        RuntimeError,
        MemoryError,
        AttributeError,
    ) as error:  # torch's own errors are RuntimeErrors; `Cancelled` goes on
        missing[what] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return None
