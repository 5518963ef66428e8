"""Predictions of quality against what was then measured: random recipes arrive one by one, each predicted
before it is added.

    python benchmarks/coverage_scores.py --models fashion-cnn fashion-vit --recipes 150 --scores FOLDER
    python benchmarks/prediction.py --models fashion-cnn fashion-vit --scores FOLDER --out
        benchmarks/results/prediction.json

Recipes and their scores on all evaluation items come from a file (`coverage_scores.py` makes it). For each of
several random orders the first ten are measured without being predicted; every later one is predicted from
those before it. Compared: layer sensitivities corrected by the ledger (what `Predictor` does once it is
prepared), the same without any correction, and the local regression over the sliders alone (what it does
before that), at this level and at the 80% that it had before. An interval that cannot be drawn counts as the
widest, [0, 1]; `wide` is the share of predictions that say so. Wilson's interval of the coverage takes each
recipe once, whatever the number of orders. No speed is replayed: the file has none.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress.registry import METHODS
from workbench.predict.history import Spot, history
from workbench.predict.local_fit import LEVEL, Guess, local_fit
from workbench.predict.prior import Link, prior_of
from workbench.predict.scoring import wilson
from workbench.predict.spots import spot_of
from workbench.recipe import Recipe
from workbench.util.device import describe, pick
from workbench.util.environment import versions
from workbench.zoo import load_task

FIRST = 10  # points measured before anything is predicted
WAYS = ("sensitivities and ledger", "sensitivities alone", "local regression", "local regression, 80%")


def guessed(way: str, spots: list[Spot], drops: list[float], spot: Spot, link: Link) -> tuple[Guess, float]:
    """Return the prediction of a drop, and the seconds that it took once the points had been read."""
    past = history(spots, drops, link if way == WAYS[0] else None)
    start = time.perf_counter()
    if way == WAYS[1]:
        value = float(link.at(spot.costs.most[None])[0])  # type: ignore[index]
        return Guess(value, math.inf, 0, wide=True), time.perf_counter() - start
    guess = (
        local_fit(past.measured, np.array(spot.place), np.array(spot.mark), 0.8)
        if way == WAYS[3]
        else past.guess(spot)
    )
    return guess, time.perf_counter() - start


def replay(
    way: str, spots: list[Spot], drops: np.ndarray, link: Link, *, chance: float, orders: int
) -> list[dict[str, float]]:
    """Return one row for each prediction: its error, whether it held, its width, whether it said that it was
    wide."""
    nothing = spot_of(Recipe(), None)
    zero, dense = Spot(nothing.place, nothing.mark, np.zeros(len(link.weights))), link.most + chance
    rows = []
    for seed in range(orders):
        order = np.random.default_rng(seed).permutation(len(spots))
        for count in range(FIRST, len(order)):
            before, now = order[:count], order[count]
            guess, spent = guessed(
                way,
                [zero, *(spots[index] for index in before)],
                [0.0, *(float(drops[index]) for index in before)],
                spots[now],
                link,
            )
            low, high = max(0.0, dense - guess.value - guess.half), min(1.0, dense - guess.value + guess.half)
            middle, true = min(1.0, max(0.0, dense - guess.value)), dense - float(drops[now])
            rows.append(
                {
                    "count": count,
                    "error": abs(middle - true),
                    "held": low - 1e-12 <= true <= high + 1e-12,
                    "width": high - low,
                    "wide": guess.wide,
                    "ms": spent * 1000,
                }
            )
    return rows


def summary(rows: list[dict[str, float]], recipes: int) -> dict[str, float]:
    """Return a summary of rows: coverage with its interval, errors and widths as fractions, times."""
    share = float(np.mean([row["held"] for row in rows]))
    interval = wilson(round(share * (recipes - FIRST)), recipes - FIRST)
    errors, widths = ([row[name] for row in rows] for name in ("error", "width"))
    early = [row["held"] for row in rows if row["count"] < FIRST + 30]
    return {
        "predictions": len(rows),
        "coverage": round(share, 4),
        "coverage_low": round(interval.low, 4),
        "coverage_high": round(interval.high, 4),
        "coverage_of_the_first_30": round(float(np.mean(early)), 4),
        "median_error": round(float(np.median(errors)), 5),
        "mean_error": round(float(np.mean(errors)), 5),
        "error_90th_percentile": round(float(np.quantile(errors, 0.9)), 5),
        "median_width": round(float(np.median(widths)), 4),
        "wide_share": round(float(np.mean([row["wide"] for row in rows])), 4),
        "median_ms": round(float(np.median([row["ms"] for row in rows])), 2),
        "p95_ms": round(float(np.quantile([row["ms"] for row in rows], 0.95)), 2),
    }


def measured(model: str, path: Path, orders: int) -> dict:
    """Return the results of one model."""
    kept = np.load(path)
    recipes = [METHODS.from_json(str(text)) for text in kept["recipes"]]
    dense = float(kept["dense_correct"].mean())
    drops = dense - kept["correct"].mean(1)
    statistics = Statistics(load_task(model, device="cpu", offline=True, progress=False))
    start = time.perf_counter()
    prior = prior_of(statistics)
    first = time.perf_counter() - start
    start = time.perf_counter()
    prior.prepare(statistics, recipes)
    tables = time.perf_counter() - start
    start = time.perf_counter()
    spots = [spot_of(recipe, prior) for recipe in recipes]
    spot_ms = (time.perf_counter() - start) / len(spots) * 1000
    chance = 1 / len(statistics.task.labels)
    link = Link.usual(dense - chance, len(prior.kinds), ratio=False)
    return {
        "model": model,
        "items": kept["correct"].shape[1],
        "recipes": len(recipes),
        "dense_accuracy": round(dense, 4),
        "layers": len(prior.loads),
        "sum_of_loads_nats": round(float(prior.loads.sum()), 3),
        "seconds_of_sensitivities": round(first, 2),
        "tables": len(prior.curves),
        "seconds_of_tables": round(tables, 2),
        "ms_of_a_recipe": round(spot_ms, 2),
        "rank_correlation_before_any_point": round(
            spearman(link.at(np.array([spot.costs.most for spot in spots])), drops), 3
        ),
        "ways": {
            way: summary(replay(way, spots, drops, link, chance=chance, orders=orders), len(recipes))
            for way in WAYS
        },
    }


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Return the rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)


def markdown(result: dict) -> str:
    """Return the tables."""
    lines = [
        "# Predictions against what was then measured",
        "",
        f"`{result['command']}`, {result['date']}, {result['device']}",
        "",
    ]
    lines += [
        (
            "Random recipes of one to three steps (zeros, low rank, low bits; no training), each predicted"
            f" before it is added; {FIRST} points first; {result['orders']} random orders. Intervals are"
            f" meant to hold {result['level']:.0%} of the time. Errors are of accuracy, as a fraction. In"
            " brackets: 95%"
            " Wilson interval, each recipe taken once. The constants of the method (where the fall of an"
            " accuracy starts from, how doubt grows with it, how far neighbours count) were chosen on the 150"
            " recipes of seed 0 of `fashion-cnn` and `fashion-vit`; other seeds are new to it. Times: one"
            " thread of a shared machine."
        )
    ]
    for model in result["models"]:
        lines += [
            "",
            f"## {model['model']}",
            "",
            (
                f"{model['recipes']} recipes, each measured on {model['items']:,} items; dense accuracy"
                f" {model['dense_accuracy']:.2%}. Once a model: sensitivities of {model['layers']} layers"
                f" {model['seconds_of_sensitivities']:.1f} s, {model['tables']} tables"
                f" {model['seconds_of_tables']:.1f} s. Rank correlation of the predicted change of the loss"
                " with the measured drop, before any point:"
                f" {model['rank_correlation_before_any_point']:.3f}."
            ),
            "",
            (
                "| prediction | coverage | the first 30 | median error | mean error | 90th percentile |"
                " median width | wide | time, median / p95 |"
            ),
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for way, row in model["ways"].items():
            held, early = (
                f"{row['coverage']:.1%} [{row['coverage_low']:.1%}, {row['coverage_high']:.1%}]",
                f"{row['coverage_of_the_first_30']:.1%}",
            )
            held, early, width, wide = (
                (held, early, f"{row['median_width']:.3f}", f"{row['wide_share']:.1%}")
                if way != WAYS[1]
                else ("no interval", "", "", "")
            )
            lines.append(
                f"| {way} | {held} | {early} | {row['median_error']:.4f} | {row['mean_error']:.4f} |"
                f" {row['error_90th_percentile']:.4f} | {width} | {wide} | {row['median_ms']:.1f} /"
                f" {row['p95_ms']:.1f} ms |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replay."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["fashion-cnn", "fashion-vit"])
    parser.add_argument(
        "--scores", type=Path, required=True, help="folder of the files that coverage_scores.py writes"
    )
    parser.add_argument("--orders", type=int, default=5, help="random orders of each model")
    parser.add_argument("--out", type=Path, help="the JSON file to write, with tables in Markdown beside it")
    given = parser.parse_args()
    result = {
        "what": (
            "quality predicted before it was measured: coverage of the interval and error, against the local"
            " regression alone"
        ),
        "command": (
            "python "
            + " ".join("FOLDER" if argument == str(given.scores) else argument for argument in sys.argv)
        ),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(pick("cpu")),
        "versions": versions(),
        "level": LEVEL,
        "orders": given.orders,
        "models": [measured(model, given.scores / f"{model}.npz", given.orders) for model in given.models],
    }
    text = markdown(result)
    print(text)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    wb.Recipe()  # registers the methods
    main()
