"""Quality of rounded activations, of a rounded KV cache and of quantization-aware training on a real model,
with intervals.

    python benchmarks/activations.py fashion-vit --out benchmarks/results/activations-fashion-vit.json

Writes the numbers as JSON and the same as a page (.md) beside it. Every drop is paired with the dense model
on the same items, at the task's confidence. `recovered` is the part of the drop of post-training rounding
that training takes away; its spread is over seeds, which draw other batches.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from pathlib import Path

import workbench as wb
from workbench.compress import compress
from workbench.errors import CompressionError
from workbench.measure.kv_cache import cache_bytes, context_of
from workbench.measure.size import sizes
from workbench.metrics.quality import quality
from workbench.tasks import score
from workbench.util.device import describe
from workbench.util.environment import versions

TENSOR = {"activation_granularity": "tensor"}
STATIC = {"activation_scaling": "static", **TENSOR}
ROUNDINGS = {
    "dynamic per token": {},
    "dynamic per token, asymmetric": {"activation_grid": "asymmetric"},
    "dynamic per tensor": TENSOR,
    "dynamic per tensor, asymmetric": {**TENSOR, "activation_grid": "asymmetric"},
    "static per tensor": STATIC,
    "static per tensor, asymmetric": {**STATIC, "activation_grid": "asymmetric"},
    "float8 per token": {"activation_format": "float8"},
    "float8 per tensor": {"activation_format": "float8", **TENSOR},
}
SMOOTHINGS = (0.0, 0.5)


def measured(bench, recipe, dense) -> dict:
    """Return quality and bytes of a recipe."""
    compressed = compress(bench.task, recipe, bench.statistics, shared=True)
    kind = bench.task.kind
    by_metric = {
        metric_quality.metric: metric_quality
        for metric_quality in quality(
            kind.primary, dense, score(kind, compressed.model, bench.evaluation), bench.setting.confidence
        )
    }
    main = by_metric[kind.primary]
    row = {
        "recipe": repr(recipe),
        "label": recipe.label(),
        "metric": main.metric,
        "dense": main.dense.value,
        "value": main.compressed.value,
        "drop": [main.drop.value, main.drop.low, main.drop.high],
        "packed_bytes": sizes(compressed.model, compressed.layers).packed_bytes,
    }
    if kind.primary == "perplexity":
        window = bench.evaluation[:1]
        row |= {
            "context": context_of(window),
            "cache_bytes": cache_bytes(compressed.model, window),
            "dense_cache_bytes": cache_bytes(bench.task.model, window),
        }
    print(
        f"{row['label']:50} {main.metric} {main.compressed.value:.4f}  drop {main.drop.value:+.4f}"
        f" [{main.drop.low:+.4f}, {main.drop.high:+.4f}]",
        flush=True,
    )
    return row


def roundings(bench, dense, bits: int) -> list[dict]:
    """Return W8 alone, then inputs of `bits` bits on top in every way."""
    weights = wb.Quantize(weight_bits=8)
    rows = [
        measured(bench, wb.Recipe(weights), dense) | {"inputs": "not rounded", "smoothing": 0.0, "bits": 16}
    ]
    for name, options in ROUNDINGS.items():
        if bits != 8 and "float8" in name:
            continue
        for smoothing in SMOOTHINGS:
            recipe = wb.Recipe(wb.Activations(activation_bits=bits, smoothing=smoothing, **options), weights)
            rows.append(
                measured(bench, recipe, dense) | {"inputs": name, "smoothing": smoothing, "bits": bits}
            )
    return rows


def caches(bench, dense) -> list[dict]:
    """Return the cache at several widths and groups; nothing for a model without one."""
    rows = []
    for bits in (8, 4, 3, 2):
        for group in (0, 32):
            try:
                rows.append(
                    measured(bench, wb.Recipe(wb.KVCache(kv_bits=bits, kv_group_size=group)), dense)
                    | {
                        "bits": bits,
                        "group": group,
                    }
                )
            except CompressionError as error:
                print(error)
                return rows
    return rows


def trainings(bench, dense, bits: tuple[int, ...], *, steps: int, seeds: int, step_rate: float) -> list[dict]:
    """Return a row for each loss and seed: the quality of a trained model, and the share of the loss of
    quality by rounding that training has recovered."""
    rows = []
    for width in bits:
        rounded = wb.Quantize(weight_bits=width)
        base = measured(bench, wb.Recipe(rounded), dense)
        for loss, rate, seed in [("distillation", step_rate, seed) for seed in range(seeds)] + [
            ("distillation", 0.0, 0),
            ("task", step_rate, 0),
        ]:
            row = measured(
                bench,
                wb.Recipe(rounded, wb.QAT(qat_steps=steps, qat_loss=loss, qat_step_rate=rate, seed=seed)),
                dense,
            )
            rows.append(
                row
                | {
                    "bits": width,
                    "loss": loss,
                    "step_rate": rate,
                    "seed": seed,
                    "steps": steps,
                    "base_drop": base["drop"],
                    "recovered": 1 - row["drop"][0] / base["drop"][0] if base["drop"][0] else None,
                }
            )
    return rows


def cell(drop: list[float]) -> str:
    """Return a drop with its interval."""
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*drop)


def page(result: dict) -> str:
    """Return the numbers as a page."""
    about = (
        f"{result['model']}, {result['items']} items, {result['device']}, torch"
        f" {result['versions']['torch']}, {result['date']}; `{result['command']}`."
    )
    lines = [f"# Activations, KV cache and quantization-aware training on {result['model']}", ""]
    lines += [
        (
            f"{about} Dense: {result['dense']:.4f} {result['metric']}. Intervals: {result['confidence']:.0%},"
            " paired; a drop above 0 is worse."
        ),
        "",
    ]
    if result["activations"]:
        lines += [
            "## Rounded inputs, weights at 8 bits per row",
            "",
            "| inputs | bits | smoothing | drop |",
            "|---" * 4 + "|",
        ]
        lines += [
            f"| {row['inputs']} | {row['bits'] if row['bits'] < 16 else ''} | {row['smoothing']:g} |"
            f" {cell(row['drop'])} |"
            for row in result["activations"]
        ]
    if result["cache"]:
        lines += [
            "",
            f"## KV cache, bytes of {result['cache'][0]['context']} tokens",
            "",
            "| bits | numbers a scale | drop | bytes | dense bytes | smaller |",
            "|---" * 6 + "|",
        ]
        lines += [
            f"| {row['bits']} | {row['group'] or 'whole head'} | {cell(row['drop'])} | {row['cache_bytes']:,}"
            f" | {row['dense_cache_bytes']:,} | {row['dense_cache_bytes'] / row['cache_bytes']:.2f}x |"
            for row in result["cache"]
        ]
    if result["training"]:
        lines += [
            "",
            "## Quantization-aware training",
            "",
            (
                "| bits | loss | rate of step sizes | steps | seed | drop after rounding | drop after"
                " training | recovered |"
            ),
            "|---" * 8 + "|",
        ]
        lines += [
            f"| {row['bits']} | {row['loss']} | {row['step_rate']:g} | {row['steps']} | {row['seed']} |"
            f" {cell(row['base_drop'])} | {cell(row['drop'])} | {row['recovered']:.0%} |"
            for row in result["training"]
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--device")
    parser.add_argument("--items", type=int, help="evaluation items, or windows of a language model")
    parser.add_argument("--calibration", type=int, help="calibration items")
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4], help="widths of rounded inputs")
    parser.add_argument(
        "--weight-bits",
        type=int,
        nargs="*",
        default=[2],
        help="widths that are trained; none leaves training out",
    )
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="of the training that is repeated")
    parser.add_argument(
        "--step-rate",
        type=float,
        default=2e-3,
        help="learning rate of the logarithms of step sizes, in the trainings that learn them",
    )
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    bench = wb.Bench(
        options.model,
        device=options.device,
        evaluation_items=options.items,
        calibration_items=options.calibration,
        offline=options.offline,
        progress=False,
    )
    dense = score(bench.task.kind, bench.task.model, bench.evaluation)
    activations = [
        row for bits in options.bits for row in roundings(bench, dense, bits)[bits != options.bits[0] :]
    ]
    cache = caches(bench, dense)
    training = trainings(
        bench,
        dense,
        tuple(options.weight_bits),
        steps=options.steps,
        seeds=options.seeds,
        step_rate=options.step_rate,
    )
    some = (activations or cache or training)[0]
    result = {
        "model": options.model,
        "items": len(bench.evaluation),
        "metric": some["metric"],
        "dense": some["dense"],
        "confidence": bench.setting.confidence,
        "device": describe(bench.device),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "activations": activations,
        "cache": cache,
        "training": training,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
