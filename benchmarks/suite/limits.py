"""How near the machine's own limits: evaluation against its arithmetic, application against its memory's
bandwidth.

Three shares of what a copy reaches are told of an application. `least`: each weight that changes read once
and written once, over the time that a user waits. `moved`: all that the kernels of
`workbench.kernels.weight_passes` read and write, the check of every promise among it, over the same time.
`busy`: the same over the time that the device computes, without what it waits for Python. The aim is held
against `busy`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import workbench as wb
from benchmarks.arithmetic import flop
from benchmarks.suite.memory import tensors
from benchmarks.suite.record import Options, Record, synchronise
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.kernels import weight_passes
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.runtime.roofline import limits_of
from workbench.tasks.base import Task
from workbench.util.device import pick

WHAT = (
    "evaluation of a model that was just compressed against the arithmetic floor; compression against the"
    " time that copying its bytes takes; medians"
)
FLOORS = {"135m": 3.0, "smollm2-135m": 3.0, "1.1b": 1.4, "6.7b": 1.3}  # aims on an H100: times the floor
BANDWIDTH = 0.6  # aim: of what a copy reaches


def evaluation(task: Task, options: Options, record: Record) -> None:
    """Time the evaluation of the whole set on freshly compressed models."""
    place = pick(options.device)
    items = task.evaluation.to(place)
    evaluator, kept, times = Evaluator(task, items), Statistics(task), list[float]()
    for index in range(options.moves + 1):
        model = compress(task, wb.Recipe(wb.Prune(sparsity=0.3 + 0.02 * index)), kept, shared=True).model
        synchronise(place)
        start = time.perf_counter()
        evaluator.scores(model, [], len(items))
        synchronise(place)
        times.append(time.perf_counter() - start)
        if index and record.spent > options.seconds / 2:
            break
    limits, operations = limits_of(str(place)), flop(task, items)
    bits = 8 * next(task.model.parameters()).dtype.itemsize
    rate = 2 * limits.multiply_adds_per_s[bits]
    spent, floor = statistics.median(times[1:]), operations / rate
    aim = (
        {"aim_times_floor": FLOORS[record.target]} if place.type == "cuda" and record.target in FLOORS else {}
    )
    record.add(
        name="evaluation",
        labels=int((items.labels != -100).sum()),
        ms=round(1000 * spent, 2),
        first_ms=round(1000 * times[0], 2),
        floor_ms=round(1000 * floor, 2),
        times_floor=round(spent / floor, 2),
        tflop=round(operations / 1e12, 4),
        tflop_per_s=round(rate / 1e12, 2),
        **aim,
    )


def moved(dense: nn.Module, model: nn.Module) -> int:
    """Return the least bytes that a compression moves: what it replaced read once, what it wrote written
    once."""
    before = {p.data_ptr(): p.nbytes for p in dense.parameters()}
    after = {p.data_ptr(): p.nbytes for p in model.parameters()}
    written = sum(size for place, size in after.items() if place not in before)
    return written + min(written, sum(size for place, size in before.items() if place not in after))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Give a list that is filled with the bytes of each pass over weights: its tensors are read and its
    results written, the weights of `prune` twice."""
    bytes_read: list[int] = []

    def counting(name: str, run: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **named: object) -> object:
            returned = run(*given, **named)
            twice = given[0] if name == "prune" else ()
            bytes_read.append(
                sum(tensor.nbytes for part in (given, named, returned, twice) for tensor in tensors(part))
            )
            return returned

        return call

    names = ("prune", "prune_rows", "extremes", "search", "to_grid", "survey")
    with mock.patch.multiple(
        weight_passes, **{name: counting(name, getattr(weight_passes, name)) for name in names}
    ):
        yield bytes_read


def busy_seconds(work: Callable[[], object]) -> float:
    """Return how long a GPU computes and copies while `work` is done."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6


def shares(least: int, moved: int, spent: float, busy: float | None, bandwidth: float) -> dict[str, float]:
    """Return the three shares of a copy's bandwidth, those that are known."""
    values = {"of_bandwidth": round(least / spent / bandwidth, 4)}
    if moved:
        values |= {"moved_bytes": moved, "moved_of_bandwidth": round(moved / spent / bandwidth, 4)}
    if moved and busy:
        values |= {"busy_ms": round(1000 * busy, 3), "busy_of_bandwidth": round(moved / busy / bandwidth, 4)}
    return values


def application(task: Task, options: Options, record: Record) -> None:
    """Time `compress` alone for each step, on what was computed once."""
    place = pick(options.device)
    limits, kept = limits_of(str(place)), Statistics(task)
    by_step = {
        "sparsity": [wb.Recipe(wb.Prune(sparsity=0.3 + 0.01 * i)) for i in range(options.moves + 2)],
        "bits": [
            wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64, scale_search=False))
            for bits in (3, 4, 5, 6, 7, 8, 2)[: options.moves + 2]
        ],
        "sparsity + bits": [
            wb.Recipe(
                wb.Prune(sparsity=0.3 + 0.01 * i),
                wb.Quantize(weight_bits=4, group_size=64, scale_search=False),
            )
            for i in range(options.moves + 2)
        ],
        "sparsity, wanda": [
            wb.Recipe(wb.Prune(sparsity=0.3 + 0.01 * i, criterion="wanda")) for i in range(options.moves + 2)
        ],
        "rank, svd": [
            wb.Recipe(wb.LowRank(rank_ratio=0.2 + 0.01 * i, factorization="svd"))
            for i in range(options.moves + 2)
        ],
    }
    for name, recipes in by_step.items():
        if record.late(options, name):
            return
        times, least = list[float](), 0
        for recipe in recipes:
            synchronise(place)
            start = time.perf_counter()
            compressed = compress(task, recipe, kept, shared=True)
            synchronise(place)
            times.append(time.perf_counter() - start)
            least = moved(task.model, compressed.model)
            del compressed
        spent = statistics.median(times[2:] or times)
        with counted() as bytes_of_passes:
            compress(task, recipes[-2], kept, shared=True)
        busy = (
            busy_seconds(lambda recipe=recipes[-3]: compress(task, recipe, kept, shared=True))
            if place.type == "cuda"
            else None
        )
        record.add(
            name=f"apply {name}",
            ms=round(1000 * spent, 2),
            first_ms=round(1000 * times[0], 2),
            least_bytes=least,
            gb_per_s=round(least / spent / 1e9, 1),
            **shares(least, sum(bytes_of_passes), spent, busy, limits.bytes_per_s),
            copy_gb_per_s=round(limits.bytes_per_s / 1e9, 1),
            aim_of_bandwidth=BANDWIDTH,
        )


def run(target: str, options: Options, record: Record) -> None:
    """Measure both on one model."""
    task = options.task(target)
    record.settings |= {"items": len(task.evaluation), "dtype": str(next(task.model.parameters()).dtype)}
    evaluation(task, options, record)
    application(task, options, record)
