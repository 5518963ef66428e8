"""What reading the evaluation items costs on a Llama of a given size, with each of the evaluator's shortcuts,
in milliseconds.

    python benchmarks/evaluation.py --shape 135m --device cuda --out benchmarks/results/evaluation-135m.json

Weights and tokens are random: times depend on shapes, not on values. One model is pruned to half everywhere,
another one in its last quarter of blocks only. `whole` makes all logits of a batch, `fused` reduces them
piece by piece, `graphed` replays one CUDA graph, `from block` starts from the dense model's hidden states.
`once` is the first reading, with what is tried, captured or kept in it; `ms` the median of the next ones. The
floor is the arithmetic (benchmarks/arithmetic.py, as everywhere in the suite) at the rate that a large
product reaches here.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from arithmetic import flop
from shapes import SHAPES, random_task
from torch import nn

import workbench as wb
from workbench.compress import compress
from workbench.measure.evaluation.cuda_graphs import Graphs
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.metrics.scores import Scores
from workbench.tasks import score
from workbench.tasks.base import Task
from workbench.util.device import describe, pick
from workbench.util.environment import versions


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second that a large square product reaches."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [timed(lambda: left @ right, device) for _ in range(6)]
    return 2 * size**3 / min(times[1:]) * 1000


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that some work takes, waiting for the device before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def costs(read: Callable[[], Scores], device: torch.device, repeats: int) -> tuple[dict[str, float], Scores]:
    """Return what reading costs, and the scores.

    Memory is what it takes and keeps beyond what was there before it.
    """
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
    once = timed(read, device)
    times = [timed(read, device) for _ in range(repeats)]
    found = {
        "once_ms": round(once, 1),
        "ms": round(statistics.median(times), 1),
        "least_ms": round(min(times), 1),
    }
    if device.type == "cuda":
        found["peak_beyond_bytes"] = torch.cuda.max_memory_reserved() - before
        torch.cuda.empty_cache()
        found["kept_beyond_bytes"] = torch.cuda.memory_reserved() - before
    return found, read()


def readers(
    task: Task, device: torch.device, everywhere: nn.Module, late: nn.Module
) -> dict[str, Callable[[], Scores]]:
    """Return the ways of reading by name.

    The reference for those that start from a block is named `..., last quarter`.
    """
    items = task.evaluation.to(device)

    def whole() -> Scores:
        return Scores.join([score(task.kind, everywhere, part) for part in items.batches(task.batch_size)])

    fused, graphed, middle = (
        Evaluator(task, items, 0, graphs=False),
        Evaluator(task, items, 0),
        Evaluator(task, items),
    )
    found: dict[str, Callable[[], Scores]] = {
        "whole": whole,
        "fused": lambda: fused.scores(everywhere, [], len(items)),
    }
    if device.type == "cuda":

        def replay() -> Scores:
            made = graphed.scores(everywhere, [], len(items))
            assert isinstance(graphed.graphs, Graphs)
            if graphed.graphs.refused:
                raise RuntimeError(graphed.graphs.refused)
            return made

        found["graphed"] = replay
    return found | {
        "fused, last quarter": lambda: fused.scores(late, [], len(items)),
        "from block, last quarter": lambda: middle.scores(late, [], len(items)),
    }


def page(result: dict) -> str:
    """Return the figures as a page."""
    about = (
        f"{result['device']}, {result['date'][:10]}, torch {result['versions']['torch']}, transformers"
        f" {result['versions']['transformers']}; `{result['command']}`."
    )
    lines = [
        (
            f"# Reading {result['windows']} windows of {result['context']} tokens with a Llama of"
            f" {result['shape']}"
        ),
        "",
        about,
        "",
        (
            f"The products alone take {result['floor_ms']} ms at {result['rate_tflops']} TFLOP/s, what a"
            " large product reaches here."
        ),
        "",
        (
            "| way | once, ms | then, ms | times the floor | memory beyond what was there, MiB | of it kept |"
            " largest difference of a loss |"
        ),
        "|---" * 7 + "|",
    ]
    for name, cost in result["costs"].items():
        if "failed" in cost:
            lines.append(f"| {name} | {cost['failed']} | | | | | |")
            continue
        memory = " | ".join(
            f"{cost[key] / 2**20:.0f}" if key in cost else ""
            for key in ("peak_beyond_bytes", "kept_beyond_bytes")
        )
        lines.append(
            f"| {name} | {cost['once_ms']} | {cost['ms']} | {cost['of_floor']} | {memory} |"
            f" {cost.get('largest_difference', '')} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--device")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick(options.device)
    task = random_task(options.shape, device, options.context, options.windows)
    blocks = SHAPES[options.shape][1]
    first = blocks - max(1, blocks // 4)
    everywhere = compress(task, wb.Recipe(wb.Prune(sparsity=0.5)), shared=True).model
    late = compress(
        task,
        wb.Recipe(wb.Prune(sparsity=0.5, targets=tuple(f"model.layers.{i}.*" for i in range(first, blocks)))),
        shared=True,
    ).model
    rate = matmul_rate(device, next(task.model.parameters()).dtype)
    floor = flop(task, task.evaluation.to(device)) / rate * 1000
    found: dict[str, dict[str, object]] = {}
    reference: dict[str, Scores] = {}
    for name, read in readers(task, device, everywhere, late).items():
        try:
            cost, scores = costs(read, device, options.repeats)
        except (RuntimeError, wb.errors.WorkbenchError) as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(name, found[name], flush=True)
            continue
        part = name.partition(", ")[2]
        exact = reference.setdefault(part, scores)
        share = 1.0 if not part else 1 - first / blocks if name.startswith("from") else 1.0
        found[name] = {
            **cost,
            "of_floor": round(cost["ms"] / floor, 2),
            "largest_difference": float(f"{(scores.loss / exact.loss - 1).abs().max():.2g}"),
            "blocks_share": round(share, 3),
        }
        print(name, found[name], flush=True)
    result = {
        "shape": options.shape,
        "windows": options.windows,
        "context": options.context,
        "device": describe(device),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "rate_tflops": round(rate / 1e12, 3),
        "floor_ms": round(floor, 2),
        "batch": task.batch_size,
        "first_changed_block": first,
        "costs": found,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
