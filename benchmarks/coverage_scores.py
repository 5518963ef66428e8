"""Per-item scores of random recipes, kept in a file: what `coverage.py` reads as often as its statistics
change.

    python -m benchmarks.coverage_scores --models fashion-cnn fashion-vit --recipes 150 --scores FOLDER

A recipe is drawn from one to three of: zeros (sparsity, criterion, pattern), low rank (ratio, factorisation)
and low bits (width, groups, grid, rounding); nothing is trained. One that the model refuses is drawn anew.
With `--structure` so many more recipes follow that take out heads, neurons, channels or blocks, whichever the
model has, some of them with low bits as well. The file `<model>.npz` holds `loss` and `correct` [recipes,
items], those of the dense model [items] (`dense_loss`, `dense_correct`), and `recipes` as JSON. With
`--neighbours`, `near_loss` and `near_correct` are those of the first recipes with one slider moved a little,
as in a drag. `made` says by what, when and where.

A language model's items are windows of `--context` tokens, `correct` their share of tokens that are
predicted; its recipes are drawn from what leaves a model that mostly still reads, on a CPU from what is made
in seconds, on a GPU also from what needs calibration data:

    python -m benchmarks.coverage_scores --models smollm2-135m --recipes 150 --neighbours 60 --items 128
        --device cuda --dtype bfloat16 --scores FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import random
import sys
import time
from pathlib import Path

import numpy as np

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.errors import CompressionError, RecipeError
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.metrics.scores import Scores
from workbench.tasks.base import Task
from workbench.tasks.language_modelling import LanguageModelling
from workbench.util.device import describe, pick
from workbench.zoo import load_task

EVERY = 4  # recipes between two writes


def random_recipe(draw: random.Random) -> wb.Recipe:
    """Return a recipe of one to three steps without training."""
    steps: list[wb.Step] = []
    kinds = draw.sample(("prune", "rank", "bits"), draw.choice((1, 1, 2, 2, 3)))
    if "prune" in kinds:
        criterion = draw.choice(("magnitude", "wanda", "sparsegpt", "taylor", "fisher", "random"))
        pattern = (
            {"pattern": "2:4"} if draw.random() < 0.15 else {"sparsity": round(draw.uniform(0.05, 0.9), 3)}
        )
        steps.append(wb.Prune(criterion=criterion, seed=draw.randrange(1000), **pattern))
    if "rank" in kinds:
        steps.append(
            wb.LowRank(
                rank_ratio=round(draw.uniform(0.15, 0.95), 3), factorization=draw.choice(("svd", "whitened"))
            )
        )
    if "bits" in kinds:
        bits, group = draw.choice((2, 3, 3, 4, 4, 5, 6, 8)), draw.choice((0, 0, 16, 32, 64))
        steps.append(
            wb.Quantize(
                weight_bits=bits,
                group_size=group,
                grid=draw.choice(("symmetric", "asymmetric")),
                rounding=draw.choice(("rtn", "rtn", "gptq", "awq", "hqq")),
            )
        )
    return wb.Recipe(*sorted(steps, key=lambda step: step.position))


def random_structured_recipe(draw: random.Random) -> wb.Recipe:
    """Return a recipe that takes out structure, every third with low bits beside it; nothing is trained."""
    pattern = draw.choice(("heads", "neurons", "channels", "layers"))
    steps: list[wb.Step] = [
        wb.Prune(
            sparsity=round(draw.uniform(0.05, 0.9), 3),
            pattern=pattern,
            criterion=draw.choice(("magnitude", "wanda", "taylor", "fisher", "random")),
            allocation=draw.choice(("uniform", "uniform", "global")) if pattern != "layers" else "uniform",
            reconstruct=pattern != "layers" and draw.random() < 0.25,
            seed=draw.randrange(1000),
        )
    ]
    if draw.random() < 1 / 3:
        steps.append(
            wb.Quantize(weight_bits=draw.choice((3, 4, 5, 6, 8)), group_size=draw.choice((0, 16, 32)))
        )
    return wb.Recipe(*sorted(steps, key=lambda step: step.position))


def random_language_recipe(draw: random.Random, *, calibrated: bool = False) -> wb.Recipe:
    """Return a recipe for a language model, of zeros, low bits or both.

    Without calibration data unless `calibrated`.
    """
    criterion, rounding = (
        (draw.choice(("magnitude", "wanda", "sparsegpt")), draw.choice(("rtn", "rtn", "gptq")))
        if calibrated
        else ("magnitude", "rtn")
    )
    zeros = wb.Prune(criterion=criterion, sparsity=round(draw.uniform(0.05, 0.5), 3))
    bits = wb.Quantize(
        weight_bits=draw.choice((3, 4, 4, 5, 6, 8)),
        group_size=draw.choice((32, 64)),
        grid=draw.choice(("symmetric", "asymmetric")),
        rounding=rounding,
    )
    return draw.choice((wb.Recipe(zeros), wb.Recipe(bits), wb.Recipe(zeros, bits)))


def scored(task: Task, plain: int, seed: int, path: Path, structured: int = 0) -> dict[str, np.ndarray]:
    """Return the scores of `plain` random recipes, and of `structured` ones that take out structure, on all
    evaluation items, written to `path` as they come.

    What is there is not scored again.
    """
    count = plain + structured
    draw, statistics, evaluator = (
        random.Random(seed),  # noqa: S311
        Statistics(task),
        evaluator_of(task),
    )
    calibrated = evaluator.items.labels.device.type == "cuda"
    kept = dict(np.load(path)) if path.is_file() else {}
    texts = list(kept.get("recipes", ()))
    rows: list[tuple[np.ndarray, np.ndarray]] = list(
        zip(kept.get("loss", ()), kept.get("correct", ()), strict=True)
    )
    dense = arrays(evaluator.scores(task.model, [], len(task.evaluation)))
    refused, met, start = 0, 0, time.perf_counter()
    while met < count:
        try:
            if met >= plain:
                recipe = random_structured_recipe(draw)
            elif isinstance(task.kind, LanguageModelling):
                recipe = random_language_recipe(draw, calibrated=calibrated)
            else:
                recipe = random_recipe(draw)
            if met < len(texts) and texts[met] == recipe.to_json():
                met += 1
                continue
            compressed = compress(task, recipe, statistics, shared=True)
        except (CompressionError, RecipeError):
            refused += 1
            continue
        rows.append(arrays(evaluator.scores(compressed.model, [], len(task.evaluation))))
        texts.append(recipe.to_json())
        met += 1
        if met % EVERY == 0 or met == count:
            kept = {
                "loss": np.stack([row[0] for row in rows]),
                "correct": np.stack([row[1] for row in rows]),
                "dense_loss": dense[0],
                "dense_correct": dense[1],
                "recipes": np.array(texts),
                "refused": np.array(refused),
            }
            write(path, kept)
            print(
                f"{task.model_name}: {met} of {count} recipes, {refused} refused,"
                f" {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return kept


def moved(recipe: wb.Recipe, draw: random.Random) -> wb.Recipe:
    """Return the recipe with one slider moved a little: a ratio by 0.01 to 0.05, a width by one bit."""
    step = draw.choice([step for step in recipe if getattr(step, "pattern", "") != "2:4"] or list(recipe))
    value, sign = getattr(step, step.slider), draw.choice((-1, 1))
    if isinstance(step, wb.Quantize):
        change = {
            "weight_bits": (
                min(8, max(2, value + sign)) if min(8, max(2, value + sign)) != value else value - sign
            )
        }
    elif getattr(step, "pattern", "") == "2:4":
        # No slider to move
        criterion = step.criterion  # type: ignore[attr-defined]
        change = {"criterion": "magnitude" if criterion != "magnitude" else "wanda"}
    else:
        change = {step.slider: round(min(0.95, max(0.02, value + sign * draw.uniform(0.01, 0.05))), 3)}
    return wb.Recipe(
        *(
            dataclasses.replace(recipe_step, **change) if recipe_step is step else recipe_step
            for recipe_step in recipe
        )
    )


def scored_neighbours(task: Task, kept: dict[str, np.ndarray], count: int, seed: int, path: Path) -> None:
    """Add the scores of the first `count` recipes, each with one slider moved, to the file."""
    draw, statistics, evaluator = (
        random.Random(seed + 1),  # noqa: S311
        Statistics(task),
        evaluator_of(task),
    )
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    texts: list[str] = []
    start = time.perf_counter()
    for text in kept["recipes"][:count]:
        recipe = moved(wb.METHODS.from_json(str(text)), draw)
        texts.append(recipe.to_json())
        rows.append(
            arrays(
                evaluator.scores(
                    compress(task, recipe, statistics, shared=True).model, [], len(task.evaluation)
                )
            )
        )
        if len(rows) % EVERY == 0 or len(rows) == count:
            write(
                path,
                {
                    **kept,
                    "near_loss": np.stack([row[0] for row in rows]),
                    "near_correct": np.stack([row[1] for row in rows]),
                    "near_recipes": np.array(texts),
                },
            )
            print(
                f"{task.model_name}: {len(rows)} of {count} neighbours, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def evaluator_of(task: Task) -> Evaluator:
    """Return an evaluator of all evaluation items, on the model's device."""
    return Evaluator(task, task.evaluation.to(next(task.model.parameters()).device))


def arrays(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Return loss and correctness of each item, float64 [items]."""
    return scores.loss.numpy(), scores.correct.numpy()


def write(path: Path, values: dict[str, np.ndarray]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **values)
    part.replace(path)


def main() -> None:
    """Score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["fashion-cnn", "fashion-vit"])
    parser.add_argument("--recipes", type=int, default=150, help="of each model")
    parser.add_argument(
        "--structure", type=int, default=0, help="recipes of each model beside them that take out structure"
    )
    parser.add_argument(
        "--neighbours",
        type=int,
        default=0,
        help="recipes of each model that are scored with one slider moved as well",
    )
    parser.add_argument("--items", type=int, help="at most so many evaluation items")
    parser.add_argument("--context", type=int, help="tokens of a window, of a language model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="that models are loaded in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", type=Path, required=True, help="folder of the files")
    given = parser.parse_args()
    for model in given.models:
        task, path = (
            load_task(
                model,
                device=given.device,
                evaluation_items=given.items,
                context=given.context,
                dtype=given.dtype,
                offline=True,
                progress=False,
            ),
            given.scores / f"{model}.npz",
        )
        kept = scored(task, given.recipes, given.seed, path, given.structure)
        if given.neighbours > len(kept.get("near_loss", ())):
            scored_neighbours(task, kept, given.neighbours, given.seed, path)
        command = "python -m benchmarks.coverage_scores " + " ".join(sys.argv[1:]).replace(
            str(given.scores), "FOLDER"
        )
        write(
            path,
            {
                **np.load(path),
                "made": np.array(
                    f"`{command}`, {dt.datetime.now(dt.UTC).date().isoformat()},"
                    f" {describe(pick(given.device))}"
                ),
            },
        )


if __name__ == "__main__":
    main()
