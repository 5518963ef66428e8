"""What each form of weights costs on one model: quality with intervals against effective bits, for every
method.

    python benchmarks/quantization.py --model fashion-vit --groups 0 16 --seeds 3 --out
        benchmarks/results/quantization-fashion-vit.json

Every recipe is measured on the same evaluation items, paired with the dense model. `seeds` draws the
calibration items anew for what reads them (GPTQ, AWQ, mixed precision): their spread is shown. Also measured:
combined recipes (50% + W4, 2:4 + W4, rank + W4), where mask and rank must hold. Writes the JSON and, beside
it, tables in Markdown and a figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import math
import sys
import time
from pathlib import Path

import torch
from pruning import flat, redrawn, scores_of, verdict

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import Compressed, compress
from workbench.errors import CompressionError
from workbench.measure.size import sizes
from workbench.metrics.quality import quality
from workbench.metrics.scores import Scores
from workbench.util.device import describe, pick
from workbench.util.environment import versions
from workbench.zoo import load_task

Name = tuple[str, int, float]  # method, group size, bits
METHODS = {
    "rtn, full range": {"scale_search": False},
    "rtn": {},
    "rtn symmetric": {"grid": "symmetric"},
    "gptq unordered": {"rounding": "gptq", "activation_order": False},
    "gptq": {"rounding": "gptq"},
    "awq": {"rounding": "awq"},
    "hqq": {"rounding": "hqq"},
    "mixed": {"bit_allocation": "knapsack"},
    "mixed gptq": {"bit_allocation": "knapsack", "rounding": "gptq"},
    "nf4": {"number_format": "nf4"},
    "nf4 gptq": {"number_format": "nf4", "rounding": "gptq"},
    "float8": {"number_format": "float8"},
    "rtn per tensor": {"granularity": "tensor"},
}
FIXED = {"nf4": 4, "float8": 8}
DRAWN = ("gptq", "awq", "mixed")  # read calibration items
BETTER = [
    ("rtn", "gptq"),
    ("gptq unordered", "gptq"),
    ("rtn", "awq"),
    ("rtn", "hqq"),
    ("rtn", "mixed"),
    ("gptq", "mixed gptq"),
    ("rtn, full range", "rtn"),
    ("rtn", "nf4"),
]


def steps(groups: list[int], widths: list[float], only: list[str] | None) -> dict[Name, wb.Quantize]:
    """Return every step to measure."""
    by_name: dict[Name, wb.Quantize] = {}
    for group in groups:
        for method, options in METHODS.items():
            if (
                (only and method not in only)
                or (method == "rtn per tensor" and group)
                or (method == "float8" and group)
            ):
                continue
            fixed = FIXED.get(str(options.get("number_format")))
            for bits in [fixed] if fixed else widths:
                if bits == int(bits) or method.startswith("mixed"):
                    by_name[method, group, bits] = wb.Quantize(weight_bits=bits, group_size=group, **options)
    return by_name


def combined(group: int) -> dict[str, tuple[wb.Step, ...]]:
    """Return recipes of several steps, weights in 4 bits."""
    by_name: dict[str, tuple[wb.Step, ...]] = {}
    for rounding in ("rtn", "gptq"):
        four = wb.Quantize(weight_bits=4, group_size=group, rounding=rounding)
        for name, first in (
            ("50%", wb.Prune(sparsity=0.5, criterion="wanda")),
            ("2:4", wb.Prune(pattern="2:4", criterion="wanda")),
            ("50% sparsegpt", wb.Prune(sparsity=0.5, criterion="sparsegpt")),
        ):
            by_name[f"{name} + W4 {rounding}"] = (first, four)
        by_name[f"2:4 + W4 {rounding} + repair 5%"] = (
            wb.Prune(pattern="2:4", criterion="wanda"),
            four,
            wb.Repair(repair_ratio=0.05),
        )
        by_name[f"rank 45% + W4 {rounding}"] = (
            wb.LowRank(rank_ratio=0.45),
            wb.Quantize(weight_bits=4, rounding=rounding),
        )  # groups divide few ranks
    return by_name


def promises(compressed: Compressed) -> str:
    """Return the number of promises that hold on the tensors, in words; raises where one is broken."""
    masks = ranks = 0
    for layer in compressed.layers:
        layer.check()
        masks += layer.mask is not None
        ranks += layer.rank is not None
    grids = sum(layer.grid is not None for layer in compressed.layers)
    return f"{masks} masks, {ranks} factors, {grids} grids hold"


def timed(task: object, recipe: wb.Recipe, statistics: Statistics) -> tuple[Compressed, list[float]]:
    """Return the compressed model, and the seconds of the first and of a second time."""
    spent = []
    for _ in range(2):
        start = time.perf_counter()
        compressed = compress(task, recipe, statistics, shared=True)  # type: ignore[arg-type]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(round(time.perf_counter() - start, 3))
    return compressed, spent


COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
    "#222222",
    "#d62728",
    "#17becf",
)
WIDE, HIGH, LEFT, TOP = 760, 480, 70, 40  # of the drawing's field, and where it begins, in pixels


def figure(path: Path, result: dict, rows: list[dict]) -> None:
    """Draw quality against effective bits as SVG: a line for each method (dotted: with groups), with
    intervals; loss and perplexity by their logarithm."""
    metric = result["metrics"][0]
    scale = math.log if metric == "perplexity" else float
    first = [row for row in rows if row["seed"] == 0]
    edges = [scale(row[metric][name]) for row in first for name in ("low", "high")] + [
        scale(result["dense"][metric])
    ]
    most_bits = max(row["effective_bits"] for row in first) + 0.2

    def at(bits: float, value: float) -> tuple[float, float]:
        up = (scale(value) - min(edges)) / ((max(edges) - min(edges)) or 1)
        return round(LEFT + WIDE * (bits - 2) / (most_bits - 2), 1), round(TOP + HIGH * (1 - up), 1)

    shapes = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDE + 190}" height="{TOP + HIGH + 60}"'
            ' font-family="sans-serif" font-size="12">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
        (
            f'<text x="{LEFT}" y="20" font-size="15">{result["model"]}: {metric} against effective bits,'
            " intervals of 95%</text>"
        ),
    ]
    for bits in range(2, int(most_bits) + 1):
        x, bottom = at(bits, result["dense"][metric])[0], TOP + HIGH
        shapes.append(
            f'<path d="M{x} {TOP}V{bottom}" stroke="#eee"/><text x="{x}" y="{bottom + 18}"'
            f' text-anchor="middle">{bits}</text>'
        )
    for step in range(6):
        level = min(edges) + (max(edges) - min(edges)) * step / 5
        y = TOP + HIGH * (1 - step / 5)
        shapes.append(
            f'<path d="M{LEFT} {y}H{LEFT + WIDE}" stroke="#eee"/><text x="{LEFT - 6}" y="{y + 4}"'
            f' text-anchor="end">{math.exp(level) if scale is math.log else level:.4g}</text>'
        )
    y = at(2, result["dense"][metric])[1]
    shapes.append(
        f'<path d="M{LEFT} {y}H{LEFT + WIDE}" stroke="#555" stroke-dasharray="6 4"/><text x="{LEFT + 4}"'
        f' y="{y - 4}">dense</text>'
    )
    lines = list(dict.fromkeys((row["method"], row["group"]) for row in first))
    methods = list(dict.fromkeys(method for method, _ in lines))
    for index, (method, group) in enumerate(lines):
        mine = sorted(
            (row for row in first if (row["method"], row["group"]) == (method, group)),
            key=lambda row: row["effective_bits"],
        )
        colour, dash = (
            COLOURS[methods.index(method) % len(COLOURS)],
            ' stroke-dasharray="2 3"' if group else "",
        )
        points = [at(row["effective_bits"], row[metric]["value"]) for row in mine]
        shapes.append(
            f'<polyline points="{" ".join(f"{x},{y}" for x, y in points)}" fill="none" stroke="{colour}"'
            f' stroke-width="1.5"{dash}/>'
        )
        for row, (x, y) in zip(mine, points, strict=True):
            low, high = (at(0, row[metric][name])[1] for name in ("low", "high"))
            shapes.append(
                f'<path d="M{x} {low}V{high}" stroke="{colour}" opacity=".45"/><circle cx="{x}" cy="{y}"'
                f' r="2.5" fill="{colour}"/>'
            )
        y, x = TOP + 8 + 16 * index, LEFT + WIDE + 14
        shapes.append(
            f'<path d="M{x} {y}h22" stroke="{colour}" stroke-width="2"{dash}/><text x="{x + 28}"'
            f' y="{y + 4}">{method}{f" g{group}" if group else ""}</text>'
        )
    shapes.append(
        f'<text x="{LEFT + WIDE / 2}" y="{TOP + HIGH + 42}" text-anchor="middle">effective bits a weight'
        " (codes, scales, zero points)</text></svg>"
    )
    path.write_text("\n".join(shapes) + "\n")


def markdown(result: dict, rows: list[dict], pairs: list[dict], together: list[dict]) -> str:
    """Return the result as tables."""
    metric, second = result["metrics"]
    about = (
        f"`{result['command']}`, {result['date']}, {result['device']}. {result['items']} items, 95%"
        f" intervals, {result['seeds']} draws of {result['calibration_items']} calibration items. Dense:"
        f" {metric} {result['dense'][metric]:.4f}, {second} {result['dense'][second]:.4f}. Seconds are of"
        " this one run, whatever ran beside it."
    )
    lines = [f"# Quantized weights of {result['model']}", "", about, ""]
    lines += [
        (
            f"| method | group | bits | effective bits | {metric} | interval | {second} | other draws:"
            f" {metric} | packed MB | first s | again s |"
        ),
        "|---" * 11 + "|",
    ]
    for row in (row for row in rows if row["seed"] == 0):
        others = [
            f"{r[metric]['value']:.4f}"
            for r in rows
            if r["seed"]
            and (r["method"], r["group"], r["bits"]) == (row["method"], row["group"], row["bits"])
        ]
        q = row[metric]
        lines.append(
            f"| {row['method']} | {row['group'] or 'row'} | {row['bits']:g} | {row['effective_bits']:.2f} |"
            f" {q['value']:.4f} | {q['low']:.4f} to {q['high']:.4f} | {row[second]['value']:.4f} |"
            f" {', '.join(others)} | {row['packed_bytes'] / 1e6:.2f} | {row['first_seconds']} |"
            f" {row['again_seconds']} |"
        )
    lines += [
        "",
        "## Differences, paired by item",
        "",
        (
            "Is the second better than the first? Each interval stands by itself. `gain in` counts draws of"
            " calibration items."
        ),
        "",
        "| first | second | group | bits | metric | change | interval | better? | gain in |",
        "|---" * 9 + "|",
    ]
    lines += [
        f"| {p['first']} | {p['second']} | {p['group'] or 'row'} | {p['bits']:g} | {p['metric']} |"
        f" {p['change']:+.4f} | {p['change_low']:+.4f} to {p['change_high']:+.4f} | {p['better']} |"
        f" {p['seeds_with_gain']} of {p['seeds']} |"
        for p in pairs
    ]
    if together:
        lines += [
            "",
            "## With other steps",
            "",
            f"| recipe | {metric} | interval | {second} | packed MB | of dense | checked |",
            "|---" * 7 + "|",
        ]
        lines += [
            f"| {row['name']} | {row[metric]['value']:.4f} | {row[metric]['low']:.4f} to"
            f" {row[metric]['high']:.4f} | {row[second]['value']:.4f} | {row['packed_bytes'] / 1e6:.2f} |"
            f" {row['packed_bytes'] / result['dense_bytes']:.3f} | {row['checked']} |"
            for row in together
        ]
    return "\n".join([*lines, "", *(f"- {warning}" for warning in result["warnings"])]) + "\n"


def differences(kind: str, by_seed: dict[int, dict[Name, Scores]]) -> list[dict]:
    """Return the paired differences that are expected to have a sign, in both metrics."""
    rows = []
    for first, second in BETTER:
        for method, group, bits in by_seed[0]:
            if method != second or (first, group, bits) not in by_seed[0]:
                continue
            every = [
                quality(kind, scores[first, group, bits], scores[second, group, bits])
                for scores in by_seed.values()
            ]
            for index in range(2):
                change = every[0][index]
                rows.append(
                    {
                        "first": first,
                        "second": second,
                        "group": group,
                        "bits": bits,
                        "metric": change.metric,
                        **{name: value for name, value in flat(change).items() if "change" in name},
                        "better": verdict(change),
                        "seeds_with_gain": sum(q[index].drop.value < 0 for q in every),
                        "seeds": len(every),
                    }
                )
    return rows


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion-vit")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--items", type=int, help="evaluation items, fewer than all")
    parser.add_argument("--calibration", type=int, help="calibration items")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[0], help="group sizes; 0 is one scale a row"
    )
    parser.add_argument(
        "--bits",
        type=float,
        nargs="+",
        default=[2, 2.5, 3, 3.5, 4, 5, 6, 7, 8],
        help="widths; fractions for mixed precision only",
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, help="these methods only")
    parser.add_argument("--no-combined", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run, print, write."""
    given = options()
    device = pick(given.device)
    task = load_task(
        given.model,
        device=device,
        dtype=given.dtype,
        evaluation_items=given.items,
        calibration_items=given.calibration,
        progress=False,
    )
    dense = scores_of(task, task.model)
    metrics = [measured.metric for measured in quality(task.kind.primary, dense, dense)]
    rows: list[dict] = []
    together: list[dict] = []
    by_seed: dict[int, dict[Name, Scores]] = {}
    warnings: dict[str, None] = {}
    for seed in range(given.seeds):
        drawn = redrawn(task, seed)
        statistics, by_seed[seed] = Statistics(drawn), {}
        for name, step in steps(given.groups, given.bits, given.only).items():
            if seed and not name[0].removeprefix("nf4 ").startswith(DRAWN):
                by_seed[seed][name] = by_seed[0][name]
                continue
            try:
                compressed, spent = timed(drawn, wb.Recipe(dataclasses.replace(step, seed=seed)), statistics)
            except CompressionError as error:
                print(*name, error, flush=True)
                continue
            warnings.update(dict.fromkeys(compressed.warnings))
            by_seed[seed][name] = scores_of(task, compressed.model)
            measured = quality(task.kind.primary, dense, by_seed[seed][name])
            rows.append(
                {
                    "method": name[0],
                    "group": name[1],
                    "bits": name[2],
                    "effective_bits": round(compressed.effective_bits or 0, 4),
                    "seed": seed,
                    "packed_bytes": sizes(compressed.model, compressed.layers).packed_bytes,
                    "skipped": sum("skipped: group_size" in row.outcome for row in compressed.report),
                    **{q.metric: flat(q) for q in measured},
                    "first_seconds": spent[0],
                    "again_seconds": spent[1],
                }
            )
            print(
                seed,
                *name,
                f"{compressed.effective_bits:.2f}",
                *(
                    f"{q.metric} {q.compressed.value:.4f} [{q.compressed.low:.4f}, {q.compressed.high:.4f}]"
                    for q in measured
                ),
                *spent,
                flush=True,
            )
        for label, combination in {} if seed or given.no_combined else combined(given.groups[-1]).items():
            compressed, spent = timed(drawn, wb.Recipe(*combination), statistics)
            measured = quality(task.kind.primary, dense, scores_of(task, compressed.model))
            together.append(
                {
                    "name": label,
                    "recipe": repr(wb.Recipe(*combination)),
                    **{q.metric: flat(q) for q in measured},
                    "packed_bytes": sizes(compressed.model, compressed.layers).packed_bytes,
                    "checked": promises(compressed),
                }
            )
            print(label, *(f"{q.metric} {q.compressed.value:.4f}" for q in measured), *spent, flush=True)
    pairs = differences(task.kind.primary, by_seed)
    result = {
        "what": (
            "quality of quantized weights, no training; intervals of 95%; differences paired by item;"
            " first_seconds includes statistics not yet there"
        ),
        "command": "python " + " ".join(sys.argv),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(device),
        "versions": versions(),
        "model": given.model,
        "data": task.data_name,
        "notes": list(task.notes),
        "items": len(task.evaluation),
        "calibration_items": len(task.calibration),
        "seeds": given.seeds,
        "metrics": metrics,
        "dense": {q.metric: round(q.dense.value, 5) for q in quality(task.kind.primary, dense, dense)},
        "dense_bytes": sizes(task.model).packed_bytes,
        "warnings": list(warnings),
    }
    text = markdown(result, rows, pairs, together)
    print(text)
    if given.out:
        given.out.write_text(
            json.dumps({**result, "rows": rows, "differences": pairs, "combined": together}, indent=1) + "\n"
        )
        given.out.with_suffix(".md").write_text(text)
        figure(given.out.with_suffix(".svg"), result, rows)


if __name__ == "__main__":
    main()
