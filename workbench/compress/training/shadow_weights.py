"""The float32 copies that training moves in the place of rounded weights, layers of one shape together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch, grouped
from workbench.compress.training.lsq import gradients, steps_of, with_steps
from workbench.formats.stored_forms import Form, InputScaled, split
from workbench.modules.layer import Layer
from workbench.util.library_internals import copy_each


@dataclass
class Hidden:
    """Layers of one shape and form while they are trained; mutable.

    `values` float32 [layers, outputs, inputs] is what the optimizer moves; `form` is what it rounds to, and
    what the modules hold. `logarithms` of the step sizes move too where they are learned, else None: so they
    stay positive, and change by a fraction at a time. `half` says which layers' step sizes are stored in
    float16.
    """

    batch: Batch
    values: Tensor
    form: Form
    half: tuple[bool, ...]
    masks: Tensor | None
    logarithms: Tensor | None = None

    def take_gradients(self) -> None:
        """Hand the gradients of the rounded weights to the hidden ones straight through, and none to pruned
        weights; with learned steps as LSQ does.
        """
        by_layer = [layer.parameter.grad for layer in self.batch.layers]
        if all(gradient is None for gradient in by_layer):
            return
        stack = torch.stack(
            [
                (
                    torch.zeros_like(self.values[index])
                    if gradient is None
                    else layer.as_matrix(gradient).float()
                )
                for index, (layer, gradient) in enumerate(zip(self.batch.layers, by_layer, strict=True))
            ]
        )
        if self.masks is not None:
            stack.mul_(self.masks)
        if self.logarithms is None:
            self.values.grad = stack
            return
        steps = steps_of(self.form)
        assert steps is not None  # noqa: S101  for the type checker: without steps there are no logarithms
        self.values.grad, by_step = gradients(self.form, self.values, stack)
        self.logarithms.grad = by_step * steps

    def settle(self) -> None:
        """Round the hidden weights to the grid, with its new step sizes if they are learned, and store them
        into the modules.
        """
        if self.masks is not None:
            self.values.mul_(self.masks)
        if self.logarithms is not None:
            self.form = with_steps(
                self.form,
                self.logarithms.exp(),
                torch.tensor(self.half, device=self.values.device)[:, None, None],
            )
        self.form = self.form.snap(self.values)
        parameters = [layer.parameter.data for layer in self.batch.layers]
        copy_each(
            parameters,
            [
                layer.as_stored(matrix)
                for layer, matrix in zip(self.batch.layers, self.form.dequantize(), strict=True)
            ],
        )

    def finish(self) -> None:
        """Leave each layer its own form."""
        for layer, form in zip(self.batch.layers, split(self.form, self.half), strict=True):
            layer.grid = form


def hidden_copies(
    layers: Iterable[Layer], start: Callable[[Batch], Tensor], *, learn_steps: bool
) -> list[Hidden]:
    """Return the hidden copies of the layers that lie on a grid.

    `start(batch)` is where they begin, float32 [layers, outputs, inputs].
    """
    copies = []
    for batch in grouped(layer for layer in layers if layer.grid is not None):
        form = batch.grids()
        masks = batch.masks()
        steps = steps_of(form) if learn_steps else None
        half = tuple(stored_in_half(layer.grid) for layer in batch.layers if layer.grid is not None)
        copies.append(Hidden(batch, start(batch), form, half, masks, None if steps is None else steps.log()))
    return copies


def stored_in_half(form: Form) -> bool:
    """Return whether a form's step sizes are float16."""
    scale = getattr(form.base if isinstance(form, InputScaled) else form, "scale", None)
    return scale is not None and scale.dtype == torch.float16
