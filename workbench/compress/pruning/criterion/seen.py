"""What a criterion of pruning may look at: weights of layers, and what calibration says about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

Statistic = Literal["moments", "gradients"]


class Seen(ABC):
    """What a criterion may look at: weights of layers of one shape, and what calibration says about them.

    Nothing of it is to be changed: other moves read the same tensors.
    """

    weights: Tensor  # float32 [layers, outputs, inputs]

    @abstractmethod
    def input_norms(self) -> Tensor:
        """Return sqrt(E[x_i^2]) of each layer's inputs, float32 [layers, inputs]; reads moments."""

    @abstractmethod
    def mean_gradients(self) -> Tensor:
        """Return E[g] of the loss by each weight, float32 [layers, outputs, inputs]; reads gradients."""

    @abstractmethod
    def squared_gradients(self) -> Tensor:
        """Return E[g^2] of the loss by each weight, float32 [layers, outputs, inputs]; reads gradients."""

    @abstractmethod
    def removal_errors(self) -> Tensor:
        """Return the squared output error of removing each weight once the weights after it have made up for
        it, w^2 / d^2, float32 [layers, outputs, inputs]; d is the diagonal of the Cholesky factor of the
        inverse second moment, and 0 is for inputs that are never read. Reads moments.
        """

    @abstractmethod
    def random(self, seed: int) -> Tensor:
        """Return numbers drawn from [0, 1), float32 [layers, outputs, inputs], by the seed and the layer."""
