"""A language model at 50% sparsity and 4 bits, distilled for a stated budget: perplexity before and after,
steps a second, share of the device's arithmetic.

    python benchmarks/distillation_lm.py smollm2-135m --device cuda --steps 200 --out
        benchmarks/results/distillation-smollm2-135m-gpu.json

The share of the arithmetic is that of the products of weights and of attention (one forward pass of the
teacher, one forward and two backward of the student) at the rate that a large product reaches on this device.
Steps are timed one by one, from the end of one to the end of the next; those with a look at held-out windows
between are left out of the median. Writes JSON after each training, and the same as a page (.md).
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from arithmetic import flop
from evaluation import matmul_rate

import workbench as wb
from workbench.util.device import describe
from workbench.util.environment import versions
from workbench.util.progress import Training


class Watch:
    """Notes when each training step ended, and after which there was a look."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.looks: set[int] = set()

    def step(self, curve: Any, _steps: int) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) % 20 == 0:
            print(f"step {len(self.ends)}, loss {curve[-1][1]:.4f}", flush=True)

    def look(self, looks: Any) -> None:
        self.looks.add(len(self.ends))
        print(
            f"look at step {looks[-1].step}: {looks[-1].metric} {looks[-1].value:.3f} (dense"
            f" {looks[-1].dense:.3f})",
            flush=True,
        )

    def seconds(self) -> float:
        """Return the median seconds of a step, the first five left out."""
        return statistics.median(
            after - before
            for place, (before, after) in enumerate(zip(self.ends, self.ends[1:], strict=False), 1)
            if place > 5 and place not in self.looks
        )


def measured(bench: wb.Bench, recipe: wb.Recipe, watch: Watch | None = None) -> dict[str, Any]:
    """Return the figures of one recipe."""
    start = time.perf_counter()
    *_, point = bench.stream(
        recipe, training=None if watch is None else Training(watch.step, looked=watch.look)
    )
    main, kl = point.primary, point.kl
    return {
        "recipe": repr(point.recipe),
        "metric": main.metric,
        "value": [main.compressed.value, main.compressed.low, main.compressed.high],
        "dense": main.dense.value,
        "change": [main.change.value, main.change.low, main.change.high],
        "kl": None if kl is None else [kl.value, kl.low, kl.high],
        "items": main.items,
        "seconds": round(time.perf_counter() - start, 1),
        "compress_seconds": round(point.provenance.compress_seconds, 1),
        "warnings": list(point.warnings),
    }


def page(result: dict[str, Any]) -> str:
    """Return the figures as a page."""
    about = (
        f"{result['device']}, {result['date'][:10]}, torch {result['versions']['torch']}, transformers"
        f" {result['versions']['transformers']}; `{result['command']}`."
    )
    lines = [
        f"# Distillation of {result['model']} at 50% and 4 bits",
        "",
        about + (f" {result['note']}" if result["note"] else ""),
        "",
        f"{result['rows'][0]['items']} windows of {result['context']} tokens of {result['data']}, trained on"
        f" {result['training']} others; the teacher is the dense model, its answers "
        + ("kept." if result["cached"] else "computed in each step."),
        "",
        "| | perplexity [95%] | change | KL to dense, nats a token | seconds, all |",
        "|---" * 5 + "|",
        f"| dense | {result['rows'][0]['dense']:.2f} | | 0 | |",
    ]
    for row in result["rows"]:
        value, change, kl = (
            "" if part is None else f"{part[0]:.2f} [{part[1]:.2f}, {part[2]:.2f}]"
            for part in (row["value"], row["change"], row["kl"])
        )
        lines.append(f"| {row['name']} | {value} | {change} | {kl} | {row['seconds']} |")
    speeds = [row for row in result["rows"] if "step_ms" in row]
    lines += (
        [
            "",
            f"A step of {result['batch']} windows ({result['batch'] * result['context']:,} tokens): "
            + "; ".join(
                f"{row['step_ms']} ms, {row['steps_a_second']} a second, {row['share_of_peak']:.0%} of"
                f" {result['rate_tflops']} TFLOP/s"
                for row in speeds
            )
            + ".",
        ]
        if speeds
        else []
    )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--training", type=int, default=512, help="windows to train on")
    parser.add_argument("--items", type=int, default=64, help="windows to evaluate on")
    parser.add_argument("--context", type=int)
    parser.add_argument("--precision", choices=["model", "mixed"], default="mixed")
    parser.add_argument("--cache", type=int, default=0, help="MB for the teacher's answers")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = wb.Bench(
            options.model,
            device=options.device,
            evaluation_items=options.items,
            training_items=options.training,
            context_length=options.context,
            ledger=f"{folder}/points.journal",
            progress=False,
        )
        context = bench.evaluation.inputs["input_ids"].shape[1]
        rate = matmul_rate(bench.device, torch.bfloat16 if bench.device.type == "cuda" else torch.float32)
        step_flop = flop(bench.task, bench.evaluation[:1]) * options.batch * (3 if options.cache else 4)
        result = {
            "model": options.model,
            "device": describe(bench.device),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "command": "python " + shlex.join(sys.argv),
            "note": options.note,
            "data": bench.task.data_name,
            "training": len(bench.task.training),
            "context": context,
            "batch": options.batch,
            "cached": bool(options.cache),
            "rate_tflops": round(rate / 1e12, 1),
            "step_tflop": round(step_flop / 1e12, 3),
            "rows": [],
        }
        base = wb.Prune(sparsity=0.5, criterion="wanda"), wb.Quantize(weight_bits=4, group_size=64)

        def add(name: str, row: dict[str, Any]) -> None:
            result["rows"].append({"name": name} | row)
            print(name, row, flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(page(result))

        add("50% + W4, groups of 64", measured(bench, wb.Recipe(*base)))
        for seed in range(options.seeds):
            watch = Watch()
            step = wb.Distill(
                temperature=2.0,
                steps=options.steps,
                distill_batch=options.batch,
                learning_rate=options.rate,
                train_precision=options.precision,
                teacher_cache_mb=options.cache,
                seed=seed,
            )
            row = measured(bench, wb.Recipe(*base, step), watch)
            each = watch.seconds()
            add(
                f"and distilled for {options.steps} steps of {options.batch} windows, seed {seed}",
                row
                | {
                    "step_ms": round(1000 * each, 1),
                    "steps_a_second": round(1 / each, 2),
                    "share_of_peak": round(step_flop / rate / each, 4),
                },
            )


if __name__ == "__main__":
    main()
