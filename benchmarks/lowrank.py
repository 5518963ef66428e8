"""Quality of low rank and of repair on a real model, with intervals: which factorization, which ranks, what a
few bytes win back.

    python benchmarks/lowrank.py fashion-vit --out benchmarks/results/lowrank-fashion-vit.json

Writes the numbers as JSON and the same as a page (.md) beside it. Every drop is paired with the dense model
on the same items, at the task's confidence. `recovered` is the part of the loss that repair takes away;
`more` the bytes that it adds, of the packed bytes that it repairs.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from pathlib import Path

import torch

import workbench as wb
from workbench.compress import compress
from workbench.errors import CompressionError
from workbench.measure.size import sizes
from workbench.metrics.quality import quality
from workbench.tasks import score
from workbench.util.device import describe
from workbench.util.environment import versions

RANKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def measured(bench, recipe, dense) -> dict | None:
    """Return quality and bytes of a recipe, None where it compresses nothing."""
    try:
        compressed = compress(bench.task, recipe, bench.statistics, shared=True)
    except CompressionError:
        return None
    kind = bench.task.kind
    by_metric = {
        metric_quality.metric: metric_quality
        for metric_quality in quality(
            kind.primary, dense, score(kind, compressed.model, bench.evaluation), bench.setting.confidence
        )
    }
    main, loss = by_metric[kind.primary], by_metric.get("loss", by_metric[kind.primary])
    row = {
        "recipe": repr(recipe),
        "label": recipe.label(),
        "metric": main.metric,
        "dense": main.dense.value,
        "value": main.compressed.value,
        "drop": [main.drop.value, main.drop.low, main.drop.high],
        "loss_drop": [loss.drop.value, loss.drop.low, loss.drop.high],
        "packed_bytes": sizes(compressed.model, compressed.layers).packed_bytes,
        "layers": sum("rank" in line.outcome and "skipped" not in line.outcome for line in compressed.report),
    }
    print(
        f"{row['label']:34} {main.metric} {main.compressed.value:.4f}  loss +{loss.drop.value:.4f} "
        f" {row['packed_bytes']:,} B",
        flush=True,
    )
    return row


def ladder(bench, dense) -> dict[str, list[dict]]:
    """Return plain against whitened at every rank, and the ways of sharing out the same weights."""

    def every(**options):
        rows = (measured(bench, wb.Recipe(wb.LowRank(rank_ratio=ratio, **options)), dense) for ratio in RANKS)
        return [row | {"rank_ratio": ratio} for ratio, row in zip(RANKS, rows, strict=True) if row]

    ways = {
        "plain": every(factorization="svd"),
        "whitened": every(),
        "whitened, by energy": every(rank_allocation="energy"),
        "whitened, by loss": every(rank_allocation="loss"),
    }
    if any(
        isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1)
        for module in bench.task.model.modules()
    ):
        ways |= {f"whitened, {conv}": every(conv=conv) for conv in ("spatial", "tucker2")}
    return ways


def repairs(bench, dense, groups: int) -> list[dict]:
    """Return how much of the loss repair takes away, for about 5% more bytes and for more."""
    rows = []
    bases = {
        "2:4": [wb.Prune(sparsity=0.5, pattern="2:4")],
        "2:4 wanda": [wb.Prune(sparsity=0.5, pattern="2:4", criterion="wanda")],
        "W3 per row": [wb.Quantize(weight_bits=3)],
        f"W3 g{groups}": [wb.Quantize(weight_bits=3, group_size=groups)],
    }
    for name, steps in bases.items():
        base = measured(bench, wb.Recipe(*steps), dense)
        if base is None:
            continue
        seen: set[int] = set()
        for ratio in (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2):
            for rounds in (1, 8) if name.startswith("2:4") and ratio in {0.02, 0.05} else (1,):
                row = measured(
                    bench, wb.Recipe(*steps, wb.Repair(repair_ratio=ratio, repair_rounds=rounds)), dense
                )
                if row is None or (rounds == 1 and row["packed_bytes"] in seen):
                    continue
                seen.add(row["packed_bytes"])
                lost = base["loss_drop"][0]
                rows.append(
                    row
                    | {
                        "base": name,
                        "base_loss_drop": lost,
                        "base_drop": base["drop"],
                        "repair_ratio": ratio,
                        "rounds": rounds,
                        "more": row["packed_bytes"] / base["packed_bytes"] - 1,
                        "recovered": (lost - row["loss_drop"][0]) / lost if lost else None,
                    }
                )
    return rows


def page(result: dict) -> str:
    """Return the numbers as a page."""
    about = (
        f"{result['model']}, {result['items']} items, {result['device']}, {result['date']};"
        f" `{result['command']}`."
    )
    names = list(result["ranks"])
    lines = [
        f"# Low rank and repair on {result['model']}",
        "",
        (
            f"{about} Dense: {result['dense']:.4f} {result['metric']}. Intervals: {result['confidence']:.0%},"
            " paired."
        ),
        "",
    ]
    lines += [
        "## What a rank costs: drop in " + result["metric"],
        "",
        "| rank | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for ratio in RANKS:
        cells = []
        for name in names:
            row = next((row for row in result["ranks"][name] if row["rank_ratio"] == ratio), None)
            cells.append(
                "saves nothing"
                if row is None
                else "{:.4f} [{:.4f}, {:.4f}]".format(*row["drop"]) + f", {row['packed_bytes']:,} B"
            )
        lines.append(f"| {ratio} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## What repair wins back",
        "",
        "| base | repair | rounds | more bytes | drop before | drop after | loss recovered |",
        "|---" * 7 + "|",
    ]
    for row in result["repair"]:
        before, after = ("{:.4f} [{:.4f}, {:.4f}]".format(*drop) for drop in (row["base_drop"], row["drop"]))
        recovered = "" if row["recovered"] is None else f"{row['recovered']:.0%}"
        lines.append(
            f"| {row['base']} | {row['repair_ratio']:.1%} | {row['rounds']} | {row['more']:.1%} | {before} |"
            f" {after} | {recovered} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--device")
    parser.add_argument("--items", type=int, help="evaluation items, or windows of a language model")
    parser.add_argument("--groups", type=int, default=64, help="group size of the grouped 3-bit grid")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    bench = wb.Bench(
        options.model,
        device=options.device,
        evaluation_items=options.items,
        offline=options.offline,
        progress=False,
    )
    dense = score(bench.task.kind, bench.task.model, bench.evaluation)
    ranks, repaired = ladder(bench, dense), repairs(bench, dense, options.groups)
    some = next(iter(ranks.values()))[0]
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
        "ranks": ranks,
        "repair": repaired,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
