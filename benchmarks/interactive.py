"""From a changed slider to a measured answer, against doing the same naively, in one run.

    python benchmarks/interactive.py --model fashion-vit --moves 12 --out benchmarks/results/interactive-<device>.json

A move changes one slider on a warm bench (dense scores and statistics are there, as after the first move in a session). The
naive way is what a script does: load the model and data, compress, evaluate all items of dense and compressed. Both run in
turn, and ratios are medians over pairs.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import workbench as wb
from workbench.compress import compress
from workbench.device import describe, pick
from workbench.tasks import score
from workbench.versions import versions
from workbench.zoo import load_task


def moves(count: int) -> list[wb.Recipe]:
    """Return `count` different recipes, each one slider away from a common one."""
    made = [wb.Recipe(wb.Prune(sparsity=0.3 + 0.01 * i), wb.Quantize(weight_bits=4)) for i in range(count)]
    made += [wb.Recipe(wb.Quantize(weight_bits=bits)) for bits in (2, 3, 4, 5, 6, 7, 8)]
    made += [wb.Recipe(wb.LowRank(rank_ratio=0.2 + 0.02 * i), wb.Quantize(weight_bits=4)) for i in range(count)]
    return made


def warm(bench: wb.Bench, recipe: wb.Recipe) -> dict[str, float]:
    """Return seconds from the move to the first look, to all items, and to the complete point with latency and memory."""
    start = time.perf_counter()
    seen = {}
    for point in bench.stream(recipe, again=True):
        seen[point.items] = time.perf_counter() - start
        if point.items == point.items_total:
            seen["evaluated"] = point.provenance.compress_seconds + point.provenance.evaluate_seconds
    return {"first_look_s": seen[16], "all_items_s": seen["evaluated"], "complete_s": max(seen.values())}


def naive(model: str, device: str, recipe: wb.Recipe) -> float:
    """Return seconds of loading, compressing and evaluating everything from nothing."""
    start = time.perf_counter()
    task = load_task(model, device=device, offline=True, progress=False)
    compressed = compress(task, recipe)
    for batch in task.evaluation.batches(task.batch_size):
        score(task.kind, task.model, batch)
        score(task.kind, compressed.model, batch)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def import_seconds() -> dict[str, float]:
    """Return median seconds of importing torch alone, and torch with workbench, in fresh processes."""
    found: dict[str, list[float]] = {"torch": [], "torch, workbench": []}
    for _ in range(5):
        for names, times in found.items():
            code = f"import time; s = time.perf_counter(); import {names}; print(time.perf_counter() - s); import torch; assert not torch.cuda.is_initialized()"
            times.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout))
    return {names: statistics.median(times) for names, times in found.items()}


def main() -> None:
    """Run, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-vit")
    parser.add_argument("--device")
    parser.add_argument("--moves", type=int, default=12)
    parser.add_argument("--imports", action="store_true", help="also time importing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick(options.device)
    with tempfile.TemporaryDirectory() as folder:
        bench = wb.Bench(options.model, device=str(device), ledger=f"{folder}/points.journal", offline=True, progress=False)
        warm(bench, wb.Recipe(wb.LowRank(rank_ratio=0.5), wb.Quantize(weight_bits=4)))
        rows = [(str(recipe), warm(bench, recipe), naive(options.model, str(device), recipe)) for recipe in moves(options.moves)]
    result = {
        "what": "seconds from a changed slider to a measured answer; medians over moves",
        "command": "python " + " ".join(sys.argv),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(device),
        "versions": versions(),
        "model": options.model,
        "items": len(bench.evaluation),
        "moves": len(rows),
        "first_look_s": statistics.median(row["first_look_s"] for _, row, _ in rows),
        "first_look_s_p95": sorted(row["first_look_s"] for _, row, _ in rows)[int(0.95 * (len(rows) - 1))],
        "all_items_s": statistics.median(row["all_items_s"] for _, row, _ in rows),
        "complete_with_latency_and_memory_s": statistics.median(row["complete_s"] for _, row, _ in rows),
        "naive_s": statistics.median(spent for _, _, spent in rows),
        "naive_over_first_look": statistics.median(spent / row["first_look_s"] for _, row, spent in rows),
        "naive_over_all_items": statistics.median(spent / row["all_items_s"] for _, row, spent in rows),
    }
    if options.imports:
        result["import_s"] = import_seconds()
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
