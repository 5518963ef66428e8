"""What one kernel for each norm, gated product and rotary embedding gains when evaluation items are read.

    python benchmarks/fused_blocks.py --shapes 1.1b 6.7b --out benchmarks/results/fused-blocks.json

Llamas with random weights and tokens, bfloat16 on a GPU: times depend on shapes, not on values. Scored is a
model pruned to half everywhere, so that no block is the dense model's own. Passes with and without fused
blocks are read in turn in one run, each pair in the other order than the one before it; a time is a median,
a ratio the median over pairs. `stepwise` runs each kernel from Python, `graph` replays one CUDA graph, as the
evaluator does where the model is small enough. Peak memory is what one pass takes beyond what was there.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, random_task
from torch import nn

import workbench as wb
from workbench.compress import compress
from workbench.measure.evaluation.cuda_graphs import Graphs
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.measure.evaluation.fused_blocks import FusedBlocks
from workbench.metrics.scores import Scores
from workbench.tasks.base import Task
from workbench.util.device import describe, pick
from workbench.util.environment import versions

NEEDED = 1.1  # times as fast, below which fused blocks do not pay for their risk


def one_pass(evaluator: Evaluator, model: nn.Module, windows: int) -> tuple[float, int, Scores]:
    """Return (milliseconds, peak bytes beyond what was there, scores) of reading all windows once."""
    on_gpu, before = evaluator.items.labels.is_cuda, 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    scores = evaluator.scores(model, [], windows)
    if on_gpu:
        torch.cuda.synchronize()
    spent = 1000 * (time.perf_counter() - start)
    return spent, torch.cuda.max_memory_allocated() - before if on_gpu else 0, scores


def why_not_fused(evaluator: Evaluator) -> str:
    """Return why an evaluator's blocks are not fused, "" if all that was tried is."""
    if not isinstance(evaluator.fused, FusedBlocks):
        return "no kernels on this device"
    refused = [reason for reason in evaluator.fused.refused.values() if reason]
    return "; ".join([*refused, *evaluator.fused.failed.values()])


def compared(
    task: Task, model: nn.Module, device: torch.device, rounds: int, *, graphs: bool
) -> dict[str, Any]:
    """Return milliseconds, peak bytes and answers of passes with and without fused blocks, read in turn."""
    items, windows = task.evaluation.to(device), len(task.evaluation)
    readers = {
        "fused": Evaluator(task, items, 0, graphs=graphs),
        "plain": Evaluator(task, items, 0, graphs=graphs, fused=False),
    }
    first = {name: one_pass(reader, model, windows) for name, reader in readers.items()}
    for reader in readers.values():  # a second pass, in which nothing is tried, compiled or captured any more
        one_pass(reader, model, windows)
    refused = [reader.graphs.refused for reader in readers.values() if isinstance(reader.graphs, Graphs)]
    if graphs and (any(refused) or len(refused) < len(readers)):
        return {"not_measured": next(filter(None, refused), "CUDA graphs need a CUDA GPU")}
    times: dict[str, list[float]] = {name: [] for name in readers}
    peaks = dict.fromkeys(readers, 0)
    for turn in range(rounds):
        for name in sorted(readers, reverse=bool(turn % 2)):
            spent, peak, _ = one_pass(readers[name], model, windows)
            times[name].append(spent)
            peaks[name] = max(peaks[name], peak)
    ratio = statistics.median(
        plain / fused for fused, plain in zip(times["fused"], times["plain"], strict=True)
    )
    fused, plain = (first[name][2] for name in ("fused", "plain"))
    return {
        "not_fused": why_not_fused(readers["fused"]),
        "first_ms": {name: round(cost[0], 1) for name, cost in first.items()},
        "ms": {name: round(statistics.median(spans), 2) for name, spans in times.items()},
        "all_ms": {name: [round(span, 2) for span in spans] for name, spans in times.items()},
        "times_as_fast": round(ratio, 4),
        "saved": round(1 - 1 / ratio, 4),
        "peak_bytes": peaks,
        "largest_difference_of_a_loss": float(f"{(fused.loss / plain.loss - 1).abs().max():.2g}"),
        "same_answers": round(float((fused.answers == plain.answers).double().mean()), 5),
    }


def rows_of(shape: str, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of one shape, stepwise and by graph; its memory is free afterwards."""
    task = random_task(shape, device, options.context, options.windows)
    recipe = wb.Recipe(wb.Prune(sparsity=0.5, criterion="magnitude"))
    model = compress(task, recipe, shared=True).model
    rows = []
    for way in ("stepwise", "graph"):
        cost = compared(task, model, device, options.rounds, graphs=way == "graph")
        rows.append({"shape": shape, "way": way, **cost})
        print(line(rows[-1]), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


COLUMNS = (
    "shape",
    "way",
    "fused, ms",
    "plain, ms",
    "plain / fused",
    "saved",
    "peak fused, MiB",
    "peak plain, MiB",
    "first pass fused / plain, ms",
    "largest difference of a loss",
    "not fused",
)


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if "not_measured" in row:
        return f"| {row['shape']} | {row['way']} | not measured: {row['not_measured']} |" + " |" * 8
    ms, first, peak = row["ms"], row["first_ms"], row["peak_bytes"]
    cells = [
        row["shape"],
        row["way"],
        ms["fused"],
        ms["plain"],
        f"{row['times_as_fast']:.3f}",
        f"{row['saved']:.1%}",
        round(peak["fused"] / 2**20),
        round(peak["plain"] / 2**20),
        f"{first['fused']} / {first['plain']}",
        row["largest_difference_of_a_loss"],
        row["not_fused"] or "",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def verdict(rows: list[dict[str, Any]]) -> str:
    """Return whether every measured row gains enough, in words."""
    measured = [row for row in rows if "times_as_fast" in row]
    if any(row["not_fused"] for row in measured):
        return "No verdict: blocks are not fused here."
    least = min(row["times_as_fast"] for row in measured)
    return f"Least gain: {least:.3f} times as fast; {'kept' if least >= NEEDED else 'deleted'} at {NEEDED}."


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1.1b", "6.7b"])
    parser.add_argument("--device")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick(options.device)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    rows = [row for shape in options.shapes for row in rows_of(shape, device, options)]
    print(verdict(rows))
    result = {
        "device": describe(device),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "windows": options.windows,
        "context": options.context,
        "rounds": options.rounds,
        "verdict": verdict(rows),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
