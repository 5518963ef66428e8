"""What calibration says about the layers that are pruned: moments of their inputs, gradients of the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from workbench.calibration.passes import Gradients
from workbench.calibration.statistics import Statistics
from workbench.compress.core.context import Work
from workbench.compress.core.moments import second_moment_of, smoothed
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.options import Prune
from workbench.modules.layer import Layer


@dataclass(frozen=True)
class Evidence:
    """What calibration says about the layers: the dense model's (`dense`, kept from one move to the next), or
    a model's as it is now.
    """

    work: Work
    statistics: Statistics
    dense: bool

    def moment(self, layer: Layer) -> Tensor:
        """Return E[x x^T] of the layer's inputs."""
        return (
            second_moment_of(layer, self.work)
            if self.dense
            else smoothed(self.statistics.second_moment(layer.name), layer)
        )

    def rows(self, layer: Layer) -> int:
        """Return how many rows x that is averaged over."""
        return self.statistics.rows(layer.origin if self.dense else layer.name)

    def gradients(self, layer: Layer) -> Gradients:
        """Return the gradients of the loss by the layer's weight."""
        return self.statistics.gradients(layer.origin if self.dense else layer.name)


def evidence_for(step: Prune, work: Work, layers: list[Layer], *, now: bool = False) -> Evidence:
    """Return the dense model's statistics where they still say something about `layers`, else those of the
    model as it is.

    Second moments of inputs are the dense model's until something was trained (`now`): those of a factor
    follow from its layer's. Gradients are those of the weights as they are.
    """
    by_gradient = "gradients" in CRITERIA[step.criterion].reads or step.allocation == "sensitivity"
    if now or (by_gradient and not all(layer.pristine for layer in layers)):
        return Evidence(work, Statistics(replace(work.task, model=work.model), work.progress), dense=False)
    return Evidence(work, work.statistics, dense=True)
