"""How cost grows: with parameters, evaluation items, layers that changed, and points in the ledger."""

from __future__ import annotations

import dataclasses
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import workbench as wb
from benchmarks.suite.record import Options, Record, synchronise
from workbench.ledger.pareto import tradeoff
from workbench.measure.measurement import Measurement
from workbench.metrics.estimate import Estimate
from workbench.tasks.base import Task

WHAT = (
    "milliseconds (medians) against what grows: parameters, evaluation items, layers that a recipe changes,"
    " points in the ledger"
)
ROUNDS = 4


def took(work: Callable[[], Any]) -> float:
    """Return the milliseconds that `work` takes."""
    start = time.perf_counter()
    work()
    return round(1000 * (time.perf_counter() - start), 2)


def move(task: Task, recipes: list[wb.Recipe]) -> dict[str, float]:
    """Return medians of a warm bench: to the compressed model, to the first look, to the whole set.

    The first recipe warms up.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = wb.Bench(task, ledger=f"{folder}/points.journal", progress=False)
        moves: list[dict[str, float]] = []
        for recipe in recipes:
            start, seen = time.perf_counter(), dict[str, float]()
            for point in bench.stream(recipe, again=True):
                synchronise(bench.device)
                seen.setdefault("first_ms", 1000 * (time.perf_counter() - start))
                if point.items == point.items_total:
                    seen["compress_ms"] = 1000 * point.provenance.compress_seconds
                    seen["all_ms"] = 1000 * (
                        point.provenance.compress_seconds + point.provenance.evaluate_seconds
                    )
                    break
            moves.append(seen)
    return {name: round(statistics.median(row[name] for row in moves[1:]), 2) for name in moves[0]}


def sparsities(count: int, **options: Any) -> list[wb.Recipe]:
    """Return so many positions of the sparsity slider."""
    return [wb.Recipe(wb.Prune(sparsity=0.3 + 0.02 * i, **options)) for i in range(count)]


def parameters(options: Options, record: Record) -> None:
    """Toy Llamas of four layers each and several widths."""
    for shape in options.shapes:
        if record.late(options, shape):
            return
        task = dataclasses.replace(options, context=32, windows=32).task(shape)
        record.add(
            grows="parameters",
            name=shape,
            size=sum(p.numel() for p in task.model.parameters()),
            **move(task, sparsities(ROUNDS)),
        )


def items(task: Task, options: Options, record: Record) -> None:
    """A quarter, half and all of a model's evaluation items."""
    for share in (16, 4, 1):
        if record.late(options, f"1/{share} of the items"):
            return
        fewer = dataclasses.replace(task, evaluation=task.evaluation[: len(task.evaluation) // share])
        record.add(
            grows="items", name=task.model_name, size=len(fewer.evaluation), **move(fewer, sparsities(ROUNDS))
        )


def layers(task: Task, options: Options, record: Record) -> None:
    """The last block, the later half of the blocks, all of them."""
    blocks = sorted(
        {
            int(numbered[1])
            for name, _ in task.model.named_modules()
            if (numbered := re.search(r"\.(?:layers?|h)\.(\d+)\.", name))
        }
    )
    chosen = {
        f"last of {len(blocks)} blocks": blocks[-1:],
        f"later half of {len(blocks)} blocks": blocks[len(blocks) // 2 :],
        f"all {len(blocks)} blocks": blocks,
    }
    for name, numbers in chosen.items():
        if not blocks or record.late(options, name):
            return
        targets = tuple(f"*layer*.{number}.*" for number in numbers)
        record.add(
            grows="layers changed",
            name=name,
            size=len(numbers),
            **move(task, sparsities(ROUNDS, targets=targets)),
        )


def filled(path: Path, row: Measurement, points: int) -> None:
    """Write a journal of `points` copies of a measured row under other keys, sparsities, sizes and qualities
    (made up): for timing only."""
    chance = random.Random(1)  # noqa: S311  no secret
    marks = [
        0.123456789,
        1234567891,
        -0.234567891,
        -0.345678912,
        -0.456789123,
    ]  # sparsity, bytes; change, low, high
    quality = dataclasses.replace(row.primary, change=Estimate(*marks[2:]))
    recipe, sizes = (
        wb.Recipe(wb.Prune(sparsity=marks[0])),
        dataclasses.replace(row.sizes, file_bytes=int(marks[1])),
    )
    ledger = wb.Ledger(path)
    ledger.add(dataclasses.replace(row, recipe=recipe, sizes=sizes, quality=(quality, *row.quality[1:])))
    *before, line = path.read_text().splitlines()
    with path.open("w") as file:
        file.writelines(f"{earlier}\n" for earlier in before)
        for index in range(points):
            sparsity = chance.uniform(0.1, 0.95)
            drop = 0.4 * sparsity**4 + chance.gauss(0.01, 0.003)
            values = [
                sparsity,
                round(row.dense_sizes.file_bytes * (1 - 0.7 * sparsity) * chance.uniform(1.0, 1.2)),
                -drop,
                -drop - 0.01,
                -drop + 0.01,
            ]
            copied = line.replace(row.key, f"{index:016x}")
            for mark, value in zip(marks, values, strict=True):
                copied = copied.replace(repr(mark), repr(value))
            file.write(f"{copied}\n")


def ledger(task: Task, options: Options, record: Record) -> None:
    """Ledgers of several sizes."""
    with tempfile.TemporaryDirectory() as folder:
        bench = wb.Bench(task, ledger=f"{folder}/small.journal", progress=False)
        row = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))
        for points in options.ledger_sizes:
            if record.late(options, f"{points} points"):
                return
            path = Path(folder) / f"{points}.journal"
            filled(path, row, points)
            record.add(
                grows="ledger",
                name=task.model_name,
                size=points,
                **ledger_of(bench, path, row),
                journal_bytes=path.stat().st_size,
            )
            path.unlink()


def ledger_of(bench: wb.Bench, path: Path, row: Measurement) -> dict[str, float]:
    """Open a ledger, add points, find the front, make the plot's record, predict.

    `processor` is what the work itself takes where others share the machine.
    """
    times = both("open", lambda: setattr(bench, "ledger", wb.Ledger(path)))
    more = [dataclasses.replace(row, key=f"a{index:015x}") for index in range(ROUNDS)]
    times["add_ms"] = statistics.median(took(partial(bench.ledger.add, point)) for point in more)
    times |= both("pareto", bench.ledger.pareto) | both("record", lambda: tradeoff(bench.ledger.rows()))
    predictor = bench.predictor()
    guesses = [
        took(partial(predictor.predict, wb.Recipe(wb.Prune(sparsity=0.41 + 0.01 * index))))
        for index in range(1 + ROUNDS)
    ]
    return {**times, "first_prediction_ms": guesses[0], "prediction_ms": statistics.median(guesses[1:])}


def both(name: str, work: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds that `work` takes, by the clock and of the processor."""
    start = time.process_time()
    clock = took(work)
    return {f"{name}_ms": clock, f"{name}_processor_ms": round(1000 * (time.process_time() - start), 2)}


def run(target: str, options: Options, record: Record) -> None:
    """Measure all four; parameters on toy Llamas, the rest on the target.

    The ledger comes last: filling it takes longest.
    """
    task = options.task(target)
    items(task, options, record)
    layers(task, options, record)
    parameters(options, record)
    ledger(task, options, record)
