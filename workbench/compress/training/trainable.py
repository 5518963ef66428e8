"""What moves while a model is trained: its free parameters and the hidden copies of those on a grid.

Taken down, and put back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workbench.compress.training.shadow_weights import Hidden
from workbench.modules.layer import Layer
from workbench.util.library_internals import largest_of_each


@dataclass
class Moving:
    """The tensors that an optimizer changes; mutable.

    `parameters` are trained as they are, `hidden` stand for weights on a grid.
    """

    layers: list[Layer]
    parameters: list[nn.Parameter]
    hidden: list[Hidden]
    stored: dict[Tensor, torch.dtype] = field(default_factory=dict)  # what `widen` found

    @property
    def weights(self) -> list[Tensor]:
        """Return the tensors that move at the rate of weights."""
        return [*self.parameters, *(copy.values for copy in self.hidden)]

    @property
    def steps(self) -> list[Tensor]:
        """Return the logarithms of step sizes that are learned."""
        return [copy.logarithms for copy in self.hidden if copy.logarithms is not None]

    def snapshot(self) -> list[Tensor]:
        """Return copies of all that moves."""
        return [tensor.detach().clone() for tensor in (*self.weights, *self.steps)]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Put a snapshot back, masks and grids included."""
        for tensor, before in zip((*self.weights, *self.steps), snapshot, strict=True):
            tensor.copy_(before)
        self.hold()

    def pass_through(self) -> None:
        """Hand each gridded weight's gradient to its hidden copy, and none to pruned weights."""
        for layer in self.layers:
            if layer.mask is not None and layer.grid is None and layer.parameter.grad is not None:
                layer.parameter.grad.mul_(layer.as_stored(layer.mask))
        for copy in self.hidden:
            copy.take_gradients()

    @torch.no_grad()
    def hold(self) -> None:
        """Bring the weights back to their masks and grids after they have moved."""
        for layer in self.layers:
            if layer.mask is not None and layer.grid is None:
                layer.parameter.mul_(layer.as_stored(layer.mask))
        for copy in self.hidden:
            copy.settle()

    def largest_gradient(self) -> Tensor:
        """Return the largest absolute value in all gradients, a scalar float32.

        NaN or infinite where one of them is.
        """
        gradients = [
            tensor.grad
            for tensor in (*self.weights, *self.steps)
            if tensor.grad is not None and tensor.numel()
        ]
        return (
            torch.stack([norm.float() for norm in largest_of_each(gradients)]).max()
            if gradients
            else torch.zeros(())
        )

    def finite(self) -> bool:
        """Return whether every number that moves is finite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in (*self.weights, *self.steps))

    def widen(self, model: nn.Module) -> None:
        """Hold all 16-bit parameters and buffers in float32 until `narrow`: a step that is small against a
        weight would else be rounded away (Micikevicius et al. 2018).
        """
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype in {torch.float16, torch.bfloat16}:
                self.stored[tensor] = tensor.dtype
                tensor.data = tensor.data.float()

    def narrow(self) -> None:
        """Round parameters and buffers to the types that they had; their gradients must be gone."""
        for tensor, dtype in self.stored.items():
            tensor.data = tensor.data.to(dtype)
        self.stored.clear()
