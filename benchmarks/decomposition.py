"""What low rank and repair cost on a Llama of a given size: the decompositions once, then each move, in milliseconds.

    python benchmarks/decomposition.py --shape 135m --device cuda --out benchmarks/results/decomposition-135m.json

Weights, tokens and so second moments are random: times depend on shapes, not on values. A move is `compress` with what was
computed once, without measuring anything; `once` is the first move of its kind, second moments already there.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from moves import SHAPES, random_task

import workbench as wb
from workbench.bench import versions
from workbench.compress import compress
from workbench.device import describe, pick
from workbench.statistics import Statistics


def moves(count: int) -> dict[str, list[wb.Recipe]]:
    """Return recipes by what they cost."""
    ratios = [0.2 + 0.02 * i for i in range(count)]
    pruned = wb.Prune(sparsity=0.5, pattern="2:4")
    return {
        "svd": [wb.Recipe(wb.LowRank(rank_ratio=ratio, factorization="svd")) for ratio in ratios],
        "whitened": [wb.Recipe(wb.LowRank(rank_ratio=ratio)) for ratio in ratios],
        "whitened, by energy": [wb.Recipe(wb.LowRank(rank_ratio=ratio, rank_allocation="energy")) for ratio in ratios],
        "2:4 alone": [wb.Recipe(pruned)] * 3,
        "2:4 + repair": [wb.Recipe(pruned, wb.Repair(repair_ratio=0.02 + 0.01 * i)) for i in range(3)],
    }


def timed(task, recipe, kept, device) -> float:
    start = time.perf_counter()
    compress(task, recipe, kept, shared=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--device")
    parser.add_argument("--moves", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick(options.device)
    task = random_task(options.shape, device, 256, 2)
    kept = Statistics(task)
    start = time.perf_counter()
    kept.moments()
    timed(task, wb.Recipe(wb.Prune(sparsity=0.5)), kept, device)
    found = {"second moments": {"once_ms": round(1000 * (time.perf_counter() - start), 1)}}
    size = sum(p.nbytes for p in task.model.parameters())
    for name, recipes in moves(options.moves).items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [timed(task, recipe, kept, device) for recipe in recipes]
        found[name] = {"once_ms": round(times[0], 1), "move_ms": round(statistics.median(times[1:]), 1)}
        if device.type == "cuda":
            found[name]["peak_of_model"] = round(torch.cuda.max_memory_allocated() / size, 2)
        print(name, found[name], flush=True)
    result = {"shape": options.shape, "device": describe(device), "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "command": " ".join(sys.argv),
              "versions": versions(), "model_bytes": size, "costs": found}  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
