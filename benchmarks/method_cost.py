"""What each method costs on a Llama of a given size: what is computed once per model, then each move of its
slider, in milliseconds.

    python benchmarks/method_cost.py --shape 135m --device cuda --out benchmarks/results/method-cost-135m.json

Weights, tokens and so second moments are random: times depend on shapes, not on values. A move is `compress`
with what was computed once, without measuring anything; `once` is the first move of its kind, second moments
already there. Peak memory is the model, its second moments, the compressed copy and what this method keeps
and needs; what other methods keep is dropped.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from shapes import SHAPES, random_task

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.tasks.base import Task
from workbench.util.device import describe, pick
from workbench.util.environment import versions


def moves(count: int) -> dict[str, list[wb.Recipe]]:
    """Return recipes by what they cost; each list holds one method at several positions of its slider."""
    sparse = [0.4 + 0.02 * i for i in range(count)]
    ranks = [0.2 + 0.02 * i for i in range(count)]
    pruned = wb.Prune(sparsity=0.5, pattern="2:4")
    recipes = {
        f"prune {criterion}": [wb.Recipe(wb.Prune(sparsity=s, criterion=criterion)) for s in sparse]
        for criterion in ("magnitude", "wanda", "sparsegpt", "taylor", "fisher", "random")
    }
    recipes |= {
        f"prune magnitude {how}": [wb.Recipe(wb.Prune(sparsity=s, allocation=how)) for s in sparse]
        for how in ("global", "sensitivity")
    }
    recipes |= {
        f"prune {pattern}": [wb.Recipe(wb.Prune(sparsity=s, pattern=pattern)) for s in sparse]
        for pattern in ("heads", "neurons", "layers")
    }
    return recipes | {
        "prune magnitude 2:4": [wb.Recipe(pruned)] * 3,
        "prune sparsegpt 2:4": [wb.Recipe(wb.Prune(sparsity=0.5, pattern="2:4", criterion="sparsegpt"))] * 3,
        "low rank svd": [wb.Recipe(wb.LowRank(rank_ratio=ratio, factorization="svd")) for ratio in ranks],
        "low rank whitened": [wb.Recipe(wb.LowRank(rank_ratio=ratio)) for ratio in ranks],
        "low rank whitened, by energy": [
            wb.Recipe(wb.LowRank(rank_ratio=ratio, rank_allocation="energy")) for ratio in ranks
        ],
        "2:4 + repair": [wb.Recipe(pruned, wb.Repair(repair_ratio=0.02 + 0.01 * i)) for i in range(3)],
        "quantize g64": [wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64)) for bits in (4, 3, 5, 6)],
        "quantize rows": [wb.Recipe(wb.Quantize(weight_bits=bits)) for bits in (4, 3, 5, 6)],
        "quantize g64, gptq": [
            wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64, rounding="gptq")) for bits in (4, 3, 5)
        ],
        "quantize g64, no search": [
            wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64, scale_search=False))
            for bits in (4, 3, 5, 6)
        ],
    }


def timed(task: Task, recipe: wb.Recipe, kept: Statistics, device: torch.device) -> float:
    """Return the milliseconds that one compression takes."""
    start = time.perf_counter()
    compress(task, recipe, kept, shared=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def page(result: dict) -> str:
    """Return the figures as a page."""
    about = (
        f"{result['device']}, {result['date'][:10]}, torch {result['versions']['torch']}, transformers"
        f" {result['versions']['transformers']}; `{result['command']}`."
    )
    lines = [
        f"# What each method costs on a Llama of {result['shape']}",
        "",
        about,
        "",
        (
            "`once` is the first use of a method after the second moments are there, `a move` the median of"
            " the next positions of its slider; both with everything that `compress` does (copy, check,"
            " report), without measuring. Peak memory is the model, its second moments, the compressed copy"
            " and what this method keeps and needs."
        ),
        "",
        "| method | once, ms | a move, ms | peak memory, times the model |",
        "|---" * 4 + "|",
    ]
    for name, cost in result["costs"].items():
        lines.append(
            f"| {name} | {cost['failed']} | | |"
            if "failed" in cost
            else (
                f"| {name} | {cost['once_ms']} | {cost.get('move_ms', '')} |"
                f" {cost.get('peak_of_model', '')} |"
            )
        )
    return "\n".join(
        [
            *lines,
            *(["", result["note"][0].upper() + result["note"][1:] + "."] if "note" in result else []),
            "",
        ]
    )


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--device")
    parser.add_argument("--moves", type=int, default=4)
    parser.add_argument(
        "--only", default="", help="run only the methods whose name matches this regular expression"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick(options.device)
    task = random_task(options.shape, device, 256, 2)
    kept = Statistics(task)
    start = time.perf_counter()
    kept.moments()
    timed(task, wb.Recipe(wb.Prune(sparsity=0.5)), kept, device)
    costs: dict[str, dict[str, object]] = {
        "second moments": {"once_ms": round(1000 * (time.perf_counter() - start), 1)}
    }
    size = sum({p.data_ptr(): p.nbytes for p in task.model.parameters()}.values())
    if device.type == "cuda":
        costs["second moments"]["peak_of_model"] = round(torch.cuda.max_memory_allocated() / size, 2)
    for name, recipes in moves(options.moves).items():
        if not re.search(options.only, name):
            continue
        kept.kept.keep_only("second moments")  # what another method has kept is not this one's memory
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            times = [timed(task, recipe, kept, device) for recipe in recipes]
        except (RuntimeError, wb.errors.WorkbenchError) as error:
            costs[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(name, costs[name], flush=True)
            continue
        costs[name] = {"once_ms": round(times[0], 1), "move_ms": round(statistics.median(times[1:]), 1)}
        if device.type == "cuda":
            costs[name]["peak_of_model"] = round(torch.cuda.max_memory_allocated() / size, 2)
        print(name, costs[name], flush=True)
    result = {
        "shape": options.shape,
        "device": describe(device),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "model_bytes": size,
        "costs": costs,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
