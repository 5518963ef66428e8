"""Predictions of quality against what was then measured: random recipes arrive one by one, each predicted
before it is added.

    python -m benchmarks.coverage_scores --models fashion-cnn fashion-vit --recipes 100 --structure 100
        --scores FOLDER
    python benchmarks/prediction.py --models fashion-cnn fashion-vit --scores FOLDER --out
        benchmarks/results/prediction.json

Recipes and their scores on all evaluation items come from a file (`coverage_scores.py` makes it), some of
them with structure (heads, neurons, channels, blocks) taken out. For each of several random orders the first
ten are measured without being predicted; every later one is predicted from those before it. Compared: layer
sensitivities corrected by the ledger (what `Predictor` does once it is prepared), the same without any
correction, and the local regression over the sliders alone (what it does before that), at this level and at
the 80% that it had before. An interval that cannot be drawn counts as the widest, [0, 1]; `wide` is the share
of predictions that say so. Where nothing is known (`unknown`: no rule, and no point with the same settings)
the interval is [0, 1] as well, and there is no value and no error. Recipes with structure are counted apart.
Wilson's interval of the coverage takes each recipe once, whatever the number of orders. No speed is replayed:
the file has none.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress.registry import METHODS
from workbench.predict.history import Spot, history
from workbench.predict.local_fit import LEVEL, Guess, local_fit
from workbench.predict.prior import Costs, Link, prior_of
from workbench.predict.scoring import wilson
from workbench.predict.spots import spot_of
from workbench.recipe import Recipe
from workbench.util.device import describe, pick
from workbench.util.environment import versions
from workbench.zoo import load_task

FIRST = 10  # points measured before anything is predicted
ERRORS = ("median_error", "mean_error", "error_90th_percentile")
HEAD = (
    "| prediction | coverage | the first 30 | median error | mean error | 90th percentile | median width"
    " | wide | unknown | time, median / p95 |"
)
STRUCTURE = ", structure"  # added to a way's name: of recipes that take out structure
WAYS = ("sensitivities and ledger", "sensitivities alone", "local regression", "local regression, 80%")


@dataclass(frozen=True)
class Replayed:
    """Recipes as spots, also as they stand before there are sensitivities; what each of them lost, and
    whether it took out structure.
    """

    spots: list[Spot]
    before: list[Spot]
    drops: np.ndarray  # [recipes], of accuracy
    structured: np.ndarray  # bool [recipes]
    link: Link
    chance: float  # the accuracy of guessing


def guessed(way: str, spots: list[Spot], drops: list[float], spot: Spot, link: Link) -> tuple[Guess, float]:
    """Return the prediction of a drop, and the seconds that it took once the points had been read."""
    past = history(spots, drops, link if way == WAYS[0] else None)
    start = time.perf_counter()
    if way == WAYS[1]:
        value = math.nan if spot.costs is None else float(link.at(spot.costs.most[None])[0])
        guess = Guess(value, math.inf, 0, wide=True)
    elif way == WAYS[3] and not spot.unknown:
        guess = local_fit(past.measured, np.array(spot.place), np.array(spot.mark), 0.8)
    else:
        guess = past.guess(spot)
    return guess, time.perf_counter() - start


def replay(way: str, replayed: Replayed, orders: int) -> list[dict[str, float]]:
    """Return one row for each prediction: its error (NaN where nothing was known), whether it held, its
    width, whether it said that it was wide, whether the recipe took out structure.
    """
    spots = replayed.before if way in WAYS[2:] else replayed.spots
    nothing, none = spot_of(Recipe(), None), np.zeros(len(replayed.link.weights))
    zero = Spot(nothing.place, nothing.mark, Costs(none, none))
    rows = []
    for seed in range(orders):
        order = np.random.default_rng(seed).permutation(len(spots))
        for count in range(FIRST, len(order)):
            before, now = order[:count], order[count]
            guess, spent = guessed(
                way,
                [zero, *(spots[index] for index in before)],
                [0.0, *(float(replayed.drops[index]) for index in before)],
                spots[now],
                replayed.link,
            )
            outcome = judged(guess, float(replayed.drops[now]), replayed.link.most + replayed.chance)
            rows.append(
                outcome | {"count": count, "structured": bool(replayed.structured[now]), "ms": spent * 1000}
            )
    return rows


def judged(guess: Guess, drop: float, dense: float) -> dict[str, float]:
    """Return how a prediction of a drop from a dense accuracy did."""
    true, unknown = dense - drop, math.isnan(guess.value)
    low, high, middle = (
        (0.0, 1.0, math.nan)
        if unknown
        else (
            max(0.0, dense - guess.value - guess.half),
            min(1.0, dense - guess.value + guess.half),
            min(1.0, max(0.0, dense - guess.value)),
        )
    )
    return {
        "error": abs(middle - true),
        "held": low - 1e-12 <= true <= high + 1e-12,
        "width": high - low,
        "wide": guess.wide,
        "unknown": unknown,
    }


def summary(rows: list[dict[str, float]], recipes: int) -> dict[str, float]:
    """Return a summary of rows of so many different recipes: coverage with its interval, errors and widths as
    fractions, times.
    """
    share = float(np.mean([row["held"] for row in rows]))
    interval = wilson(round(share * recipes), recipes)
    widths = [row["width"] for row in rows]
    errors = [row["error"] for row in rows if not row["unknown"]] or [math.nan]
    early = [row["held"] for row in rows if row["count"] < FIRST + 30]
    return {
        "predictions": len(rows),
        "coverage": round(share, 4),
        "coverage_low": round(interval.low, 4),
        "coverage_high": round(interval.high, 4),
        "coverage_of_the_first_30": round(float(np.mean(early)), 4),
        "median_error": known(float(np.median(errors)), 5),
        "mean_error": known(float(np.mean(errors)), 5),
        "error_90th_percentile": known(float(np.quantile(errors, 0.9)), 5),
        "median_width": round(float(np.median(widths)), 4),
        "wide_share": round(float(np.mean([row["wide"] for row in rows])), 4),
        "unknown_share": round(float(np.mean([row["unknown"] for row in rows])), 4),
        "median_ms": round(float(np.median([row["ms"] for row in rows])), 2),
        "p95_ms": round(float(np.quantile([row["ms"] for row in rows], 0.95)), 2),
    }


def known(value: float, digits: int) -> float | None:
    """Return a rounded number, None where there is none."""
    return None if math.isnan(value) else round(value, digits)


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
    structured = np.array([any(getattr(step, "structured", False) for step in recipe) for recipe in recipes])
    replayed = Replayed(spots, [spot_of(recipe, None) for recipe in recipes], drops, structured, link, chance)
    return {
        "model": model,
        "items": kept["correct"].shape[1],
        "recipes": len(recipes),
        "with_structure": int(structured.sum()),
        "dense_accuracy": round(dense, 4),
        "layers": len(prior.loads),
        "sum_of_loads_nats": round(float(prior.loads.sum()), 3),
        "seconds_of_sensitivities": round(first, 2),
        "tables": len(prior.curves),
        "seconds_of_tables": round(tables, 2),
        "ms_of_a_recipe": round(spot_ms, 2),
        "rank_correlation_before_any_point": rank_correlation(replayed, replayed.structured),
        "rank_correlation_with_structure": rank_correlation(replayed, ~replayed.structured),
        "ways": ways(replayed, orders),
    }


def ways(replayed: Replayed, orders: int) -> dict[str, dict[str, float | None]]:
    """Return how each way of predicting did, recipes with structure apart."""
    summaries = {}
    for way in WAYS:
        rows = replay(way, replayed, orders)
        for structured, suffix in ((False, ""), (True, STRUCTURE)):
            part = [row for row in rows if row["structured"] is structured]
            if part:
                share = float((replayed.structured == structured).mean())
                summaries[way + suffix] = summary(part, round(share * (len(replayed.spots) - FIRST)))
    return summaries


def rank_correlation(replayed: Replayed, left_out: np.ndarray) -> float | None:
    """Return the rank correlation of predicted and measured drops before any point, None where none of the
    recipes has a prediction then.
    """
    from scipy.stats import spearmanr

    pairs = [
        (float(replayed.link.at(spot.costs.most[None])[0]), drop)
        for spot, drop, out in zip(replayed.spots, replayed.drops, left_out, strict=True)
        if spot.costs is not None and not out
    ]
    return round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 3) if len(pairs) > 2 else None


def markdown(result: dict) -> str:
    """Return the tables."""
    lines = [
        "# Predictions against what was then measured",
        "",
        f"`{result['command']}`, {result['date']}, {result['device']}",
        "",
        (
            "Random recipes of one to three steps (zeros, low rank, low bits; no training) and recipes"
            " that take out structure (heads, neurons, channels, blocks; a third with low bits beside"
            f" it), each predicted before it is added; {FIRST} points first; {result['orders']} random"
            f" orders. Intervals are meant to hold {result['level']:.0%} of the time. Errors are of"
            " accuracy, as a fraction, where a value was predicted; unknown: the share of predictions"
            " where nothing was known. In brackets: 95% Wilson interval, each recipe taken once. The"
            " constants of the method (where the fall of an accuracy starts from, how doubt grows with"
            " it, how far neighbours count) were chosen on the 150 recipes without structure of seed 0"
            " of `fashion-cnn` and `fashion-vit`; other seeds are new to it. What structure weighs was"
            " chosen on 81 recipes of another seed on 500 items of these models, so that those here"
            " are new to it. Times: one thread of a shared machine, which others used as well."
        ),
    ]
    for model in result["models"]:
        lines += [
            "",
            f"## {model['model']}",
            "",
            about(model),
            "",
            HEAD,
            "|---" * HEAD.count(" | ") + "|---|",
        ]
        lines += [line_of(way, row) for way, row in model["ways"].items()]
    return "\n".join(lines) + "\n"


def about(model: dict) -> str:
    """Return the Markdown on the predictions of one model, and on their cost."""
    orders = [
        f"{name} {value:.3f}"
        for name, value in (
            ("without structure", model["rank_correlation_before_any_point"]),
            ("with it", model["rank_correlation_with_structure"]),
        )
        if value is not None
    ]
    return (
        f"{model['recipes']} recipes, {model['with_structure']} of them with structure, each measured on"
        f" {model['items']:,} items; dense accuracy {model['dense_accuracy']:.2%}. Once a model:"
        f" sensitivities of {model['layers']} layers {model['seconds_of_sensitivities']:.1f} s,"
        f" {model['tables']} tables {model['seconds_of_tables']:.1f} s. Rank correlation of the predicted"
        f" change of the loss with the measured drop, before any point: {', '.join(orders)}."
    )


def line_of(way: str, row: dict) -> str:
    """Return one line of the table: how one way of predicting did."""
    cells = [way, "no interval", "", *(number(row[name]) for name in ERRORS), "", ""]
    if not way.startswith(WAYS[1]):
        held = f"{row['coverage']:.1%} [{row['coverage_low']:.1%}, {row['coverage_high']:.1%}]"
        cells[1:3] = held, f"{row['coverage_of_the_first_30']:.1%}"
        cells[-2:] = f"{row['median_width']:.3f}", f"{row['wide_share']:.1%}"
    cells += [f"{row['unknown_share']:.1%}", f"{row['median_ms']:.1f} / {row['p95_ms']:.1f} ms"]
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """Return an error in words."""
    return "none" if value is None else f"{value:.4f}"


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
