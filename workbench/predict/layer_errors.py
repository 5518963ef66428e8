"""How far each layer's outputs move under a step, at every place of its slider, without running the step.

A table is made once for each set of choices that matters (a criterion, a grid, a factorisation) from a few
rows of every weight (`workbench.compress.core.layer_sample`), by the rule that the step's method states, and
then read within microseconds.

What it does not see: a budget shared out over layers (each is taken to get the same), and how layers
interact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.calibration.passes import full_precision
from workbench.compress.core.layer_sample import LayerSample
from workbench.compress.method import ErrorTable, Recovery, WholeTable
from workbench.compress.registry import METHODS
from workbench.recipe import Step
from workbench.util.progress import Progress, no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from workbench.calibration.statistics import Statistics

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Curve:
    """Relative errors of all layers [layers, knots] at some places of a slider [knots], rising."""

    knots: NDArray[np.float64]
    errors: NDArray[np.float64]

    def at(self, value: float) -> NDArray[np.float64]:
        """Return the errors [layers] at a value, between knots by a straight line."""
        if len(self.knots) == 1:
            return self.errors[:, 0]
        place = float(
            np.clip(np.interp(value, self.knots, np.arange(len(self.knots))), 0, len(self.knots) - 1)
        )
        low = min(int(place), len(self.knots) - 2)
        share = place - low
        errors: NDArray[np.float64] = (1 - share) * self.errors[:, low] + share * self.errors[:, low + 1]
        return errors


def rule_of(step: Step) -> ErrorTable | WholeTable | Recovery | None:
    """Return the rule that the step's method states for its errors, None where it states none."""
    rule = METHODS.of(step).errors
    return None if rule is None else rule(step)


def key_of(step: Step) -> Key | None:
    """Return the key of a step's table, None for a step that has none."""
    rule = rule_of(step)
    return (step.kind(), *rule.key) if isinstance(rule, ErrorTable | WholeTable) else None


def whole_errors_of(
    table: WholeTable, statistics: Statistics, samples: list[LayerSample], progress: Progress = no_progress
) -> Tensor:
    """Return the errors of a step on the whole model, float64 [layers, knots] on the CPU; empty where the
    model has nothing that it takes. `progress` may raise to stop.
    """
    errors = table.errors(statistics, samples, progress)
    return torch.zeros(0) if errors is None else errors.double().cpu()


def errors_of(table: ErrorTable, samples: list[LayerSample], progress: Progress = no_progress) -> Tensor:
    """Return the errors of a step's choices over all layers, float64 [layers, knots] on the CPU.

    `progress` may raise to stop.
    """
    rows = []
    with torch.no_grad(), full_precision():
        for index, about in enumerate(samples):
            progress("predicted errors", index, len(samples))
            rows.append(table.errors(about))
        return torch.stack(rows).double().cpu()
