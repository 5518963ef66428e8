"""What removed structure really saves: parameters, bytes, measured latency and quality at 25, 50 and 75%.

    python benchmarks/structure.py --out benchmarks/results/structure-cpu
    python benchmarks/structure.py --models llama-1.1b --device cuda --out benchmarks/results/structure-1.1b

Writes a .json with every figure and a .md with the table. `fashion-cnn` and `fashion-vit` have real weights,
so quality is measured too, paired with the dense model, with and without least-squares reconstruction; the
Llamas have random weights and tokens, so that only sizes and times mean something. Latency is interleaved
with the dense model's in one run; `expected` is what it would be if time went with multiply-adds.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from shapes import random_task

import workbench as wb
from workbench.compress import Compressed, compress
from workbench.measure.latency import Latency, measure_latency
from workbench.measure.size import counted_sizes
from workbench.predict.predictor import positions
from workbench.shapes.outline import Outline
from workbench.util.device import describe, pick
from workbench.util.environment import versions

PATTERNS = {
    "fashion-cnn": ("channels",),
    "fashion-vit": ("heads", "neurons", "layers"),
    "llama-135m": ("heads", "neurons", "layers"),
    "llama-1.1b": ("heads", "neurons", "layers"),
}
SPARSITIES = (0.25, 0.5, 0.75)


def parameters(model: torch.nn.Module) -> int:
    """Return how many parameters a model has, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: torch.nn.Module, bench: wb.Bench, compressed: Compressed | None = None) -> int:
    """Return the multiply-adds of all products for one item, attention's scores left out."""
    places = positions(bench.task, bench.evaluation)
    if compressed is not None:  # blocks have moved: their weights go by the names that they have now
        places = {layer.name: places[layer.origin] for layer in compressed.layers if layer.origin in places}
    return Outline.of(model, places).multiply_adds()


def timed(latency: Latency, share: float) -> dict[str, Any]:
    """Return latency as plain figures; `share` is the fraction of the dense multiply-adds that is left."""
    speed = latency.speedup
    return {
        "dense_ms": latency.dense_median_ms,
        "ms": latency.median_ms,
        "speedup": speed.value,
        "speedup_low": speed.low,
        "speedup_high": speed.high,
        "expected": 1 / share,
        "of_expected": speed.value * share,
        "batch": latency.batch,
        "input_shape": list(latency.input_shape),
        "rounds": latency.rounds,
    }


def row(bench: wb.Bench, recipe: wb.Recipe, compressed: Compressed, dense_adds: int) -> dict[str, Any]:
    """Return the figures that are known without running the model: parameters, bytes, multiply-adds."""
    dense = bench.task.model
    sizes, dense_sizes = counted_sizes(compressed.model, compressed.layers), counted_sizes(dense, ())
    adds = multiply_adds(compressed.model, bench, compressed)
    step: Any = recipe.steps[0]
    return {
        "model": bench.task.model_name,
        "pattern": step.pattern,
        "asked": step.sparsity,
        "reconstruct": step.reconstruct,
        "recipe": repr(recipe),
        "parameters": parameters(compressed.model),
        "dense_parameters": parameters(dense),
        "file_bytes": sizes.file_bytes,
        "dense_file_bytes": dense_sizes.file_bytes,
        "multiply_adds": adds / dense_adds,
    }


def real(name: str, device: str) -> list[dict[str, Any]]:
    """Measure a model with real weights, quality included."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = wb.Bench(
            name,
            device=device,
            ledger=f"{folder}/points.journal",
            offline=True,
            latency_batch=64,
            progress=False,
        )
        dense_adds = multiply_adds(bench.task.model, bench)
        for pattern in PATTERNS[name]:
            for sparsity in SPARSITIES:
                for reconstruct in (False,) if pattern == "layers" else (False, True):
                    recipe = wb.Recipe(wb.Prune(sparsity=sparsity, pattern=pattern, reconstruct=reconstruct))
                    compressed = compress(bench.task, recipe, bench.statistics)
                    point = bench.measure(recipe)
                    assert point.latency is not None
                    drop = point.primary.drop
                    figures = row(bench, recipe, compressed, dense_adds)
                    figures |= timed(point.latency, figures["multiply_adds"]) | {
                        "metric": point.primary.metric,
                        "change": -drop.value,
                        "change_low": -drop.high,
                        "change_high": -drop.low,
                        "items": point.items,
                    }
                    rows.append(figures)
                    print(line(figures), flush=True)
    return rows


def random(name: str, device: str, context: int) -> list[dict[str, Any]]:
    """Measure a Llama with random weights: sizes and times."""
    rows = []
    task = random_task(name.removeprefix("llama-"), pick(device), context, 16)
    with tempfile.TemporaryDirectory() as folder:
        bench = wb.Bench(task, ledger=f"{folder}/points.journal", progress=False)
        dense_adds = multiply_adds(task.model, bench)
        for pattern in PATTERNS[name]:
            for sparsity in SPARSITIES:
                recipe = wb.Recipe(wb.Prune(sparsity=sparsity, pattern=pattern))
                compressed = compress(task, recipe, bench.statistics, shared=True)
                figures = row(bench, recipe, compressed, dense_adds)
                for items in (bench.evaluation[:1], bench.evaluation[:8]):
                    rows.append(
                        figures
                        | timed(
                            measure_latency(task.kind, task.model, compressed.model, items),
                            figures["multiply_adds"],
                        )
                    )
                    print(line(rows[-1]), flush=True)
                del compressed
    return rows


def line(figures: dict[str, Any]) -> str:
    """Return one row of the table."""
    quality = (
        f"{100 * figures['change']:+.1f}"
        f" ({100 * figures['change_low']:+.1f} to {100 * figures['change_high']:+.1f})"
        if "change" in figures
        else "random weights"
    )
    cells = [
        figures["model"],
        figures["pattern"] + (", refitted" if figures["reconstruct"] else ""),
        f"{figures['asked']:.0%}",
        f"{figures['parameters'] / figures['dense_parameters']:.1%}",
        f"{figures['file_bytes'] / figures['dense_file_bytes']:.1%}",
        f"{figures['multiply_adds']:.1%}",
        f"{figures['dense_ms']:.2f}",
        f"{figures['ms']:.2f}",
        f"{figures['speedup']:.2f}x ({figures['speedup_low']:.2f} to {figures['speedup_high']:.2f})",
        f"{figures['expected']:.2f}x",
        f"{figures['of_expected']:.0%}",
        f"{figures['batch']}",
        quality,
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| model | removed | asked | parameters left | bytes left | multiply-adds left | dense ms | ms | speed"
    " against dense (95%) | expected | of expected | batch | accuracy change, points (95%) |\n"
    + "|---" * 13
    + "|"
)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(PATTERNS), default=["fashion-cnn", "fashion-vit"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, help="path without suffix")
    options = parser.parse_args()
    print(HEADER)
    rows = [
        figures
        for name in options.models
        for figures in (
            real(name, options.device)
            if name.startswith("fashion")
            else random(name, options.device, options.context)
        )
    ]
    about = {
        "command": "python " + " ".join(sys.argv),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(pick(options.device)),
        "versions": versions(),
    }
    if options.out:
        options.out.with_suffix(".json").write_text(
            json.dumps(
                {"what": "removed structure: sizes, latency, quality", **about, "rows": rows}, indent=1
            )
            + "\n"
        )
        said = "\n".join(
            f"- {name}:"
            f" {value if isinstance(value, str) else ', '.join(f'{k} {v}' for k, v in value.items())}"
            for name, value in about.items()
        )
        options.out.with_suffix(".md").write_text(
            f"# What removed structure saves\n\n{said}\n\n{HEADER}\n" + "\n".join(map(line, rows)) + "\n"
        )


if __name__ == "__main__":
    main()
