"""How much of what compression lost distillation brings back, against plain fine-tuning at the same steps,
and what T and a cached teacher do.

    python benchmarks/distillation.py fashion-cnn --out benchmarks/results/distillation-fashion-cnn.json

`recovered` is the share of the lost accuracy that came back: 1 - drop after / drop before, mean over seeds.
Its interval is a paired bootstrap over evaluation items (1,000 draws, 95%), averaged over the seeds of one
draw: it says how sure the items make it; the spread over seeds stands beside it. Writes JSON and the same as
a page (.md) beside it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex
import sys
import time
from pathlib import Path

import torch

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.metrics.scores import Scores
from workbench.tasks import score
from workbench.util.device import describe
from workbench.util.environment import versions

DAMAGE = {
    "80% sparsity": [wb.Prune(sparsity=0.8)],
    "rank 0.25": [wb.LowRank(rank_ratio=0.25)],
    "2 bits": [wb.Quantize(weight_bits=2)],
}
STRUCTURE = {"fashion-vit": "neurons", "fashion-cnn": "channels"}
WAYS = ("distillation", "with hidden states", "fine-tuning")
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def correct(bench, recipe) -> tuple[torch.Tensor, list]:
    """Return which evaluation items are right, float64 [N], and the warnings."""
    compressed = compress(bench.task, recipe, bench.statistics, shared=True)
    return Scores.join(
        [score(bench.task.kind, compressed.model, part) for part in bench.evaluation.batches(256)]
    ).correct, list(compressed.warnings)


def recovery(dense, before, after: list[torch.Tensor], draws: int = 1000) -> dict:
    """Return the recovered share of the loss with its interval, and each seed's."""
    lost, won = dense - before, torch.stack([right - before for right in after])
    index = torch.randint(len(dense), (draws, len(dense)), generator=torch.Generator().manual_seed(0))
    shares = (won.mean(0)[index].mean(1) / lost[index].mean(1)).sort().values
    each = [float(right.mean() / lost.mean()) for right in won]
    return {
        "recovered": sum(each) / len(each),
        "low": float(shares[int(0.025 * draws)]),
        "high": float(shares[int(0.975 * draws) - 1]),
        "seeds": each,
        "accuracy": [float(right.mean()) for right in after],
    }


def trained(bench, steps, options, *, seeds, dense, before) -> dict:
    start = time.perf_counter()
    after = [
        correct(
            bench,
            wb.Recipe(
                *steps, wb.Distill(**{"seed": seed, "teacher_cache_mb": 256, "look_every": 0} | options)
            ),
        )[0]
        for seed in range(seeds)
    ]
    return recovery(dense, before, after) | {"seconds_each": (time.perf_counter() - start) / seeds}


def model_results(numbers: dict, arguments) -> None:
    """Add all numbers of one model to `numbers`, written as they come."""
    name = arguments.model
    bench = wb.Bench(name, offline=True, device=arguments.device, progress=False)
    dense = Scores.join(
        [score(bench.task.kind, bench.task.model, part) for part in bench.evaluation.batches(256)]
    ).correct
    options = {"steps": arguments.steps, "learning_rate": arguments.rate, "distill_batch": arguments.batch}
    ways = {"distillation": {"alpha": arguments.alpha}, "fine-tuning": {"alpha": 0.0}}
    if arguments.hidden_weight:
        ways["with hidden states"] = {"alpha": arguments.alpha, "hidden_weight": arguments.hidden_weight}
    numbers |= {
        "dense": float(dense.mean()),
        "items": len(dense),
        "damage": {},
        "temperature": {},
        "cache": {},
    }
    given: dict = {}
    every = {**DAMAGE, "50% structure": [wb.Prune(sparsity=0.5, pattern=STRUCTURE[name])]}
    for label, steps in every.items():
        if arguments.damage not in ("", label):
            continue
        before = correct(bench, wb.Recipe(*steps))[0]
        given = {"seeds": arguments.seeds, "dense": dense, "before": before}
        row = {"before": float(before.mean()), "recipe": repr(wb.Recipe(*steps))}
        row |= {
            way: trained(bench, steps, {"temperature": 4.0, **chosen, **options}, **given)
            for way, chosen in ways.items()
        }
        numbers["damage"][label] = row
        write(numbers, arguments.out)
        print(
            name,
            label,
            f"{row['before']:.4f}",
            {
                way: f"{row[way]['recovered']:.1%} [{row[way]['low']:.1%}, {row[way]['high']:.1%}]"
                for way in ways
            },
            flush=True,
        )
    if arguments.damage:
        return
    given |= {"before": correct(bench, wb.Recipe(*DAMAGE["80% sparsity"]))[0]}
    for t in TEMPERATURES:
        numbers["temperature"][str(t)] = trained(
            bench, DAMAGE["80% sparsity"], {"temperature": t, "alpha": 1.0, **options}, **given
        )
        write(numbers, arguments.out)
    print(name, "T", {t: f"{row['recovered']:.1%}" for t, row in numbers["temperature"].items()}, flush=True)
    numbers["cache"] = cache_ratio(bench)
    print(name, "cache", numbers["cache"], flush=True)
    write(numbers, arguments.out)


def write(numbers: dict, path: Path) -> None:
    """Write the numbers as JSON, and the page beside it."""
    path.write_text(json.dumps(numbers, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(numbers))


def cache_ratio(bench, steps: int = 90, pairs: int = 3) -> dict:
    """Return the time of a training with the teacher computed anew over that with its answers kept, and over
    that where they were kept before; interleaved."""
    seconds: dict[str, list[float]] = {"computed": [], "first": [], "kept": []}
    for _ in range(pairs):
        statistics = Statistics(bench.task)
        compress(
            bench.task, wb.Recipe(*DAMAGE["80% sparsity"]), statistics, shared=True
        )  # what pruning itself needs is there before the first
        for way, budget in (("computed", 0), ("first", 256), ("kept", 256)):
            start = time.perf_counter()
            compress(
                bench.task,
                wb.Recipe(
                    *DAMAGE["80% sparsity"],
                    wb.Distill(temperature=2, steps=steps, look_every=0, teacher_cache_mb=budget),
                ),
                statistics,
                shared=True,
            )
            seconds[way].append(time.perf_counter() - start)
    middle = {way: sorted(values)[pairs // 2] for way, values in seconds.items()}
    return {
        "steps": steps,
        "seconds": middle,
        "computed / first": middle["computed"] / middle["first"],
        "computed / kept": middle["computed"] / middle["kept"],
    }


def page(numbers: dict) -> str:
    """Return the numbers as Markdown."""
    ways = [way for way in WAYS if any(way in row for row in numbers["damage"].values())]
    hidden = (
        f"; with hidden states: also hidden_weight={numbers['hidden_weight']:g}"
        if numbers.get("hidden_weight")
        else ""
    )
    lines = [
        f"# Distillation of {numbers['model']}",
        "",
        (
            f"{numbers['device']};"
            f" {', '.join(f'{name} {version}' for name, version in numbers['versions'].items())};"
            f" {numbers['date']}; `{numbers['command']}`"
        ),
        "",
        (
            f"Dense {numbers['dense']:.4f} on {numbers['items']} items; {numbers['steps']} steps of"
            f" {numbers.get('batch', 64)} items at rate {numbers['learning_rate']:g}. Distillation: T=4,"
            f" alpha={numbers.get('alpha', 0.9):g}; fine-tuning: alpha=0{hidden}."
        ),
        "",
        *([numbers["note"], ""] if numbers.get("note") else []),
        "| | accuracy before | taught by | accuracy after | recovered [95%] | seeds | s a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, row in numbers["damage"].items():
        for way in ways:
            outcome = row[way]
            mean, share = (
                sum(outcome["accuracy"]) / len(outcome["accuracy"]),
                f"{outcome['recovered']:.1%} [{outcome['low']:.1%}, {outcome['high']:.1%}]",
            )
            lines.append(
                f"| {label} | {row['before']:.4f} | {way} | {mean:.4f} | {share} |"
                f" {', '.join(f'{each:.1%}' for each in outcome['seeds'])} | {outcome['seconds_each']:.0f} |"
            )
    if numbers.get("single_runs"):
        lines += [
            "",
            "Single runs with seed 0, by which options were chosen (same items, recovered):",
            "",
            *(f"- {run}: {share:.1%}" for run, share in numbers["single_runs"].items()),
        ]
    if not numbers["temperature"]:
        return "\n".join([*lines, ""])
    lines += [
        "",
        *([numbers["temperature_how"], ""] if numbers.get("temperature_how") else []),
        "Temperature at 80% sparsity, alpha 1:",
        "",
        "| T | recovered [95%] | seeds |",
        "|---|---|---|",
    ]
    lines += [
        f"| {t} | {row['recovered']:.1%} [{row['low']:.1%}, {row['high']:.1%}] |"
        f" {', '.join(f'{share:.1%}' for share in row['seeds'])} |"
        for t, row in numbers["temperature"].items()
    ]
    cache = numbers["cache"]
    if not cache:
        return "\n".join([*lines, ""])
    ratios = (
        f"{cache['computed / first']:.2f}x faster the first time, {cache['computed / kept']:.2f}x once its"
        " answers are there"
    )
    lines += [
        "",
        (
            f"Teacher computed at each of {cache['steps']} steps against kept (teacher_cache_mb), same run,"
            f" medians of 3: {ratios}."
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(STRUCTURE))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=64, help="training items per step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--alpha", type=float, default=0.9, help="weight of the teacher's answers against the true labels"
    )
    parser.add_argument(
        "--hidden-weight",
        type=float,
        default=0.0,
        help="above 0: a third way, with hidden states matched too",
    )
    parser.add_argument(
        "--damage",
        default="",
        choices=["", *DAMAGE, "50% structure"],
        help="this one alone, and neither temperatures nor cache",
    )
    parser.add_argument("--note", default="", help="what a reader of the page should know")
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    numbers = {
        "command": shlex.join(["python", *sys.argv]),
        "device": describe(device),
        "versions": versions(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "model": arguments.model,
        "steps": arguments.steps,
        "learning_rate": arguments.rate,
        "batch": arguments.batch,
        "alpha": arguments.alpha,
        "hidden_weight": arguments.hidden_weight,
        "note": arguments.note,
    }
    model_results(numbers, arguments)


if __name__ == "__main__":
    main()
