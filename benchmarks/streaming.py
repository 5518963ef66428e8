"""A model that does not fit: from a slider's move to the first look and to all items, streamed or spread and
resident, and the forecast against the truth.

    python benchmarks/streaming.py --shape 1.1b --device cuda --memory-gb 4 --out
        benchmarks/results/streaming-1.1b-cuda.json
    python benchmarks/streaming.py --shape 1.1b --device cuda --spread --out
        benchmarks/results/streaming-spread-1.1b-cuda.json

Weights and tokens are random: times depend on shapes, not on values. The resident bench runs first with all
of the device's memory, then the streamed one with `--memory-gb` of it
(`torch.cuda.set_per_process_memory_fraction`), where it has to be streamed; without `--memory-gb` streaming
is asked for. `--spread` puts it over all GPUs instead. Both benches measure the same recipes, and the quality
must be the same to the bit, for which the resident one leaves its fused kernels: models that are moved about
are run as they are.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from shapes import SHAPES, random_task

import workbench as wb
from workbench.modules.offload import streams_to
from workbench.modules.placement import model_bytes
from workbench.predict.offload_forecast import forecast
from workbench.tasks.base import Task
from workbench.util.device import describe, pick
from workbench.util.environment import versions


def recipes(count: int) -> dict[str, list[wb.Recipe]]:
    """Return recipes by slider, each a new position."""
    return {
        "sparsity": [wb.Recipe(wb.Prune(sparsity=0.3 + 0.1 * i)) for i in range(count)],
        "bits": [
            wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64)) for bits in (4, 3, 5, 6, 7, 8, 2)[:count]
        ],
        "wanda": [wb.Recipe(wb.Prune(sparsity=0.3 + 0.1 * i, criterion="wanda")) for i in range(count)],
    }


def moved(bench: wb.Bench, name: str, recipe: wb.Recipe, again: int) -> tuple[dict[str, object], list[float]]:
    """Return the seconds of one move with what was forecast, and the quality at each look."""
    told = forecast(bench.setting, bench.pace, recipe, bench.setting.first_look)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, times, quality = time.perf_counter(), dict[str, float](), []
    for point in bench.stream(recipe):
        now = round(time.perf_counter() - start, 4)
        times.setdefault("compress_s", round(point.provenance.compress_seconds, 4))
        times.setdefault("first_s", now)
        if point.items == point.items_total:
            times.setdefault("all_s", now)
        times["complete_s"] = now
        quality.append(point.primary.compressed.value)
    placement = (
        "spread" if hasattr(bench.task.model, "spread_over") else "device" if told is None else "streamed"
    )
    row: dict[str, object] = {
        "move": name,
        "recipe": recipe.label(),
        "placement": placement,
        "time": again,
        **times,
    }
    if bench.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    if told is not None:
        row |= {
            "forecast_first_s": round(told.first_seconds, 6),
            "forecast_all_s": round(told.all_seconds, 6),
            "bytes_per_s": round(told.bytes_per_s),
        }
    print(row, flush=True)
    return row, quality


def bench_rows(
    task: Task, device: torch.device, placement: str, count: int
) -> tuple[list[dict[str, object]], list[list[float]]]:
    """Return the moves of one bench and their qualities."""
    rows, qualities = [], []
    with tempfile.TemporaryDirectory() as folder:
        bench = wb.Bench(
            task, device=str(device), placement=placement, ledger=f"{folder}/points.journal", progress=False
        )
        bench.setting.evaluator.fused = False
        if (streams_to(bench.task.model) is None) != (placement in {"device", "spread"}):
            raise SystemExit(
                f"asked for placement={placement!r}, but the model ({model_bytes(task.model):,} bytes) fits:"
                " give a smaller --memory-gb"
            )
        for name, moves in recipes(count).items():
            for again, recipe in enumerate(moves):
                row, quality = moved(bench, name, recipe, again)
                rows.append(row)
                qualities.append(quality)
    return rows, qualities


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--device")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--moves", type=int, default=3)
    parser.add_argument(
        "--memory-gb", type=float, help="of GPU memory that the streamed bench may take, GB; left out: all"
    )
    parser.add_argument("--spread", action="store_true", help="over all GPUs, in the place of streaming")
    parser.add_argument(
        "--only-streamed", action="store_true", help="for a model that no bench could hold resident"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick(options.device)
    task = random_task(options.shape, device, options.context, options.windows)
    task.model.to("cpu")  # benches take it from the host
    size = model_bytes(task.model)
    rows, qualities = ([], []) if options.only_streamed else bench_rows(task, device, "device", options.moves)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if options.memory_gb:
            torch.cuda.set_per_process_memory_fraction(
                options.memory_gb * 1e9 / torch.cuda.get_device_properties(device).total_memory, device
            )
    placement = (
        "spread" if options.spread else "auto" if options.memory_gb and device.type == "cuda" else "streamed"
    )
    more, others = bench_rows(task, device, placement, options.moves)
    result = {
        "part": "streaming",
        "what": (
            "seconds from a slider's move to the first look and to all items, streamed from the host or"
            " spread over GPUs, and resident; random weights"
        ),
        "command": "python " + " ".join(sys.argv),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(device),
        "versions": versions(),
        "target": options.shape,
        "context": options.context,
        "windows": options.windows,
        "model_bytes": size,
        "memory_gb": options.memory_gb,
        "same_bits": None if options.only_streamed else qualities == others,
        "rows": [*rows, *more],
    }
    print("same bits:", result["same_bits"])
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
