"""What a recipe will probably do, within milliseconds and without running the model. Never shown as measured.

File bytes follow from shapes (`workbench.measure.predicted_size`). Quality is a local linear regression over the sliders on
the points of the ledger; its interval is a weighted quantile of leave-one-out residuals that counts the unknown point as one
more (weighted conformal prediction, Tibshirani et al. 2019), so that too few neighbours give the widest interval, and the
note says so. Speed is 1.0 where no kernel exists, with the reason; for low rank it follows from measured neighbours, or from
multiply-adds where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.measure.metrics import metric_named
from workbench.measure.predicted_size import Outline
from workbench.measure.predicted_structure import Anatomy
from workbench.measure.quality import Estimate, Quality
from workbench.recipe import METHODS, Recipe, Step
from workbench.runtime.realise import reasons_for
from workbench.runtime.roofline import PASSES, Roof, limits_of, products, roof

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from workbench.bench import Bench
    from workbench.measure.measurement import Context, Measurement

LEVEL = 0.8  # of the prediction's intervals
NEAREST = 48  # points that a local fit looks at
WIDTHS = (0.1, 0.2, 0.4)  # of the neighbourhood, in slider coordinates; leave-one-out chooses
COORDINATES: dict[str, Callable[[float], float]] = {  # 0 is off; about 1 is as strong as it gets
    "sparsity": lambda s: s,
    "rank_ratio": lambda r: 1 - r,
    "weight_bits": lambda b: min(1.0, (2.0 ** (2 - b)) ** 0.5),
    "activation_bits": lambda b: min(1.0, (2.0 ** (4 - b)) ** 0.5),
    "kv_bits": lambda b: min(1.0, (2.0 ** (2 - b)) ** 0.5),
    "repair_ratio": lambda r: min(1.0, (4 * r) ** 0.5),
    "qat_steps": lambda n: min(1.0, 0.25 * math.log10(1 + n)),
    "transfer_steps": lambda n: min(1.0, 0.25 * math.log10(1 + n)),
    "temperature": lambda t: 0.5 + 0.05 * math.log2(t),
}


@dataclass(frozen=True)
class Prediction:
    """What a recipe will probably do. `file_bytes` is an upper bound unless `bytes_exact`; None where it cannot be known.

    `quality` is that of the compressed model in its metric, None before anything at all is known; `points` is how many
    measured points lie near; `wide` says that they are too few for an interval. `notes` are for the user. `roof` says whether the
    model will wait for memory or for arithmetic.
    """

    recipe: Recipe
    metric: str
    quality: Estimate | None
    points: int
    wide: bool
    file_bytes: int | None
    bytes_exact: bool
    speedup: Estimate
    notes: tuple[str, ...]
    no_kernel: tuple[str, ...]
    roof: Roof | None = None


@dataclass(frozen=True)
class Known:
    """Measured points as arrays: slider coordinates [n, d], marks of the other choices [n, d], values [n]."""

    places: NDArray[np.float64]
    marks: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Guess:
    """A local fit: `half` is half the interval, infinite if too few of the `near` points are close."""

    value: float
    half: float
    near: int


class Predictor:
    """Predicts recipes for one bench; cheap to make, holds shapes and nothing heavy."""

    def __init__(self, bench: Bench) -> None:
        """Read the shapes of the model, and run one item through it once to see how often each weight is used."""
        self.bench = bench
        self.outline = Outline.of(bench.task.model, positions(bench), Anatomy.of(bench.task, bench.statistics))
        self.limits = limits_of(str(bench.device))
        self.dense_quality: Quality | None = None
        self.size = -1
        self.rows: list[Measurement] = []
        self.known: dict[str, Known] = {}
        self.spots: dict[str, tuple[list[float], list[int]]] = {}

    def learn(self, point: Measurement) -> None:
        """Take the dense model's quality from a look at a point, if more items back it than before."""
        if self.dense_quality is None or point.primary.items >= self.dense_quality.items:
            self.dense_quality = point.primary

    def refresh(self) -> None:
        """Read new points of the ledger."""
        if len(self.bench.ledger) == self.size:
            return
        self.size = len(self.bench.ledger)
        self.rows = comparable(self.bench.ledger.rows(), self.bench.context)
        self.known.clear()
        for row in self.rows:
            self.learn(row)

    def predict(self, recipe: Recipe) -> Prediction:
        """Return the prediction of a recipe."""
        self.refresh()
        outline = self.outline.after(recipe)
        quality, guess = self.quality(recipe)
        speed, note = self.speed(recipe, outline)
        wide = not math.isfinite(guess.half)
        notes = [note] if note else []
        if wide:
            notes.append(f"quality is a guess: only {guess.near} measured points near these sliders")
        if any(step.targets != ("*",) for step in recipe):
            notes.append("some layers have targets of their own: quality is predicted from the sliders alone")
        if outline is None:
            notes.append("file size unknown before it is measured: a method without a size rule")
        return Prediction(
            recipe=recipe,
            metric="" if self.dense_quality is None else self.dense_quality.metric,
            quality=quality,
            points=guess.near,
            wide=wide,
            file_bytes=None if outline is None else outline.file_bytes(),
            bytes_exact=outline is not None and outline.exact(),
            speedup=speed,
            notes=tuple(notes),
            no_kernel=tuple(self.reasons(recipe, pattern(recipe), widths(outline))),
            roof=None if outline is None else self.roof(recipe, outline),
        )

    def reasons(self, recipe: Recipe, zeros: str | None, bits: list[int]) -> list[str]:
        """Return why zeros and grids of these widths make nothing faster where this recipe runs."""
        stored, rounded = recipe.main("quantize"), recipe.main("activations")
        return reasons_for(
            zeros, bits, self.bench.device.type, group_size=getattr(stored, "group_size", 0), inputs=getattr(rounded, "rounding", None), runtime=self.bench.runtime
        )

    def roof(self, recipe: Recipe, outline: Outline) -> Roof:
        """Return what bounds a recipe: bandwidth or arithmetic as measured on this device, with the kernels that there are."""
        wide = max(self.limits.multiply_adds_per_s)
        rounded = recipe.main("activations") is not None
        narrow, passes = (8, 1 if self.bench.runtime == "onnx" else PASSES[self.bench.device.type]) if rounded else (wide, 0)
        kernels = {bits: narrow if not self.reasons(recipe, None, [bits]) else 0 for bits in widths(outline)}
        items = len(self.bench.latency_items)
        before, after = products(self.outline, items, lambda _: 0), products(outline, items, lambda bits: kernels.get(bits, 0), passes)
        return roof(before, after, self.limits, wide // 8)

    def quality(self, recipe: Recipe) -> tuple[Estimate | None, Guess]:
        """Return the predicted quality of the compressed model."""
        metric = metric_named(self.bench.task.kind.primary)
        guess = self.guess("quality", recipe, lambda row: math.log1p(min(row.primary.drop.value, 1e12)) if metric.ratio else row.primary.drop.value)
        if self.dense_quality is None:
            return None, guess
        dense = self.dense_quality.dense.value
        if not metric.ratio:
            middle, half = dense - guess.value if metric.higher else dense + guess.value, min(guess.half, 1.0)
            return Estimate(*(min(metric.high, max(metric.low, x)) for x in (middle, middle - half, middle + half))), guess
        low = guess.value - guess.half if math.isfinite(guess.half) else 0.0
        return Estimate(*(dense * math.exp(min(x, 700.0)) for x in (guess.value, low, guess.value + min(guess.half, 700.0)))), guess

    def speed(self, recipe: Recipe, outline: Outline | None) -> tuple[Estimate, str]:
        """Return the predicted speed against dense and, where it is not 1, what it rests on."""
        if outline is None:
            return Estimate(1.0, 1.0, 1.0), "speed unknown before it is measured: a method without a speed rule"
        work = outline.multiply_adds() / self.outline.multiply_adds()
        most = self.roof(recipe, outline).ratio
        if work > 0.999 and abs(most - 1) < 0.001:
            return Estimate(1.0, 1.0, 1.0), ""
        guess = self.guess("speed", recipe, lambda row: math.log(row.latency.speedup.value) if row.latency else 0.0)
        if math.isfinite(guess.half):
            return Estimate(*(math.exp(guess.value + side * guess.half) for side in (0, -1, 1))), f"speed predicted from {guess.near} measured points"
        if work > 0.999:
            return Estimate(most, min(1.0, most), most), "speed predicted from bandwidth and arithmetic measured here, without overheads"
        return Estimate(1 / work, 1.0, 1 / work), f"speed predicted from multiply-adds ({work:.0%} of dense): the most that it can be"

    def guess(self, name: str, recipe: Recipe, value: Callable[[Measurement], float]) -> Guess:
        """Return the local fit of a value at a recipe."""
        known = self.known.get(name)
        if known is None:
            spots = [self.spot(row) for row in self.rows if len(row.recipe)]
            places = [coordinates(Recipe()), *(place for place, _ in spots)]
            marks = [choices(Recipe()), *(mark for _, mark in spots)]
            values = [0.0, *(value(row) for row in self.rows if len(row.recipe))]  # the dense model loses nothing
            known = self.known[name] = Known(np.array(places), np.array(marks), np.array(values))
        return local_fit(known, np.array(coordinates(recipe)), np.array(choices(recipe)))

    def spot(self, row: Measurement) -> tuple[list[float], list[int]]:
        """Return where a measured point stands, worked out once: with thousands of points it is what takes long."""
        if row.key not in self.spots:
            self.spots[row.key] = coordinates(row.recipe), choices(row.recipe)
        return self.spots[row.key]


def comparable(rows: list[Measurement], context: Context) -> list[Measurement]:
    """Return the complete rows of the same model, data and device, whatever version of the workbench measured them."""
    same = attrgetter(*(field.name for field in fields(context) if field.name != "workbench_version"))
    wanted = same(context)
    return [row for row in rows if row.complete and same(row.context) == wanted]


def positions(bench: Bench) -> dict[str, int]:
    """Return how often each weight is applied to one evaluation item: one forward pass with hooks."""
    found: dict[str, int] = {}

    def watch(name: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:  # noqa: ARG001  torch calls it so
            channels = output.shape[1] if output.ndim == 4 else output.shape[-1]
            found[name] = output.numel() // channels

        return hook

    from workbench.compress.layers import find_layers

    handles = [layer.module.register_forward_hook(watch(name)) for name, layer in find_layers(bench.task.model)[0].items()]
    try:
        with torch.inference_mode():
            bench.task.kind.logits(bench.task.model, bench.evaluation[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def coordinates(recipe: Recipe) -> list[float]:
    """Return one number a method: 0 where it is off, larger where its slider is stronger."""
    return [0.0 if (step := recipe.main(kind.kind())) is None else coordinate(step) for kind in METHODS.steps()]


def coordinate(step: Step) -> float:
    """Return where a slider stands; a method without a rule here goes by its place among its stops."""
    value = float(getattr(step, step.slider))
    rule = COORDINATES.get(step.slider)
    if rule is not None:
        return rule(value)
    low, high = (min(step.stops), max(step.stops)) if step.stops else (0.0, 1.0)
    return 0.25 + 0.75 * (value - low) / (high - low or 1.0)


def choices(recipe: Recipe) -> list[int]:
    """Return a mark of each method's other choices, 0 where it is off."""
    marks = []
    for kind in METHODS.steps():
        main = recipe.main(kind.kind())
        own = [step for step in recipe if step.kind() == kind.kind() and step is not main]
        other = None if main is None else [[getattr(main, name) for name in ("targets", *main.options()) if name != main.slider], *own]
        marks.append(0 if other is None else hash(repr(other)) or 1)
    return marks


def pattern(recipe: Recipe) -> str | None:
    """Return the pattern of the zeros, or None without any: structure that is removed leaves none."""
    step = next((step for step in recipe if step.kind() == "prune" and not getattr(step, "structured", False)), None)
    return None if step is None else str(getattr(step, "pattern", "unstructured"))


def widths(outline: Outline | None) -> list[int]:
    """Return the widths of the grids."""
    bits = {weight.bits for weight in outline.weights if weight.bits} if outline else set()
    return sorted({whole for width in bits for whole in (math.floor(width), math.ceil(width))})  # an average lies between two


def squared_distances(places: NDArray[np.float64], marks: NDArray[np.int64], at: NDArray[np.float64], mark: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return squared distances, [..., n]; other choices of a method that both use count like a fifth of its slider."""
    apart = ((places - at[..., None, :]) ** 2).sum(-1)
    differ = (marks != mark[..., None, :]) & (marks != 0) & (mark[..., None, :] != 0)
    found: NDArray[np.float64] = apart + 0.04 * differ.sum(-1)
    return found


def local_fit(known: Known, at: NDArray[np.float64], mark: NDArray[np.int64]) -> Guess:
    """Return the local linear fit at a place, and the weighted conformal quantile of its leave-one-out residuals."""
    order = np.argsort(squared_distances(known.places, known.marks, at, mark))[:NEAREST]
    x, marks, y = known.places[order], known.marks[order], known.values[order]
    here = squared_distances(x, marks, at, mark)
    between = squared_distances(x, marks, x, marks)
    np.fill_diagonal(between, np.inf)  # a point does not predict itself
    best: tuple[float, float, NDArray[np.float64]] | None = None
    for width in WIDTHS:
        residuals = np.abs(y - linear(x, y, between, x, width))
        closeness = np.exp(-here / (2 * (2 * width) ** 2))
        loss = float((closeness * residuals).sum() / (closeness.sum() + 1e-12))
        if best is None or loss < best[0]:
            best = (loss, width, residuals)
    assert best is not None  # noqa: S101  for the type checker
    _, width, residuals = best
    value = float(linear(x, y, here[None], at[None], width)[0])
    closeness = np.exp(-here / (2 * (2 * width) ** 2))
    return Guess(value, conformal(residuals, closeness), int((closeness > 0.3).sum()))


def linear(x: NDArray[np.float64], y: NDArray[np.float64], squared: NDArray[np.float64], at: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Return local linear fits at the places `at` [m, d], with weights from `squared` distances [m, n]; a small ridge keeps slopes calm."""
    weights = np.exp(-np.minimum(squared, 1e6) / (2 * width**2)) + 1e-9
    weights[~np.isfinite(squared)] = 0.0
    features = np.concatenate([np.ones((len(at), len(x), 1)), x[None] - at[:, None]], axis=2)  # [m, n, d + 1]
    weighted = features * weights[:, :, None]
    normal = np.einsum("mni,mnj->mij", weighted, features)
    ridge = np.eye(normal.shape[1]) * 0.05
    ridge[0, 0] = 1e-12
    fitted: NDArray[np.float64] = np.linalg.solve(normal + ridge, np.einsum("mni,n->mi", weighted, y)[..., None])[:, 0, 0]
    return np.clip(fitted, y.min(), y.max())  # never beyond what was ever measured


def conformal(residuals: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Return the weighted quantile of residuals in which the unknown point has weight 1 and an infinite residual."""
    order = np.argsort(residuals)
    reached = np.cumsum(weights[order]) / (weights.sum() + 1.0)
    index = int(np.searchsorted(reached, LEVEL))
    return math.inf if index >= len(order) else float(residuals[order[index]])
