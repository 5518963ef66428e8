"""How often the intervals of looks hold, over random recipes whose every item is scored, and how wide they
are.

    python -m benchmarks.coverage_scores --recipes 150 --neighbours 60 --scores FOLDER
    python -m benchmarks.coverage_scores --models smollm2-135m --recipes 150 --neighbours 60 --items 128
        --device cuda --dtype bfloat16 --scores FOLDER
    python -m benchmarks.coverage --scores FOLDER --orders 20 --out benchmarks/results/coverage.json

The first commands score all items once (`coverage_scores.py`), this one computes from these scores what
`Bench.stream` would have said, with the very functions that it uses, on many orders of the items:

- `full set`: the items in random order; does a look's interval contain the value on all of them? The order
  that the product uses is one of them, and is counted apart: one trial a recipe.
- `population`: evaluation sets drawn with replacement from the items, which stand for the whole population;
  does a look's interval contain the population's value, and do all looks' at once?

Kinds of interval: `plain`, paired differences of the items read, Student's t for losses, shared by Bonferroni
(what there was first); `joint`, for the joint distribution of the looks, and of losses widened for hard items
that were not met (what a first recipe has, until the dense model has read all items); `dense known`, with the
dense model's results on all items; `neighbour`, also with those of a recipe one small slider move away.
Widths are medians over recipes of a look's mean width over the plain one's. A model whose items are windows
of tokens (fractions of right answers) is judged by perplexity, from the look after 4 of them on that a CPU
has. The file of results keeps the rows of models that are not in the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.measure.setting import LOOKS
from workbench.metrics.control_variates import ControlVariates
from workbench.metrics.intervals import mean
from workbench.metrics.quality import Quality, quality
from workbench.metrics.scores import Scores
from workbench.metrics.sequential_looks import joint_level
from workbench.tasks.language_modelling import FEW_LONG
from workbench.util.device import describe
from workbench.util.environment import versions

CONFIDENCE = 0.95
KINDS = ("plain", "joint", "dense known", "neighbour")
TARGETS = ("full set", "population")
Row = dict[str, Any]


def scores(loss: np.ndarray, correct: np.ndarray) -> Scores:
    """Return per-item arrays as scores."""
    right = torch.tensor(correct, dtype=torch.float64)
    return Scores(torch.tensor(loss, dtype=torch.float64), right, torch.ones_like(right), right.long())


def taken(whole: Scores, order: np.ndarray) -> Scores:
    """Return the scores of items in an order."""
    index = torch.from_numpy(order)
    return Scores(whole.loss[index], whole.correct[index], whole.weight[index], whole.answers[index])


def looks_of(dense: Scores) -> tuple[int, ...]:
    """Return the numbers of items after which a stream looks; of windows as on a CPU."""
    early = LOOKS if primary_of(dense) == "accuracy" else (FEW_LONG, *LOOKS)
    return (*(n for n in early if n < len(dense)), len(dense))


@functools.cache
def level_of(counts: tuple[int, ...]) -> float:
    """Return the level of each look's interval."""
    return joint_level(counts, CONFIDENCE)


def primary_of(dense: Scores) -> str:
    """Return the main metric of a model's items: of single answers accuracy, of windows perplexity."""
    return "accuracy" if bool(((dense.correct == 0) | (dense.correct == 1)).all()) else "perplexity"


def said(kind: str, dense: Scores, mine: Scores, near: Scores | None) -> list[tuple[Quality, ...]]:
    """Return the qualities of every look as one kind of interval has them.

    All scores are in the order in which they are read.
    """
    counts, primary = looks_of(dense), primary_of(dense)
    if kind == "plain":
        return [plainly(primary, dense.first(n), mine.first(n), len(counts)) for n in counts]
    control = None if kind == "joint" else ControlVariates(dense, near)
    return [
        quality(
            primary,
            dense.first(n),
            mine.first(n),
            CONFIDENCE,
            len(counts),
            level=level_of(counts),
            known=control,
        )
        for n in counts
    ]


def plainly(primary: str, dense: Scores, mine: Scores, looks: int) -> tuple[Quality, ...]:
    """Return the qualities with Bonferroni's level, the changes of losses with Student's interval as it
    is."""
    level = 1 - (1 - CONFIDENCE) / looks
    change = mean(mine.loss - dense.loss, dense.weight, level)
    of_loss = {"loss": change, "perplexity": change.mapped(math.expm1)}
    return tuple(
        dataclasses.replace(metric_quality, change=of_loss.get(metric_quality.metric, metric_quality.change))
        for metric_quality in quality(primary, dense, mine, CONFIDENCE, looks, level=level)
    )


def orders(target: str, count: int, trials: int, seed: int) -> Iterator[np.ndarray]:
    """Yield orders in which items are read; of the full set, the product's own comes first."""
    draw = np.random.default_rng(seed)
    for trial in range(trials):
        if target == "population":
            yield draw.integers(0, count, count)
        else:
            yield np.arange(count) if trial == 0 else draw.permutation(count)


def of_recipe(
    target: str, dense: Scores, mine: Scores, near: Scores | None, trials: int, *, seed: int
) -> dict[tuple[str, str, str], dict[str, list[float]]]:
    """Return, for each (metric, kind, look), whether each trial's interval holds and how wide it is.

    The look `all` is whether all hold.
    """
    truth = {q.metric: q.change.value for q in quality(primary_of(dense), dense, mine)}
    trials_by_key: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for order in orders(target, len(dense), trials, seed):
        before, after = taken(dense, order), taken(mine, order)
        close = None if near is None else taken(near, order)
        for kind in KINDS if near is not None else KINDS[:-1]:
            together: dict[str, bool] = {}
            for look in said(kind, before, after, close if kind == "neighbour" else None):
                for estimated in look:
                    slack = 1e-12 * max(1.0, abs(truth[estimated.metric]))
                    holds = (
                        estimated.change.low - slack
                        <= truth[estimated.metric]
                        <= estimated.change.high + slack
                    )
                    together[estimated.metric] = together.get(estimated.metric, True) and holds
                    row = trials_by_key.setdefault(
                        (estimated.metric, kind, str(estimated.items)), {"holds": [], "width": []}
                    )
                    row["holds"].append(float(holds))
                    row["width"].append(estimated.change.high - estimated.change.low)
            for metric, all_hold in together.items():
                row = trials_by_key.setdefault((metric, kind, "all looks"), {"holds": [], "width": []})
                row["holds"].append(float(all_hold))
    return trials_by_key


def wilson(holds: float, trials: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share, all trials taken as independent."""
    z = 1.959964
    centre, half = (
        (holds + z * z / 2) / (trials + z * z),
        z * math.sqrt(holds * (trials - holds) / trials + z * z / 4) / (trials + z * z),
    )
    return centre - half, centre + half


def share(rows: list[dict[str, list[float]]], first: bool = False) -> Row:
    """Return how often intervals hold, over recipes and trials, or in the first trial of each."""
    each = [row["holds"][:1] if first else row["holds"] for row in rows]
    holds, trials = sum(map(sum, each)), sum(map(len, each))
    low, high = wilson(holds, trials)
    return {
        "covered": round(holds / trials, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "trials": trials,
    }


def summarised(
    model: str,
    target: str,
    recipes: list[dict[tuple[str, str, str], dict[str, list[float]]]],
    plain: str = "plain",
) -> list[Row]:
    """Return a row for each metric, kind and look.

    Widths are relative to the plain intervals of the same recipes.
    """
    rows = []
    for key in recipes[0]:
        metric, kind, look = key
        mine = [recipe[key] for recipe in recipes if key in recipe]
        row: Row = {
            "model": model,
            "for": target,
            "metric": metric,
            "interval": kind,
            "look": look,
            "recipes": len(mine),
            **share(mine),
        }
        row["worst_tenth"] = round(
            float(np.quantile([np.mean(recipe_trials["holds"]) for recipe_trials in mine], 0.1)), 4
        )
        if look != "all looks":
            ratios = [
                np.mean(recipe[key]["width"]) / np.mean(recipe[metric, plain, look]["width"])
                for recipe in recipes
                if key in recipe and np.mean(recipe[metric, plain, look]["width"]) > 0
            ]
            row["width"] = round(float(np.median(ratios)), 3) if ratios else None
        if target == "full set" and look != "all looks":
            own = share(mine, first=True)
            row |= {
                "own_order_covered": own["covered"],
                "own_order_low": own["low"],
                "own_order_high": own["high"],
            }
        rows.append(row)
    return rows


def measured(folder: Path, trials: int) -> list[Row]:
    """Return the rows of every model that has scores in a folder.

    Recipes with a neighbour have rows of their own.
    """
    rows = []
    for path in sorted(folder.glob("*.npz")):
        kept = dict(np.load(path))
        dense, near = scores(kept["dense_loss"], kept["dense_correct"]), kept.get("near_loss", ())
        for target in TARGETS:
            alone, paired = [], []
            for number, (loss, correct) in enumerate(zip(kept["loss"], kept["correct"], strict=True)):
                close = scores(near[number], kept["near_correct"][number]) if number < len(near) else None
                by_key = of_recipe(target, dense, scores(loss, correct), close, trials, seed=1000 + number)
                alone.append({key: value for key, value in by_key.items() if key[1] != "neighbour"})
                paired += (
                    []
                    if close is None
                    else [{key: value for key, value in by_key.items() if key[1] in {"plain", "neighbour"}}]
                )
            rows += summarised(path.stem, target, alone)
            rows += (
                [row for row in summarised(path.stem, target, paired) if row["interval"] == "neighbour"]
                if paired
                else []
            )
            print(path.stem, target, len(alone), len(paired), flush=True)
    return rows


def together(rows: list[Row], metric: str, kind: str, look: str, what: str = "own_order") -> Row | None:
    """Return the coverage of the full-set value by a metric's interval over the recipes of all models with it
    together; None without any."""
    mine = [
        row
        for row in rows
        if (row["for"], row["metric"], row["interval"], row["look"]) == ("full set", metric, kind, look)
    ]
    if not mine:
        return None
    trials = sum(row["recipes" if what == "own_order" else "trials"] for row in mine)
    holds = sum(
        round(
            row[f"{what}_covered" if what == "own_order" else "covered"]
            * row["recipes" if what == "own_order" else "trials"]
        )
        for row in mine
    )
    low, high = wilson(holds, trials)
    return {
        "models": ", ".join(dict.fromkeys(row["model"] for row in mine)),
        "metric": metric,
        "interval": kind,
        "look": look,
        "of": "the product's own order" if what == "own_order" else "random orders",
        "covered": round(holds / trials, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "trials": trials,
    }


def aim(rows: list[Row]) -> list[Row]:
    """Return how often the first look's interval of the main metric contains the full-set value: the aim."""
    firsts = [("accuracy", str(LOOKS[0])), ("perplexity", str(FEW_LONG)), ("perplexity", str(LOOKS[0]))]
    rows_or_none = [
        together(rows, metric, kind, look, what)
        for metric, look in firsts
        for kind in KINDS
        for what in ("own_order", "trials")
    ]
    return [row for row in rows_or_none if row is not None]


def table(rows: list[Row], columns: list[str]) -> str:
    """Return rows as a table in Markdown."""
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    return (
        "\n".join(
            [
                *lines,
                *("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows),
            ]
        )
        + "\n"
    )


def looks_section(result: Row) -> str:
    """Return the Markdown on the intervals of looks."""
    columns = [
        "model",
        "metric",
        "interval",
        "look",
        "recipes",
        "trials",
        "covered",
        "low",
        "high",
        "worst_tenth",
        "width",
    ]
    sections = [
        "## The first look\n",
        (
            f"How often the interval of the main metric after {LOOKS[0]} items, of windows also after"
            f" {FEW_LONG}, contains the value on all items; aim: 93% at a nominal 95%. Low and high: Wilson,"
            " 95%.\n"
        ),
    ]
    sections.append(
        table(
            result["rows"], ["models", "metric", "interval", "look", "of", "covered", "low", "high", "trials"]
        )
    )
    sections += [
        "## All looks together\n",
        (
            f"How often every look's interval of a recipe holds at once; aim: {CONFIDENCE:.0%}. For the value"
            " on all items (`full set`) and for that of the population (`population`), which is what is"
            " promised.\n"
        ),
    ]
    sections.append(
        table(
            [row for row in result["details"] if row["look"] == "all looks"],
            ["model", "metric", "interval", "for", "recipes", "trials", "covered", "low", "high"],
        )
    )
    for target in TARGETS:
        about = (
            "the value on all items"
            if target == "full set"
            else "the value of the population that the items were drawn from"
        )
        sections += [
            f"## Does the interval contain {about}?\n",
            (
                "`worst tenth`: coverage of the recipe that a tenth of the recipes stay below. `width`: the"
                " median over recipes, relative to plain intervals of the same recipes.\n"
            ),
        ]
        sections.append(table([row for row in result["details"] if row["for"] == target], columns))
    return "\n".join(sections)


def predicted_section(result: Row) -> str:
    """Return the Markdown on predicted intervals: `predicted`, written by their own script as {"what": ...,
    "rows": [...]}; "" without."""
    predicted = result.get("predicted")
    return (
        ""
        if not predicted
        else (
            f"## Predicted intervals\n\n{predicted['what']}\n\n"
            f"{table(predicted['rows'], list(predicted['rows'][0]))}"
        )
    )


def markdown(result: Row) -> str:
    """Return the whole result as a page."""
    head = (
        f"# Do the intervals hold?\n\n`{result['command']}`, {result['date']}, {result['device']}."
        f" {result['what']}\n"
    )
    sources = "".join(f"- {model}: {source}.\n" for model, source in result.get("sources", {}).items())
    return "\n".join(filter(None, (head, sources, looks_section(result), predicted_section(result))))


def write(result: Row, path: Path) -> None:
    """Write JSON and page.

    What another script has put under `predicted` stays, and so do the rows of models that were not scored
    now.
    """
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    result = {**({"predicted": earlier["predicted"]} if "predicted" in earlier else {}), **result}
    fresh = result["sources"]
    stay = [row for row in earlier.get("details", ()) if row["model"] not in fresh]
    if stay:
        result |= {
            "sources": {row["model"]: earlier["sources"][row["model"]] for row in stay} | fresh,
            "details": [*stay, *result["details"]],
        }
        result["rows"] = aim(result["details"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))


def sources(folder: Path, source: str) -> dict[str, str]:
    """Return by what, when and where each model's rows were computed, and their scores before that, where the
    file says so."""
    by_model = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as scores:
            by_model[path.stem] = f"{source}; scores by {scores['made']}" if "made" in scores else source
    return by_model


def main() -> None:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scores", type=Path, required=True, help="folder that coverage_scores.py has written"
    )
    parser.add_argument("--orders", type=int, default=40, help="of each recipe and target")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(given.scores, given.orders)
    result = {
        "what": (
            f"Coverage of the intervals of looks, nominal {CONFIDENCE:.0%} for all looks together, over"
            f" random recipes without training; all items scored once, {given.orders} orders or evaluation"
            " sets each."
        ),
        "command": (
            "python -m benchmarks.coverage " + " ".join(sys.argv[1:]).replace(str(given.scores), "FOLDER")
        ),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(torch.device("cpu")),
        "versions": versions(),
        "orders": given.orders,
        "confidence": CONFIDENCE,
        "rows": aim(rows),
        "details": rows,
    }
    result["sources"] = sources(given.scores, f"`{result['command']}`, {result['date']}, {result['device']}")
    print(markdown(result))
    if given.out:
        write(result, given.out)


if __name__ == "__main__":
    main()
