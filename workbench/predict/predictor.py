"""What a recipe will probably do, within milliseconds and without running the model. Never shown as measured.

File bytes follow from shapes (`workbench.shapes.outline`). Quality follows from the layers' sensitivities
once `Predictor.prepare` has found them (`workbench.predict.prior`), corrected by the ledger's newest 2,000
points; before that, and for speed, it is a local linear regression over the sliders on those points
(`workbench.predict.local_fit`, where intervals come from too). With too few neighbours the interval is wide,
and the note says so. Speed is 1.0 where no kernel exists, with the reason; for low rank it follows from
measured neighbours, or from multiply-adds where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from workbench.compress.outlines import after
from workbench.compress.pruning.predicted.structured_shapes import anatomy_of
from workbench.errors import CompressionError
from workbench.ledger.comparable import comparable
from workbench.ledger.ledger import Ledger
from workbench.measure.card import nothing_known, predicted_words
from workbench.measure.measurement import Measurement, Predicted
from workbench.measure.setting import Setting
from workbench.metrics.metric import Metric
from workbench.metrics.metrics import metric_named
from workbench.metrics.quality import Estimate, Quality
from workbench.predict.history import History, Spot, history
from workbench.predict.local_fit import LEVEL, Guess
from workbench.predict.offload_forecast import Pace, forecast
from workbench.predict.prior import Link, Prior, fits, prior_of
from workbench.predict.scoring import FEWEST, PredictionScore, score
from workbench.predict.spots import spot_of, unknown
from workbench.recipe import Recipe, Step
from workbench.runtime.plan import reasons_for
from workbench.runtime.roofline import PASSES, Roof, limits_of, products, roof
from workbench.shapes.outline import Outline
from workbench.shapes.positions import positions
from workbench.util.progress import Progress, no_progress
from workbench.util.text import size

# Comparable points that predictions learn from: with all of 100,000 they would take seconds after each new
# one
NEWEST = 2000
ENDLESS = 1e300  # stands for an end that a metric does not have
# Nats that a destroyed language model loses, about: from a good one to guessing among its tokens
LARGEST_RATIO = 8.0


@dataclass(frozen=True)
class Prediction:
    """What a recipe will probably do.

    `file_bytes` is an upper bound unless `bytes_exact`; None where it cannot be known.

    `quality` is that of the compressed model in its metric, None before anything at all is known; `points` is
    how many measured points lie near; `wide` says that they are too few for an interval. `notes` are for the
    user. `roof` says whether the model will wait for memory or for arithmetic. `unknown` are the methods of
    which neither a rule nor a measured point with the same settings says how they change quality: where there
    is one, `quality` is all that the metric can be, and its value, the middle of that, means nothing.
    """

    recipe: Recipe
    metric: str
    quality: Estimate | None
    points: int
    wide: bool
    file_bytes: int | None
    bytes_exact: bool
    speedup: Estimate | None
    notes: tuple[str, ...]
    no_kernel: tuple[str, ...]
    roof: Roof | None = None
    unknown: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return the prediction as a line; what is unknown is said, not shown as a number."""
        kept = "unknown" if self.file_bytes is None else size(self.file_bytes)
        speed = "unknown" if self.speedup is None else f"{self.speedup.value:.2f}x"
        at_most = "" if self.bytes_exact or self.file_bytes is None else "at most "
        quality = predicted_words(
            self.metric or "quality", self.quality, wide=self.wide, unknown=self.unknown
        )
        return f"Prediction({self.recipe!r}: {quality}; file {at_most}{kept}; speed {speed})"


class Predictor:
    """Predicts recipes in one setting; cheap to make, holds shapes and nothing heavy."""

    def __init__(self, setting: Setting, ledger: Ledger, pace: Pace) -> None:
        """Read the shapes of the model, and run one item through it once to see how often each weight is
        used.
        """
        self.setting, self.ledger, self.pace = setting, ledger, pace
        self.outline = Outline.of(
            setting.task.model,
            positions(setting.task, setting.evaluation),
            anatomy_of(setting.task, setting.statistics),
        )
        self.limits = limits_of(str(setting.device))
        self.dense_quality: Quality | None = None
        self.ratio = metric_named(setting.task.kind.primary).ratio  # the change of the metric is a ratio
        self.size = -1
        self.rows: list[Measurement] = []
        self.histories: dict[str, History] = {}
        self.spots: dict[str, Spot] = {}
        self.prior: Prior | None = None
        self.no_prior = ""  # why there will be none
        self.score: PredictionScore | None = None
        self.last: tuple[Recipe, tuple[int, Quality | None, Prior | None], Prediction] | None = None

    def learn(self, point: Measurement) -> None:
        """Take the dense model's quality from a look at a point, if more items back it than before."""
        if self.dense_quality is None or point.primary.items >= self.dense_quality.items:
            self.dense_quality = point.primary

    def refresh(self) -> None:
        """Read new points of the ledger."""
        if len(self.ledger) == self.size:
            return
        self.size = len(self.ledger)
        self.rows = comparable(self.ledger.rows(), self.setting.context, NEWEST)
        self.histories.clear()
        for row in self.rows:
            self.learn(row)
        self.score = score(self.rows)

    def prepare(self, recipe: Recipe, progress: Progress = no_progress) -> bool:
        """Find the layers' sensitivities and the tables for what is measured and for `recipe`.

        Return whether there is a prior now.

        Takes seconds the first time (a forward and a backward pass over the calibration data) and is meant
        for a thread of its own, while nothing is measured: predictions go on meanwhile as they are. What is
        there already is not done again. `progress` is called between batches and layers; it may raise to
        stop.
        """
        statistics = self.setting.statistics
        if not self.no_prior and not fits(statistics):
            self.no_prior = "the model is too large for gradients of all weights beside it"
        if self.no_prior:
            return False
        try:
            prior = self.prior or prior_of(statistics, progress)
            rows = list(self.rows)
            prior.prepare(statistics, [recipe, *(row.recipe for row in reversed(rows))], progress)
        except CompressionError as error:
            self.no_prior = str(error)
            return False
        earlier = self.spots
        self.spots = {
            row.key: (
                earlier[row.key]
                if row.key in earlier and earlier[row.key].costs is not None
                else spot_of(row.recipe, prior, ratio=self.ratio)
            )
            for row in rows
        }
        self.prior, self.size, self.last = prior, -1, None  # the next prediction reads all anew
        return True

    def record(self, recipe: Recipe) -> Predicted | None:
        """Return the prediction of a recipe as it is now, to be kept with its measurement.

        None before anything is known.
        """
        prediction = self.predict(recipe)
        return (
            None
            if prediction.quality is None or not len(recipe)
            else Predicted(
                prediction.metric,
                prediction.quality,
                prediction.speedup,
                LEVEL,
                prediction.points,
                prediction.wide,
                prediction.unknown,
            )
        )

    def predict(self, recipe: Recipe) -> Prediction:
        """Return the prediction of a recipe."""
        self.refresh()
        state = self.size, self.dense_quality, self.prior
        if self.last is None or self.last[0] != recipe or self.last[1] != state:
            self.last = recipe, state, self.predicted(recipe)
        return self.last[2]

    def predicted(self, recipe: Recipe) -> Prediction:
        """Return the prediction of a recipe from what is known now."""
        outline = after(self.outline, recipe)
        quality, guess = self.quality(recipe)
        speed, note = self.speed(recipe, outline)
        notes = [note] if note else []
        lost = tuple(dict.fromkeys(type(step).__name__ for step in self.unknown(recipe)))
        if lost:
            notes.append(
                f"{nothing_known(lost, 'quality')} before it is measured: no rule holds;"
                f" {guess.near} measured points have the same settings"
            )
        elif guess.wide:
            by = (
                "quality is a guess"
                if not math.isfinite(guess.half)
                else "quality follows from the layers' sensitivities alone"
            )
            notes.append(f"{by}: only {guess.near} measured points near these sliders")
        if self.prior is None and any(step.targets != ("*",) for step in recipe):
            notes.append("some layers have targets of their own: quality is predicted from the sliders alone")
        if guess.spare > 0:
            notes.append("how much training wins back is not known before it is measured")
        if outline is None:
            notes.append("file size unknown before it is measured: a method without a size rule")
        if (told := forecast(self.setting, self.pace, recipe, self.setting.first_look)) is not None:
            notes.append(told.words())
        if self.score is not None and self.score.quality is not None and self.score.quality.count >= FEWEST:
            notes.append(self.score.words())
        return Prediction(
            recipe=recipe,
            metric="" if self.dense_quality is None else self.dense_quality.metric,
            quality=quality,
            points=guess.near,
            wide=guess.wide,
            file_bytes=None if outline is None else outline.file_bytes(),
            bytes_exact=outline is not None and outline.exact(),
            speedup=speed,
            notes=tuple(notes),
            no_kernel=tuple(self.reasons(outline, recipe.zeros, widths(outline))),
            roof=None if outline is None else self.roof(outline),
            unknown=lost if math.isnan(guess.value) else (),
        )

    def unknown(self, recipe: Recipe) -> list[Step]:
        """Return the steps of which no rule says how they change quality."""
        return unknown(recipe, None if self.link() is None else self.prior, ratio=self.ratio)

    def reasons(self, outline: Outline | None, zeros: str | None, bits: list[int]) -> list[str]:
        """Return why zeros and grids of these widths make nothing faster where such a model runs."""
        return reasons_for(
            zeros,
            bits,
            self.setting.device.type,
            group_size=0 if outline is None else outline.group_size,
            inputs=None if outline is None else outline.inputs,
            runtime=self.setting.runtime,
        )

    def roof(self, outline: Outline) -> Roof:
        """Return the bound of a recipe: bandwidth or arithmetic as measured on this device, with the kernels
        that there are.
        """
        wide = max(self.limits.multiply_adds_per_s)
        rounded = outline.inputs is not None
        narrow, passes = (
            (8, 1 if self.setting.runtime == "onnx" else PASSES[self.setting.device.type])
            if rounded
            else (wide, 0)
        )
        kernels = {bits: narrow if not self.reasons(outline, None, [bits]) else 0 for bits in widths(outline)}
        items = len(self.setting.latency_items)
        before, after = (
            products(self.outline, items, lambda _: 0),
            products(outline, items, lambda bits: kernels.get(bits, 0), passes),
        )
        return roof(before, after, self.limits, wide // 8)

    def quality(self, recipe: Recipe) -> tuple[Estimate | None, Guess]:
        """Return the predicted quality of the compressed model."""
        metric = metric_named(self.setting.task.kind.primary)
        guess = self.guess(
            "quality",
            recipe,
            lambda row: (
                math.log1p(min(row.primary.drop.value, 1e12)) if metric.ratio else row.primary.drop.value
            ),
            self.link(),
        )
        if self.dense_quality is None:
            return None, guess
        dense = self.dense_quality.dense.value
        return (
            whole_range(metric, dense) if math.isnan(guess.value) else estimate(metric, dense, guess)
        ), guess

    def speed(self, recipe: Recipe, outline: Outline | None) -> tuple[Estimate | None, str]:
        """Return the predicted speed against dense, None where it is unknown, and what it rests on."""
        if outline is None:
            return None, "speed unknown before it is measured: a method without a speed rule"
        share = outline.multiply_adds() / self.outline.multiply_adds()
        most = self.roof(outline).ratio
        if share > 0.999 and abs(most - 1) < 0.001:
            return Estimate(1.0, 1.0, 1.0), ""
        guess = self.guess(
            "speed", recipe, lambda row: math.log(row.latency.speedup.value) if row.latency else 0.0
        )
        if math.isfinite(guess.half):
            return (
                Estimate(*(math.exp(guess.value + side * guess.half) for side in (0, -1, 1))),
                f"speed predicted from {guess.near} measured points",
            )
        if share > 0.999:
            return (
                Estimate(most, min(1.0, most), most),
                "speed predicted from bandwidth and arithmetic measured here, without overheads",
            )
        return (
            Estimate(1 / share, 1.0, 1 / share),
            f"speed predicted from multiply-adds ({share:.0%} of dense): the most that it can be",
        )

    def guess(
        self, name: str, recipe: Recipe, value: Callable[[Measurement], float], link: Link | None = None
    ) -> Guess:
        """Return the fit of a value at a recipe; `link` is where a prior of it starts."""
        past = self.histories.get(name)
        if past is None:
            rows = [row for row in self.rows if len(row.recipe)]
            spots = [spot_of(Recipe(), self.prior), *(self.spot(row) for row in rows)]
            past = self.histories[name] = history(
                spots, [0.0, *(value(row) for row in rows)], link
            )  # the dense model loses nothing
        prior = self.prior if link is not None else None
        return past.guess(spot_of(recipe, prior, ratio=self.ratio))

    def spot(self, row: Measurement) -> Spot:
        """Return where a measured point stands, worked out once: with thousands of points it is what takes
        long.
        """
        if row.key not in self.spots:
            self.spots[row.key] = spot_of(row.recipe, self.prior, ratio=self.ratio)
        return self.spots[row.key]

    def link(self) -> Link | None:
        """Return how sensitivities show in the task's metric before anything is measured.

        None without them, and where nobody knows what a destroyed model does.
        """
        if self.prior is None or self.dense_quality is None:
            return None
        metric, dense = metric_named(self.dense_quality.metric), self.dense_quality.dense.value
        if metric.destroyed is None:
            return None
        if metric.ratio:
            return Link.usual(LARGEST_RATIO, len(self.prior.kinds), ratio=True)
        chance = 1 / len(self.setting.task.labels) if self.setting.task.labels else metric.destroyed
        most = max(0.1, dense - chance if metric.higher else metric.destroyed - dense)
        return Link.usual(most, len(self.prior.kinds), ratio=False)


def estimate(metric: Metric, dense: float, guess: Guess) -> Estimate:
    """Return the quality of a model that loses what a guess says, with its interval."""
    if not metric.ratio:
        half = guess.half if metric.destroyed is None else min(guess.half, 1.0)
        loss = (guess.value, guess.value - half - guess.spare, guess.value + half)
        middle, best, worst = (dense - x if metric.higher else dense + x for x in loss)
        ends = (middle, min(best, worst), max(best, worst))
        return Estimate(*(min(metric.high, max(metric.low, x)) for x in ends))
    low = guess.value - guess.half - guess.spare if math.isfinite(guess.half) else min(0.0, guess.value)
    ends = (guess.value, low, guess.value + min(guess.half, 700.0))
    return Estimate(*(dense * math.exp(min(x, 700.0)) for x in ends))


def whole_range(metric: Metric, dense: float) -> Estimate:
    """Return the interval of a quality of which nothing is known: all that the metric can be.

    Its value is the middle; where the metric has no end, the middle between the dense model and a destroyed
    one, if the metric says what that is.
    """
    if metric.ratio:
        return Estimate(dense * math.exp(LARGEST_RATIO / 2), max(metric.low, 0.0), dense * math.exp(700.0))
    if math.isfinite(metric.low) and math.isfinite(metric.high):
        return Estimate((metric.low + metric.high) / 2, metric.low, metric.high)
    middle = dense if metric.destroyed is None else (dense + metric.destroyed) / 2
    return Estimate(middle, max(metric.low, -ENDLESS), min(metric.high, ENDLESS))


def widths(outline: Outline | None) -> list[int]:
    """Return the widths of the grids."""
    weights = outline.weights if outline else ()
    bits = {weight.bits for weight in weights if weight.bits and not weight.table}
    return sorted(
        {whole for width in bits for whole in (math.floor(width), math.ceil(width))}
    )  # an average lies between two
