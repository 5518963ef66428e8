"""A value predicted from measured points: by a prior where there is one, with the points' residuals.

By the sliders alone elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workbench.predict.local_fit import Guess, Kernel, MeasuredValues, kernel_for, local_fit, residual_fit

if TYPE_CHECKING:
    from workbench.predict.prior import Costs, Link

LATEST = 400  # points, the newest, that a link is fitted to


@dataclass(frozen=True)
class Spot:
    """Where a recipe stands: a coordinate and a mark of the other choices for each method.

    `costs` in nats by kind, if known; `unknown` are the places of methods of which no rule says how they
    change the value.
    """

    place: tuple[float, ...]
    mark: tuple[int, ...]
    costs: Costs | None = None
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True)
class History:
    """Measured values as a local fit reads them (`measured`), and as a prior leaves them over (`residuals`,
    in units of its doubt).
    """

    measured: MeasuredValues
    link: Link | None
    residuals: MeasuredValues | None
    kernel: Kernel | None = None

    def guess(self, spot: Spot) -> Guess:
        """Return the prediction of the value at a spot: within milliseconds, whatever the number of
        points.
        """
        mark = np.array(spot.mark)
        if spot.unknown:
            return self.guess_unknown(spot)
        if self.link is None or self.residuals is None or self.kernel is None or spot.costs is None:
            return local_fit(self.measured, np.array(spot.place), mark)
        prior = self.link.at(spot.costs.most[None])
        doubt = float(self.link.doubt(prior)[0])
        left = residual_fit(
            self.residuals, self.kernel, np.array([*spot.place, *self.link.strength(prior)]), mark
        )
        highest = max(self.link.most, float(self.measured.values.max()))
        value = min(float(prior[0]) + left.value * doubt, highest)
        spare = float(prior[0] - self.link.at(spot.costs.least[None])[0])
        return Guess(value, left.half * doubt, left.near, left.wide, spare)

    def guess_unknown(self, spot: Spot) -> Guess:
        """Return the fit of points with the very same settings of the methods without a rule, and nothing at
        all (NaN) where there are none: no other point stands for what these do.
        """
        here = list(spot.unknown)
        same = (self.measured.marks[:, here] == np.array(spot.mark)[here]).all(1)
        if not same.any():
            return Guess(math.nan, math.inf, 0, wide=True)
        alike = MeasuredValues(
            self.measured.places[same], self.measured.marks[same], self.measured.values[same]
        )
        return local_fit(alike, np.array(spot.place), np.array(spot.mark))


def history(spots: Sequence[Spot], values: Sequence[float], link: Link | None = None) -> History:
    """Return the history of measured points; `link` is the one to start from, None without a prior.

    The first spot should be the dense model's, whose value is 0. Points without costs help where
    there is no prior only.
    """
    places, marks, value_array = (
        np.array([spot.place for spot in spots]),
        np.array([spot.mark for spot in spots]),
        np.array(values, dtype=float),
    )
    measured = MeasuredValues(places, marks, value_array)
    told = [(index, spot.costs) for index, spot in enumerate(spots) if spot.costs is not None]
    if link is None:
        return History(measured, None, None)
    costs = np.array([each.most for _, each in told]).reshape(len(told), -1)
    places_told = [index for index, _ in told]
    own = np.clip(value_array[places_told], None, link.most)
    if len(told) > 1:
        link = link.fitted(costs[-LATEST:], own[-LATEST:])
    prior = link.at(costs) if told else np.zeros(0)
    residuals = MeasuredValues(
        np.column_stack([places[places_told], link.strength(prior)]),
        marks[places_told],
        (own - prior) / link.doubt(prior),
    )
    return History(measured, link, residuals, kernel_for(residuals))
