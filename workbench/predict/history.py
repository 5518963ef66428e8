"""A value predicted from measured points: by a prior where there is one, with the points' residuals.

By the sliders alone elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workbench.predict.local_fit import Guess, Kernel, Known, kernel_for, local_fit, residual_fit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from workbench.predict.prior import Link

LATEST = 400  # points, the newest, that a link is fitted to


@dataclass(frozen=True)
class Spot:
    """Where a recipe stands: a coordinate and a mark of the other choices for each method.

    Contributions in nats by kind, if known.
    """

    place: tuple[float, ...]
    mark: tuple[int, ...]
    contributions: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class History:
    """Measured values as a local fit reads them (`known`), and as a prior leaves them over (`residuals`, in
    units of its doubt).
    """

    known: Known
    link: Link | None
    residuals: Known | None
    kernel: Kernel | None = None

    def guess(self, spot: Spot) -> Guess:
        """Return the prediction of the value at a spot: within milliseconds, whatever the number of
        points.
        """
        mark = np.array(spot.mark)
        if self.link is None or self.residuals is None or self.kernel is None or spot.contributions is None:
            return local_fit(self.known, np.array(spot.place), mark)
        prior = self.link.at(spot.contributions[None])
        doubt = float(self.link.doubt(prior)[0])
        left = residual_fit(
            self.residuals, self.kernel, np.array([*spot.place, *self.link.strength(prior)]), mark
        )
        highest = max(self.link.most, float(self.known.values.max()))
        value = min(float(prior[0]) + left.value * doubt, highest)
        return Guess(value, left.half * doubt, left.near, left.wide)


def history(spots: Sequence[Spot], values: Sequence[float], link: Link | None = None) -> History:
    """Return what measured points teach; `link` is the one to start from, None without a prior.

    The first spot should be the dense model's, whose value is 0. Points without contributions help where
    there is no prior only.
    """
    places, marks, found = (
        np.array([spot.place for spot in spots]),
        np.array([spot.mark for spot in spots]),
        np.array(values, dtype=float),
    )
    known = Known(places, marks, found)
    told = [index for index, spot in enumerate(spots) if spot.contributions is not None]
    if link is None:
        return History(known, None, None)
    contributions = np.array([spots[index].contributions for index in told]).reshape(len(told), -1)
    own = np.clip(found[told], None, link.most)
    if len(told) > 1:
        link = link.fitted(contributions[-LATEST:], own[-LATEST:])
    prior = link.at(contributions) if told else np.zeros(0)
    residuals = Known(
        np.column_stack([places[told], link.strength(prior)]), marks[told], (own - prior) / link.doubt(prior)
    )
    return History(known, link, residuals, kernel_for(residuals))
