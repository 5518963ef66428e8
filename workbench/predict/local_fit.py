"""Local fits over measured points, and intervals from their own residuals.

Where nothing else is known a value is a local linear regression over the sliders (`local_fit`). Where a prior
says what each point should be (`workbench.predict.prior`), what is left of it is a Gaussian process in units
of the prior's own doubt (`residual_fit`): close to measured points it follows them, far from all it returns
to the prior.

Intervals are weighted conformal ones (Tibshirani et al. 2019): a quantile of leave-one-out residuals,
weighted by nearness, that counts the unknown point as one more, so that too few neighbours give the widest
interval. With nearness as weights coverage holds about, not exactly: points are not drawn alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.9  # of every prediction's interval
NEAREST = 48  # points that a local fit looks at
WIDTHS = (0.1, 0.2, 0.4)  # of the neighbourhood, in slider coordinates; leave-one-out chooses


@dataclass(frozen=True)
class MeasuredValues:
    """Measured points as arrays: slider coordinates [n, d], marks of the other choices [n, d], values [n]."""

    places: NDArray[np.float64]
    marks: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Guess:
    """A fit: `half` is half the interval, infinite where nothing can be said.

    `wide`: too few of the `near` points are close for a real one. `spare` is by how much the value may be
    less than the interval says, where training may win back what was lost. A `value` of NaN: nothing is
    known.
    """

    value: float
    half: float
    near: int
    wide: bool
    spare: float = 0.0


def squared_distances(
    places: NDArray[np.float64], marks: NDArray[np.int64], at: NDArray[np.float64], mark: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return squared distances, [..., n].

    Other choices of a method that both use count like a fifth of its slider.
    """
    apart = ((places - at[..., None, :]) ** 2).sum(-1)
    differ = (marks != mark[..., None, :]) & (marks != 0) & (mark[..., None, :] != 0)
    squared: NDArray[np.float64] = apart + 0.04 * differ.sum(-1)
    return squared


def local_fit(
    measured: MeasuredValues, at: NDArray[np.float64], mark: NDArray[np.int64], level: float = LEVEL
) -> Guess:
    """Return the local linear fit at a place, and the weighted conformal quantile of its leave-one-out
    residuals.
    """
    order = np.argsort(squared_distances(measured.places, measured.marks, at, mark))[:NEAREST]
    x, marks, y = measured.places[order], measured.marks[order], measured.values[order]
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
    half = conformal(residuals, closeness, level)
    return Guess(value, half, int((closeness > 0.3).sum()), wide=not math.isfinite(half))


def linear(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    squared: NDArray[np.float64],
    at: NDArray[np.float64],
    width: float,
) -> NDArray[np.float64]:
    """Return local linear fits at the places `at` [m, d], with weights from `squared` distances [m, n].

    A small ridge keeps slopes calm.
    """
    weights = np.exp(-np.minimum(squared, 1e6) / (2 * width**2)) + 1e-9
    weights[~np.isfinite(squared)] = 0.0
    features = np.concatenate([np.ones((len(at), len(x), 1)), x[None] - at[:, None]], axis=2)  # [m, n, d + 1]
    weighted = features * weights[:, :, None]
    normal = np.einsum("mni,mnj->mij", weighted, features)
    ridge = np.eye(normal.shape[1]) * 0.05
    ridge[0, 0] = 1e-12
    fitted: NDArray[np.float64] = np.linalg.solve(
        normal + ridge, np.einsum("mni,n->mi", weighted, y)[..., None]
    )[:, 0, 0]
    return np.clip(fitted, y.min(), y.max())  # never beyond what was ever measured


def conformal(residuals: NDArray[np.float64], weights: NDArray[np.float64], level: float = LEVEL) -> float:
    """Return the weighted quantile of residuals in which the unknown point has weight 1 and an infinite
    residual.
    """
    order = np.argsort(residuals)
    reached = np.cumsum(weights[order]) / (weights.sum() + 1.0)
    index = int(np.searchsorted(reached, level))
    return math.inf if index >= len(order) else float(residuals[order[index]])


# --- what a prior leaves over

NEIGHBOURS = 96  # points that a fit of residuals looks at
REACH = 0.8  # how near, in coordinates, a residual must lie to count for an interval
KERNELS = (
    (0.2, 1.0),
    (0.1, 1.0),
    (0.4, 1.0),
    (0.2, 0.3),
    (0.4, 0.3),
    (0.8, 0.3),
    (0.2, 3.0),
    (0.4, 3.0),
)  # (width, noise); leave-one-out chooses
CHOOSING = 150  # points, the newest, that choose
FEWEST = 8  # of them before there is a choice
USUAL = (
    0.1,
    0.25,
    0.4,
    0.55,
    0.75,
    1.0,
    1.3,
    1.7,
    2.4,
    4.0,
)  # standardised residuals of a heavy-tailed fit (about Student's t, 3 degrees)
USUAL_WEIGHT = 5.0  # measured points that these count like, until there are some
UNKNOWN = 4.0  # doubts that an interval has on each side where there are too few points for another


@dataclass(frozen=True)
class Kernel:
    """How residuals hang together: how far, in coordinates, and how much of each is noise, as a multiple of
    what is shared.
    """

    width: float
    noise: float

    def inverse(self, between: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the inverse covariance of points with these squared distances [n, n].

        A step that is off is near by all of its settings, which are not near one another: such distances
        need not be those of a covariance. Where they are not, what is below the noise is raised to it.
        """
        covariance = np.exp(-between / (2 * self.width**2)) + self.noise * np.eye(len(between))
        inverted: NDArray[np.float64]
        try:
            np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(covariance)
            raised = np.maximum(values, self.noise)
            inverted = ((vectors / raised) @ vectors.T).astype(np.float64, copy=False)
        else:
            inverted = np.linalg.inv(covariance).astype(np.float64, copy=False)
        return inverted


def kernel_for(measured: MeasuredValues) -> Kernel:
    """Return the kernel whose leave-one-out residuals are smallest over the newest points.

    The dense point is the first one.
    """
    x, marks, y = measured.places[-CHOOSING:], measured.marks[-CHOOSING:], measured.values[-CHOOSING:]
    if len(y) < FEWEST:
        return Kernel(*KERNELS[0])
    between = squared_distances(x, marks, x, marks)
    kernels = [Kernel(*each) for each in KERNELS]
    return min(kernels, key=lambda kernel: float(np.abs(left_out(kernel.inverse(between), y)).mean()))


def left_out(inverse: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return value minus prediction of each point from all others (Rasmussen & Williams 2006, 5.12)."""
    residuals: NDArray[np.float64] = inverse @ values / inverse.diagonal()
    return residuals


def residual_fit(
    measured: MeasuredValues, kernel: Kernel, at: NDArray[np.float64], mark: NDArray[np.int64]
) -> Guess:
    """Return the fit of standardised residuals at a place, in units of the prior's doubt.

    `half` is never infinite.

    A Gaussian process of unit variance on the nearest points. The interval is a conformal quantile of
    standardised leave-one-out residuals in which `USUAL` ones stand for points that are not measured yet;
    `near` counts the measured ones.
    """
    if not len(measured.values):
        return Guess(0.0, UNKNOWN, 0, wide=True)
    apart = squared_distances(measured.places, measured.marks, at, mark)
    order = (
        np.argpartition(apart, NEIGHBOURS)[:NEIGHBOURS] if len(apart) > NEIGHBOURS else np.arange(len(apart))
    )
    x, marks, y, here = measured.places[order], measured.marks[order], measured.values[order], apart[order]
    close = np.exp(-here / (2 * REACH**2))
    inverse = kernel.inverse(squared_distances(x, marks, x, marks))
    shared = np.exp(-here / (2 * kernel.width**2))
    spread = math.sqrt(max(kernel.noise, 1 + kernel.noise - float(shared @ inverse @ shared)))
    scores = np.concatenate([np.abs(left_out(inverse, y)) * np.sqrt(inverse.diagonal()), USUAL])
    reach = conformal(scores, np.concatenate([close, np.full(len(USUAL), USUAL_WEIGHT / len(USUAL))]))
    half = reach * spread if math.isfinite(reach) else max(UNKNOWN, float(scores.max())) * spread
    return Guess(float(shared @ inverse @ y), half, int((close > 0.3).sum()), wide=not math.isfinite(reach))
