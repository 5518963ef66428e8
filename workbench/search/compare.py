"""Two or more points side by side, as plain records: what differs in their recipes, and whether their quality
does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from workbench.compress import compress
from workbench.errors import RecipeError
from workbench.measure.card import changed_words, divergence_words, quality_words, touched_share
from workbench.measure.measurement import Measurement
from workbench.metrics.quality import Quality, quality
from workbench.metrics.scores import Scores
from workbench.recipe import Recipe, Step
from workbench.util.text import size

if TYPE_CHECKING:
    from workbench.bench import Bench

MOST = 6
SIZES = ("theoretical_bytes", "packed_bytes", "file_bytes")


@dataclass(frozen=True)
class ComparedOption:
    """One option of one step in every recipe; "" where a recipe has no such step."""

    step: str
    option: str
    texts: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Return whether the recipes disagree here."""
        return len(set(self.texts)) > 1


@dataclass(frozen=True)
class LayerErrors:
    """One layer's relative weight error in every point.

    None where it was not changed in a way that has one.
    """

    name: str
    errors: tuple[float | None, ...]
    outcomes: tuple[str, ...]

    @property
    def worst(self) -> float:
        """Return the largest error."""
        return max((error for error in self.errors if error is not None), default=0.0)


@dataclass(frozen=True)
class Apart:
    """Whether two points' intervals of the paired change against the dense model overlap.

    This is no paired test of the two.
    """

    first: int
    second: int
    overlap: bool

    def words(self, metric: str, confidence: float) -> str:
        """Return the finding as a sentence; points are counted from 1."""
        pair = f"{self.first + 1} and {self.second + 1}"
        if self.overlap:
            return (
                f"{pair}: the {confidence:.0%} intervals of {metric} overlap, so these numbers do not tell"
                " them apart (no paired test: it may)"
            )
        return (
            f"{pair}: the {confidence:.0%} intervals of {metric} do not overlap, so they differ beyond the"
            " noise (no paired test)"
        )


@dataclass(frozen=True)
class Fact:
    """One measured thing in words for every point.

    `lengths` are those of its bars, between 0 and 1, None where there is none.
    """

    name: str
    words: tuple[str, ...]
    lengths: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Points side by side, in the order given."""

    points: tuple[Measurement, ...]
    choices: tuple[ComparedOption, ...]
    layers: tuple[LayerErrors, ...]
    apart: tuple[Apart, ...]


def comparison(rows: Sequence[Measurement]) -> Comparison:
    """Return 2 to 6 points of one model and data set side by side.

    Raises:
        RecipeError: too few or too many points, or of different models or data.

    """
    points = tuple({row.key: row for row in rows}.values())
    if not 2 <= len(points) <= MOST:
        raise RecipeError(
            f"{len(points)} point{'s' if len(points) != 1 else ''} chosen: pick 2 to {MOST} to see them side"
            " by side"
        )
    sources = {
        (
            row.context.model_name,
            row.context.model_fingerprint,
            row.context.data_name,
            row.context.data_fingerprint,
        )
        for row in points
    }
    if len(sources) > 1:
        raise RecipeError(
            f"points of {' and '.join(sorted(f'{s[0]} on {s[2]}' for s in sources))} cannot be compared: take"
            " points of one model on one data set"
        )
    changes = [row.primary.change for row in points]
    apart = tuple(
        Apart(i, j, not (changes[i].high < changes[j].low or changes[j].high < changes[i].low))
        for i, j in combinations(range(len(points)), 2)
    )
    return Comparison(points, choices_of([row.recipe for row in points]), layers_of(points), apart)


def facts(record: Comparison) -> tuple[Fact, ...]:
    """Return the measured facts, one row a thing, every number with its interval."""
    points = record.points
    qualities = [fact_of_quality(points, q.metric) for q in points[0].quality]
    sizes = [
        bars(
            name.replace("_bytes", " size"),
            points,
            lambda p, name=name: getattr(p.sizes, name),  # type: ignore[misc]
            lambda p, name=name: size(getattr(p.sizes, name)),  # type: ignore[misc]
        )
        for name in SIZES
    ]
    return (
        *qualities,
        bars(
            "answers changed",
            points,
            lambda p: p.flips.value if p.flips else None,
            changed_words,
        ),
        *(
            [bars("KL to dense", points, lambda p: p.kl.value if p.kl else None, divergence_words)]
            if any(p.kl for p in points)
            else []
        ),
        *sizes,
        bars(
            "smaller on disk", points, lambda p: p.shrink, lambda p: f"{p.shrink:.2f}\N{MULTIPLICATION SIGN}"
        ),
        bars(
            "weights touched",
            points,
            lambda p: p.coverage.share if p.coverage else None,
            touched_share,
        ),
        bars("time", points, lambda p: p.latency.median_ms if p.latency else None, time_words),
        bars(
            "speed against dense",
            points,
            lambda p: p.latency.speedup.value if p.latency else None,
            ratio_words,
        ),
        Fact("worst layers", tuple(worst_words(p) for p in points)),
        Fact(
            "measured",
            tuple(f"{p.items:,} items, {p.provenance.time[:16].replace('T', ' ')} UTC" for p in points),
        ),
    )


def fact_of_quality(points: Sequence[Measurement], metric: str) -> Fact:
    """Return one metric of every point: its value and the paired change against the dense model.

    Longer is a larger value.
    """
    qualities = [next((q for q in point.quality if q.metric == metric), None) for point in points]
    return Fact(
        metric,
        tuple("" if q is None else quality_words(q).split(" to ", 1)[1] for q in qualities),
        lengths([None if q is None else q.compressed.value for q in qualities]),
    )


def bars(
    name: str,
    points: Sequence[Measurement],
    value: Callable[[Measurement], float | None],
    text_of: Callable[[Measurement], str],
) -> Fact:
    """Return a fact with bars as long as its values."""
    return Fact(name, tuple(text_of(point) for point in points), lengths([value(point) for point in points]))


def lengths(values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Return values relative to the largest finite one; 0 for what is not finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    top = max(finite, default=0.0)
    return tuple(
        None if value is None else (value / top if top > 0 and math.isfinite(value) else 0.0)
        for value in values
    )


def time_words(point: Measurement) -> str:
    """Return the measured time next to the dense model's of the same run."""
    if point.latency is None:
        return point.missing.get("latency", "not measured")
    text = f"{point.latency.median_ms:.2f} ms, dense {point.latency.dense_median_ms:.2f} ms"
    if point.latency.real_time_factors is not None:
        before, after = point.latency.real_time_factors
        text += f"; real-time factor {after:.3f}, dense {before:.3f}"
    return text


def ratio_words(point: Measurement) -> str:
    """Return the measured speed with its interval, and why no kernel helps."""
    if point.latency is None:
        return "not measured"
    speed = point.latency.speedup
    text = f"{speed.value:.2f}\N{MULTIPLICATION SIGN} ({speed.low:.2f} to {speed.high:.2f})"
    return f"{text}; {point.no_kernel[0]}" if point.no_kernel else text


def worst_words(point: Measurement) -> str:
    """Return the three layers whose weights changed most."""
    changed = sorted(
        (layer for layer in point.layers if layer.relative_error),
        key=lambda layer: -(layer.relative_error or 0.0),
    )
    return (
        ", ".join(f"{layer.name} {layer.relative_error:.3f}" for layer in changed[:3]) or "no weight changed"
    )


def choices_of(recipes: Sequence[Recipe]) -> tuple[ComparedOption, ...]:
    """Return every option of every step that any recipe has.

    A second step of a kind is counted (`quantize 2`).
    """
    named = [numbered(recipe) for recipe in recipes]
    order = list(dict.fromkeys(name for steps in named for name in steps))
    options_compared = []
    for name in order:
        sample = next(steps[name] for steps in named if name in steps)
        options = sorted(
            (field.name for field in dataclasses.fields(sample)),
            key=lambda option: (option != sample.slider, option in {"targets", "seed"}),
        )
        options_compared += [
            ComparedOption(
                name,
                option,
                tuple(shown(getattr(steps[name], option)) if name in steps else "" for steps in named),
            )
            for option in options
        ]
    return tuple(options_compared)


def numbered(recipe: Recipe) -> dict[str, Step]:
    """Return a recipe's steps by kind, the second of a kind as `kind 2`."""
    steps: dict[str, Step] = {}
    for step in recipe:
        count = sum(1 for name in steps if name.split(" ")[0] == step.kind())
        steps[step.kind() if not count else f"{step.kind()} {count + 1}"] = step
    return steps


def shown(value: object) -> str:
    """Return an option's value as text."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def layers_of(points: Sequence[Measurement]) -> tuple[LayerErrors, ...]:
    """Return every layer of any point with its error in each, the worst first."""
    by_name = [{layer.name: layer for layer in point.layers} for point in points]
    names = dict.fromkeys(name for layers in by_name for name in layers)
    layer_errors = [
        LayerErrors(
            name,
            tuple(layers[name].relative_error if name in layers else None for layers in by_name),
            tuple(layers[name].outcome if name in layers else "" for layers in by_name),
        )
        for name in names
    ]
    return tuple(sorted(layer_errors, key=lambda layer: -layer.worst))


def paired_test(
    bench: Bench, first: Recipe, others: Sequence[Recipe], *, cancelled: Callable[[], bool] | None = None
) -> tuple[Quality, ...]:
    """Return the quality of each of `others` against `first` on the same items, `first` standing where the
    dense model usually does.

    Every recipe is compressed and evaluated again, since the ledger keeps no answers of single items. The
    intervals are joint over the pairs (Bonferroni): all of them hold together at the bench's confidence.

    Raises:
        RecipeError: nothing to compare with.
        Cancelled: `cancelled` returned True.
    """
    from workbench.util.progress import Bar, stoppable

    if not others:
        raise RecipeError("a paired test needs at least two recipes; got one")
    with Bar("paired test", shown=bench.show_progress) as bar:
        progress = stoppable(bar, cancelled)

        def scores(recipe: Recipe) -> Scores:
            compressed = compress(bench.task, recipe, bench.setting.statistics_with(progress), progress)
            return bench.setting.evaluator.scores(compressed.model, [], len(bench.evaluation), progress)

        base = scores(first)
        return tuple(
            quality(bench.task.kind.primary, base, scores(recipe), bench.setting.confidence, len(others))[0]
            for recipe in others
        )
