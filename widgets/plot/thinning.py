"""Which of many points are drawn; pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from workbench.ledger.pareto import Cost, costs_of, drops_of, quality_of, spending
from workbench.measure.measurement import Measurement

MOST = 250  # points drawn; a browser needs a third of a second for 5,000


def thin(
    rows: Sequence[Measurement],
    cost: Cost,
    most: int = MOST,
    *,
    metric: str | None = None,
    keep: Collection[str] = (),
) -> list[Measurement]:
    """Return at most about `most` rows: all that nothing beats in both quality and cost, those in `keep`, and
    the newest others.

    Those that lack the cost or the metric are left out.
    """
    read = spending(cost)
    triples = [
        (row, quality, spent)
        for row in rows
        if (spent := read(row)) is not None and (quality := quality_of(row, metric)) is not None
    ]
    if len(triples) <= most:
        return [row for row, _, _ in triples]
    drops, costs = drops_of(triples)[0], costs_of(triples, cost)[0]
    order = np.lexsort((drops, costs))
    best_before = np.fmin.accumulate(np.append(np.inf, drops[order]))[:-1]
    front = {triples[index][0].key for index in order[drops[order] < best_before]} | set(keep)
    newest = {row.key for row, _, _ in triples[-max(1, most - len(front)) :]}
    return [row for row, _, _ in triples if row.key in front or row.key in newest]
