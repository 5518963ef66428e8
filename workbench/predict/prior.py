"""What a recipe should cost in quality, from the model alone: the linearity of small perturbations (HIGGS,
Malinovskii et al. 2024).

The loss grows by about sum_l a_l t_l^2, with t_l^2 the relative squared error of layer l's outputs
(`workbench.predict.layer_errors`) and a_l how much the loss feels that layer: half of its outputs' energy,
each output weighed by its diagonal Fisher information. HIGGS measures a_l by noise; here it follows from the
gradients of one pass over calibration data.

What large errors do to a metric is no longer linear: `Link` bends the sum, with few parameters that start at
usual values and move to what the ledger says. What is left over is a matter of
`workbench.predict.local_fit.residual_fit`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from workbench.calibration.passes import gradients, second_moments
from workbench.compress.core.layer_sample import LayerSample, sample, weighed
from workbench.compress.method import ErrorTable, Recovery, WholeTable
from workbench.compress.registry import METHODS
from workbench.compress.vocabulary import besides
from workbench.modules.factored import Shape, shape_of
from workbench.modules.layer import find_layers, output_head
from workbench.modules.offload import streams_to
from workbench.modules.vocabulary import Vocabulary, vocabulary_of
from workbench.predict.layer_errors import Curve, Key, errors_of, key_of, rule_of, whole_errors_of
from workbench.util.progress import Progress, no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from workbench.calibration.statistics import Statistics
    from workbench.recipe import Recipe, Step

MOST_WEIGHTS = {
    "cpu": 30_000_000,
    "cuda": 300_000_000,
}  # of models for which a backward pass behind the panel is no burden
FALL = (1.4, 1.25)  # scale and power of an accuracy's fall, rounded: half of it is gone at about 0.2 nats
# Doubt about a value that the prior is sure of, in units of the whole range (of nats, for a ratio)
FLOOR = 0.01
# And beside it, times the share that is lost and the share that is not: half of the range in the middle of
# the fall
DOUBT = 2.0
WHOLE = "whole"  # among kinds: what is found on the whole model, of whatever method
RATIO_DOUBT = 0.5  # of a predicted logarithm of a ratio


@dataclass(frozen=True)
class Place:
    """One layer, as steps pick it: its names, and whether only targets of its own reach it."""

    names: tuple[str, ...]
    head: bool
    shape: Shape


@dataclass(frozen=True)
class Costs:
    """What steps should cost by kind of step, in nats [kinds]: `most`, and `least` where training may win
    back some of it.
    """

    most: NDArray[np.float64]
    least: NDArray[np.float64]


@dataclass
class Prior:
    """The layers of one model, what each weighs in the loss [layers], and tables of errors by the choices of
    a step. `kinds` are the methods with such tables, and `WHOLE`; `without` are the keys of tables for which
    the model has nothing that their step takes.
    """

    places: tuple[Place, ...]
    loads: NDArray[np.float64]
    kinds: tuple[str, ...]
    curves: dict[Key, Curve] = field(default_factory=dict)
    without: set[Key] = field(default_factory=set)
    vocabulary: Vocabulary = field(default_factory=dict)

    def missing(self, recipes: Iterable[Recipe]) -> dict[Key, Step]:
        """Return the steps for which there is no table yet."""
        wanted = {
            key: step
            for recipe in recipes
            for step in (*recipe, *besides(recipe, self.vocabulary))
            if (key := key_of(step)) is not None
        }
        return {
            key: step for key, step in wanted.items() if key not in self.curves and key not in self.without
        }

    def prepare(
        self, statistics: Statistics, recipes: Iterable[Recipe], progress: Progress = no_progress
    ) -> None:
        """Make the tables that recipes need, tenths of a second to seconds each; kept on disk for the next
        kernel. `progress` may raise to stop.
        """
        for key, step in self.missing(recipes).items():
            table, samples = rule_of(step), samples_of(statistics, progress)
            assert isinstance(table, ErrorTable | WholeTable)  # noqa: S101  that is what has a key
            compute = (
                partial(errors_of, table, samples, progress)
                if isinstance(table, ErrorTable)
                else partial(whole_errors_of, table, statistics, samples, progress)
            )
            errors = statistics.once(("predicted errors", *key), compute, lasting=True)
            if errors.numel():
                self.curves[key] = Curve(np.array(table.knots, dtype=float), errors.cpu().numpy())
            else:
                self.without.add(key)

    def foresees(self, step: Step) -> bool:
        """Return whether there is a table of a step."""
        return key_of(step) in self.curves

    def costs(self, recipe: Recipe) -> Costs | None:
        """Return the predicted change of the loss by kind of step, in nats.

        None where a table is not there yet, or no rule says what a step does.
        """
        most = np.zeros((len(self.kinds), len(self.loads)))
        least = most.copy()
        for step in (*recipe, *besides(recipe, self.vocabulary)):
            rule = rule_of(step)
            if isinstance(rule, Recovery):
                rows = [index for index, kind in enumerate(self.kinds) if rule.of is None or kind in rule.of]
                most[rows] *= np.where(self.taken(step), rule.most, 1.0)
                least[rows] *= np.where(self.taken(step), rule.least, 1.0)
                continue
            if rule is None or step.kind() not in self.kinds:
                return None
            errors = self.errors(step, rule)
            if errors is None:
                return None
            row = self.kinds.index(WHOLE if isinstance(rule, WholeTable) else step.kind())
            most[row] += errors
            least[row] += errors
        return Costs(most @ self.loads, least @ self.loads)

    def errors(self, step: Step, table: ErrorTable | WholeTable) -> NDArray[np.float64] | None:
        """Return the relative errors of a step on its own, [layers], 0 where it does not work; None without
        its table.
        """
        curve = self.curves.get((step.kind(), *table.key))
        if curve is None:
            return None
        errors = curve.at(float(getattr(step, step.slider)))
        if isinstance(table, WholeTable):
            return table.times * errors
        works, taken = table.works, self.taken(step)
        if works is not None:
            taken = taken & np.array([works(place.shape) for place in self.places])
        return np.where(taken, errors, 0.0)

    def taken(self, step: Step) -> NDArray[np.bool_]:
        """Return which layers a step works on."""
        return np.array([step.takes(*place.names, head=place.head) for place in self.places])


def fits(statistics: Statistics) -> bool:
    """Return whether the model is small enough for gradients of all weights beside it, and lies on one
    device.
    """
    model = statistics.task.model
    device = next(model.parameters()).device.type
    return streams_to(model) is None and sum(
        weight.numel() for weight in model.parameters()
    ) <= MOST_WEIGHTS.get(device, 0)


def samples_of(statistics: Statistics, progress: Progress = no_progress) -> list[LayerSample]:
    """Return the samples of every layer that takes part in the loss: one pass over the calibration data
    forward, one backward.

    All is kept in `statistics`; `statistics.progress`, which belongs to what may run beside this, is left
    alone.

    Raises:
        CompressionError: a layer's inputs or gradients are not finite.
    """

    def compute() -> list[LayerSample]:
        task = statistics.task
        felt = statistics.once("gradients", lambda: gradients(task, progress), lasting=True)
        moments = statistics.once(
            "second moments", lambda: second_moments(task, progress), lasting=True
        ).matrices
        return [
            sample(layer, felt[name], moments[name])
            for name, layer in find_layers(task.model)[0].items()
            if name in felt and name in moments
        ]

    return statistics.once("layer samples", compute)


def prior_of(statistics: Statistics, progress: Progress = no_progress) -> Prior:
    """Return the prior of a model, without tables yet. Arguments and errors as `samples_of`."""
    head = output_head(statistics.task.model)
    samples = samples_of(statistics, progress)
    places = tuple(
        Place(
            about.layer.names,
            about.layer.name == head or bool(about.layer.reserved),
            shape_of(about.layer.module),
        )
        for about in samples
    )
    loads = [
        weighed(about.weight, about) * (about.layer.shape[0] / len(about.weight)) / 2 for about in samples
    ]
    kinds = (*(method.kind for method in METHODS if method.errors is not None), WHOLE)
    felt = torch.stack(loads).double().cpu().numpy() if loads else np.zeros(0)
    model = statistics.task.model
    return Prior(places, felt, kinds, vocabulary=vocabulary_of(model, statistics.layers.values()))


# --- from nats to the metric


@dataclass(frozen=True)
class Link:
    """How a predicted change of the loss shows in the metric: most * (1 - exp(-(e^scale * sum_k e^w_k
    S_k)^power)).

    `most` is what a destroyed model loses; S_k are contributions by kind of step in nats, w_k their weights.
    """

    most: float
    ratio: bool  # the values are logarithms of a ratio: nats
    scale: float = 0.0
    power: float = 1.0
    weights: tuple[float, ...] = ()

    @classmethod
    def usual(cls, most: float, kinds: int, *, ratio: bool) -> Link:
        """Return the link before anything is measured: nats are nats.

        What accuracies do was found on `fashion-cnn` and `fashion-vit`.
        """
        scale, power = (-float(np.log(most)), 1.0) if ratio else FALL
        return cls(most, ratio, scale, power, (0.0,) * kinds)

    def at(self, contributions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values of contributions [n, kinds], as [n]."""
        return curve_of(parameters(self), contributions, self.most)

    def strength(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return values of this link as coordinates from 0 to 1."""
        coordinates: NDArray[np.float64] = -np.expm1(-values) if self.ratio else values / self.most
        return coordinates

    def doubt(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how far off values of this link may be before anything else is known: most in the middle of
        the fall.
        """
        return doubt_of(values, self.most, ratio=self.ratio)

    def fitted(self, contributions: NDArray[np.float64], values: NDArray[np.float64]) -> Link:
        """Return the link that fits measured values [n]: least squares in units of doubt, held near the
        present parameters.
        """
        from scipy.optimize import least_squares  # takes a third of a second, which no import of ours should

        start = parameters(self)
        spread = np.array([1.0, 0.3, *[0.7] * len(self.weights)])

        def residuals(at: NDArray[np.float64]) -> NDArray[np.float64]:
            values_at = curve_of(at, contributions, self.most)
            both: NDArray[np.float64] = np.concatenate(
                [
                    (values_at - values) / doubt_of(values_at, self.most, ratio=self.ratio),
                    (at - start) / spread,
                ]
            )
            return both

        solution = least_squares(
            residuals, start, method="lm", ftol=1e-4, xtol=1e-4, max_nfev=400
        ).x  # Levenberg 1944, Marquardt 1963
        return dataclasses.replace(
            self,
            scale=float(solution[0]),
            power=power_of(solution),
            weights=tuple(float(x) for x in solution[2:]),
        )


def parameters(link: Link) -> NDArray[np.float64]:
    """Return the parameters of a link that a ledger can move: [scale, power, *weights]."""
    return np.array([link.scale, link.power, *link.weights])


def power_of(at: NDArray[np.float64]) -> float:
    """Return the power, never so small that any change at all is the end."""
    return float(np.clip(at[1], 0.3, 3.0))


def curve_of(at: NDArray[np.float64], contributions: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Return the values of contributions [n, kinds] under parameters."""
    weighed = contributions @ np.exp(np.clip(at[2:], -5, 5))
    values: NDArray[np.float64] = -most * np.expm1(
        -((np.exp(np.clip(at[0], -20, 20)) * weighed) ** power_of(at))
    )
    return values


def doubt_of(values: NDArray[np.float64], most: float, *, ratio: bool) -> NDArray[np.float64]:
    """Return the spread of what is measured about predicted values: a floor, and a part that grows with the
    change.
    """
    if ratio:
        return FLOOR + RATIO_DOUBT * np.abs(values)
    share = np.clip(values / most, 0.0, 1.0)
    spread: NDArray[np.float64] = most * (FLOOR + DOUBT * share * (1 - share))
    return spread
