"""From a slider's move to what a user sees: the prediction, the first measured look, the whole evaluation
set.

A move goes through `widgets.session.session.Session`, as in the panel, without a browser. The bench is warm:
the dense model has been measured. `cold` is the first move of each slider, with everything that is computed
once for it.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import workbench as wb
from benchmarks.suite.record import Options, Record
from widgets.session.model_choice import ModelChoice
from widgets.session.session import Session
from workbench.util.device import pick

WHAT = (
    "milliseconds in the kernel from a slider's move; medians over new positions on a warm bench; `cold` is"
    " the first move of a slider"
)
AIMS = {"135m": 120, "smollm2-135m": 120, "1.1b": 400, "6.7b": 1500}  # ms to the first look on an H100
CLASSIFIERS = ("fashion-vit", "fashion-cnn")


def recipes(target: str, count: int) -> dict[str, list[wb.Recipe]]:
    """Return recipes by slider, each a new position.

    `bits` and `rank` as round to nearest and plain SVD, and as their defaults are.
    """
    group = 0 if target in CLASSIFIERS else 64
    widths = (3, 5, 4, 6, 8, 2, 7)[: count + 1]
    by_slider = {
        "sparsity": [wb.Recipe(wb.Prune(sparsity=0.3 + 0.01 * i)) for i in range(count + 1)],
        "sparsity, wanda": [
            wb.Recipe(wb.Prune(sparsity=0.3 + 0.01 * i, criterion="wanda")) for i in range(count + 1)
        ],
        "bits": [
            wb.Recipe(wb.Quantize(weight_bits=bits, group_size=group, scale_search=False)) for bits in widths
        ],
        "bits, scale search": [wb.Recipe(wb.Quantize(weight_bits=bits, group_size=group)) for bits in widths],
        "bits, gptq": [
            wb.Recipe(wb.Quantize(weight_bits=bits, group_size=group, rounding="gptq")) for bits in widths
        ],
        "sparsity + bits": [
            wb.Recipe(
                wb.Prune(sparsity=0.31 + 0.01 * i),
                wb.Quantize(weight_bits=4, group_size=group, scale_search=False),
            )
            for i in range(count + 1)
        ],
        "rank, svd": [
            wb.Recipe(wb.LowRank(rank_ratio=0.2 + 0.02 * i, factorization="svd")) for i in range(count + 1)
        ],
        "rank": [wb.Recipe(wb.LowRank(rank_ratio=0.2 + 0.02 * i)) for i in range(count + 1)],
    }
    if target in CLASSIFIERS:  # 20 steps of 64 images; a language model's training is no gesture
        by_slider["temperature, 20 steps"] = [
            wb.Recipe(wb.Prune(sparsity=0.6), wb.Distill(temperature=1 + i, steps=20))
            for i in range(count + 1)
        ]
    return by_slider


class Watch:
    """Writes down when what arrives after a move, in milliseconds.

    With `quality_only` a move ends when all items are read.
    """

    def __init__(self, session: Session, *, quality_only: bool = False) -> None:
        """Watch nothing yet."""
        self.session, self.quality_only = session, quality_only
        self.seen, self.start = dict[str, float](), 0.0
        session.on_state.subscribe(self.note)

    def note(self) -> None:
        """Note the first of each."""
        state, now = self.session.state, 1000 * (time.perf_counter() - self.start)
        if state.prediction is not None:
            self.seen.setdefault("predicted", now)
        if state.point is None:
            return
        self.seen.setdefault("first", now)
        if state.point.items == state.point.items_total and "all" not in self.seen:
            self.seen["all"] = now
        if state.point.complete:
            self.seen.setdefault("complete", now)
        elif self.quality_only and "all" in self.seen:
            self.session.cancel()

    def move(self, recipe: wb.Recipe, longest: float) -> dict[str, float]:
        """Move, wait until the move ends or `longest` seconds are over, and return what was seen."""
        self.seen = {}
        self.start = time.perf_counter()
        self.session.start(recipe)
        # What is seen is timed where it arrives; a thread that asks all the time takes turns from the others
        while self.session.measurer.busy:
            time.sleep(0.02)
            if time.perf_counter() - self.start > longest:
                self.session.cancel()
        # What was cancelled comes to its next checkpoint, which the next move must not wait for
        while self.session.measurer.running is not None:
            time.sleep(0.02)
        return self.seen


def summary(moves: list[dict[str, float]]) -> dict[str, float]:
    """Return medians in milliseconds, the first (cold) move apart."""
    cold, warm = moves[0], moves[1:]
    medians: dict[str, float] = {"moves": len(warm)}
    for name in ("predicted", "first", "all", "complete"):
        times = [row[name] for row in warm if name in row]
        if times:
            medians[f"{name}_ms"] = round(statistics.median(times), 1)
        if name == "first" and times:
            medians["first_worst_ms"] = round(max(times), 1)
        if name in cold:
            medians[f"cold_{name}_ms"] = round(cold[name], 1)
    return medians


def run(target: str, options: Options, record: Record) -> None:
    """Move every slider of one model."""
    task, errors = options.task(target), list[BaseException]()
    record.settings |= {
        "items": len(task.evaluation),
        "tokens_an_item": task.evaluation.labels[0].numel(),
        "dtype": str(next(task.model.parameters()).dtype),
    }
    if target in AIMS and pick(options.device).type == "cuda":
        record.settings["aim_first_ms"] = AIMS[target]
    with tempfile.TemporaryDirectory() as folder:
        session = Session(ledger=f"{folder}/points.journal", progress=False)
        session.on_error.subscribe(errors.append)
        session.loader.load_now(ModelChoice(task))
        while session.measurer.busy:
            time.sleep(0.01)
        watch = Watch(session, quality_only=options.quality_only)
        try:
            for name, positions in recipes(target, options.moves).items():
                if (options.sliders and name not in options.sliders) or errors:
                    continue
                if record.late(options, name):
                    break
                moves: list[dict[str, float]] = []
                for recipe in positions:
                    left = options.seconds - record.spent
                    if moves and left < 2 * max(moves[-1].values(), default=0.0) / 1000:
                        break
                    moves.append(watch.move(recipe, max(left, 1.0)))
                record.add(name=name, **summary(moves))
        finally:
            session.close()
    if errors:
        record.stop(f"{type(errors[0]).__name__}: {errors[0]}")
        raise errors[0]
