"""What each way of choosing weights costs on one model: quality with intervals, and paired differences
between the ways.

    python benchmarks/pruning.py --model fashion-vit --seeds 3 --out
        benchmarks/results/pruning-fashion-vit.json

Every recipe is measured on the same evaluation items. `seeds` draws the calibration items anew from
calibration and training data (and seeds `random`); differences between recipes are paired by item, within the
first seed, and the other seeds say how often the sign is the same. Writes the JSON and, beside it, the same
as tables in Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import sys
import time
from pathlib import Path

import torch

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.metrics.quality import Quality, quality
from workbench.metrics.scores import Scores
from workbench.tasks import score
from workbench.tasks.base import Task
from workbench.util.device import describe, pick
from workbench.util.environment import versions
from workbench.zoo import load_task

CRITERIA = ("random", "magnitude", "taylor", "fisher", "wanda", "sparsegpt")
STEADY = {"magnitude"}  # the same whatever is drawn
BETTER = [  # (what should be worse, what should be better), by criterion, pattern, allocation
    *((("random", "{p}", "uniform"), (other, "{p}", "uniform")) for other in CRITERIA[1:]),
    (("magnitude", "{p}", "uniform"), ("wanda", "{p}", "uniform")),
    (("wanda", "{p}", "uniform"), ("sparsegpt", "{p}", "uniform")),
    (("magnitude", "{p}", "uniform"), ("sparsegpt", "{p}", "uniform")),
    (("taylor", "{p}", "uniform"), ("fisher", "{p}", "uniform")),
    (("magnitude", "{p}", "uniform"), ("fisher", "{p}", "uniform")),
    *(
        ((name, "{p}", "uniform"), (name, "{p}", allocation))
        for name in CRITERIA[1:]
        for allocation in ("global", "sensitivity")
    ),
    *(((name, "2:4", "uniform"), (name, "50%", "uniform")) for name in CRITERIA[1:]),
]
Name = tuple[str, str, str]


def recipes(sparsities: list[float]) -> dict[Name, wb.Prune]:
    """Return every step to measure, by (criterion, pattern, allocation)."""
    by_name = {(name, "2:4", "uniform"): wb.Prune(pattern="2:4", criterion=name) for name in CRITERIA}
    for sparsity in sparsities:
        for name in CRITERIA:
            for allocation in ("uniform", "global", "sensitivity")[: 1 if name == "random" else 3]:
                by_name[name, f"{sparsity:.0%}", allocation] = wb.Prune(
                    sparsity=sparsity, criterion=name, allocation=allocation
                )
    return by_name


def is_steady(name: Name) -> bool:
    """Return whether a recipe reads weights alone, so that calibration items make no difference."""
    return name[0] in STEADY and name[2] != "sensitivity"


def redrawn(task: Task, seed: int) -> Task:
    """Return the task with calibration items drawn anew; seed 0 leaves them as they are."""
    if seed == 0:
        return task
    names = task.calibration.inputs
    pool = type(task.calibration)(
        {name: torch.cat([task.calibration.inputs[name], task.training.inputs[name]]) for name in names},
        torch.cat([task.calibration.labels, task.training.labels]),
    )
    return dataclasses.replace(
        task,
        calibration=pool[
            torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: len(task.calibration)]
        ],
    )


def scores_of(task: Task, model: torch.nn.Module) -> Scores:
    """Return the scores of a model on all evaluation items."""
    return Scores.join([score(task.kind, model, items) for items in task.evaluation.batches(task.batch_size)])


def flat(measured: Quality) -> dict[str, float]:
    """Return the metric with its interval, and its paired change from the dense model."""
    rounded = {
        "value": measured.compressed.value,
        "low": measured.compressed.low,
        "high": measured.compressed.high,
        "change": measured.change.value,
        "change_low": measured.change.low,
        "change_high": measured.change.high,
    }
    return {name: round(value, 5) for name, value in rounded.items()}


def verdict(change: Quality) -> str:
    """Return whether the second of two recipes is better, by the interval of the paired change of quality."""
    drop = change.drop
    return "yes" if drop.high < 0 else "no, worse" if drop.low > 0 else "not told apart"


def differences(
    task: Task, by_seed: dict[int, dict[Name, Scores]], patterns: list[str]
) -> list[dict[str, object]]:
    """Return the paired differences that are expected to have a sign, in both metrics."""
    rows = []
    pairs = {
        (tuple(part.format(p=p) for part in a), tuple(part.format(p=p) for part in b)): None
        for a, b in BETTER
        for p in patterns
    }
    for worse, better in pairs:
        if worse not in by_seed[0] or better not in by_seed[0]:
            continue
        drawn = (
            list(by_seed.values())
            if {worse, better} - {name for name in by_seed[0] if is_steady(name)}
            else [by_seed[0]]
        )  # else the draws are one and the same
        every = [quality(task.kind.primary, scores[worse], scores[better]) for scores in drawn]
        for index in range(2):
            first = every[0][index]
            rows.append(
                {
                    "worse": worse,
                    "better": better,
                    "metric": first.metric,
                    **{name: value for name, value in flat(first).items() if "change" in name},
                    "better_indeed": verdict(first),
                    "seeds_with_gain": sum(qualities[index].drop.value < 0 for qualities in every),
                    "seeds": len(every),
                }
            )
    return rows


def markdown(result: dict[str, object], rows: list[dict[str, object]], pairs: list[dict[str, object]]) -> str:
    """Return the result as tables."""
    metric, second = result["metrics"]  # type: ignore[misc]
    about = (
        f"`{result['command']}`, {result['date']}, {result['device']}. {result['items']} items, 95%"
        f" intervals, {result['seeds']} draws of {result['calibration_items']} calibration items. Dense:"
        f" {metric} {result['dense'][metric]:.4f}, {second} {result['dense'][second]:.4f}. Seconds are of"
        " this one run, whatever ran beside it."
    )
    head = (
        f"| pattern | criterion | allocation | {metric} | interval | {second} | other draws: {metric} | first"
        " s | again s |"
    )
    lines = [f"# Pruning {result['model']}", "", about, "", head, "|---|---|---|---|---|---|---|---|---|"]
    first = [row for row in rows if row["seed"] == 0]
    for row in first:
        name = row["criterion"], row["pattern"], row["allocation"]
        others = [
            f"{r[metric]['value']:.4f}"
            for r in rows
            if r["seed"] and (r["criterion"], r["pattern"], r["allocation"]) == name
        ]
        q = row[metric]
        lines.append(
            f"| {row['pattern']} | {row['criterion']} | {row['allocation']} | {q['value']:.4f} | "
            f"{q['low']:.4f} to {q['high']:.4f} | "
            f"{row[second]['value']:.4f} | {', '.join(others)} | {row['first_seconds']} |"
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
        "| first | second | metric | change | interval | better? | gain in |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {' '.join(p['worse'])} | {' '.join(p['better'])} | {p['metric']} | {p['change']:+.4f} |"
        f" {p['change_low']:+.4f} to {p['change_high']:+.4f} | {p['better_indeed']} | {p['seeds_with_gain']}"
        f" of {p['seeds']} |"
        for p in pairs
    ]  # type: ignore[arg-type, str-bytes-safe]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion-vit")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--windows", type=int, help="evaluation items, fewer than all")
    parser.add_argument("--calibration", type=int, help="calibration items")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--only", nargs="+", choices=CRITERIA, help="these criteria only")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick(options.device)
    task = load_task(
        options.model,
        device=device,
        dtype=options.dtype,
        evaluation_items=options.windows,
        calibration_items=options.calibration,
        progress=False,
    )
    dense = scores_of(task, task.model)
    metrics = [measured.metric for measured in quality(task.kind.primary, dense, dense)]
    rows, by_seed = [], dict[int, dict[Name, Scores]]()
    for seed in range(options.seeds):
        drawn = redrawn(task, seed)
        statistics, by_seed[seed] = Statistics(drawn), {}
        for name, step in recipes(options.sparsities).items():
            if options.only and name[0] not in options.only:
                continue
            if seed and is_steady(name):
                by_seed[seed][name] = by_seed[0][name]
                continue
            recipe = wb.Recipe(dataclasses.replace(step, seed=seed))
            spent = []
            for _ in range(2):
                start = time.perf_counter()
                compressed = compress(drawn, recipe, statistics, shared=True)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent.append(round(time.perf_counter() - start, 3))
            by_seed[seed][name] = scores_of(task, compressed.model)
            qualities = quality(task.kind.primary, dense, by_seed[seed][name])
            rows.append(
                {
                    "criterion": name[0],
                    "pattern": name[1],
                    "allocation": name[2],
                    "seed": seed,
                    **{q.metric: flat(q) for q in qualities},
                    "first_seconds": spent[0],
                    "again_seconds": spent[1],
                    "warnings": list(compressed.warnings),
                }
            )
            print(
                seed,
                *name,
                *(
                    f"{q.metric} {q.compressed.value:.4f} [{q.compressed.low:.4f}, {q.compressed.high:.4f}]"
                    for q in qualities
                ),
                *spent,
                flush=True,
            )
    pairs = differences(task, by_seed, ["2:4", *(f"{sparsity:.0%}" for sparsity in options.sparsities)])
    result = {
        "what": (
            "quality after pruning, no training; intervals of 95%; differences paired by item; first_seconds"
            " includes statistics not yet there"
        ),
        "command": "python " + " ".join(sys.argv),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(device),
        "versions": versions(),
        "model": options.model,
        "data": task.data_name,
        "notes": list(task.notes),
        "items": len(task.evaluation),
        "calibration_items": len(task.calibration),
        "seeds": options.seeds,
        "metrics": metrics,
        "dense": {q.metric: round(q.dense.value, 5) for q in quality(task.kind.primary, dense, dense)},
    }
    text = markdown(result, rows, pairs)
    print(text)
    if options.out:
        options.out.write_text(json.dumps({**result, "rows": rows, "differences": pairs}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
