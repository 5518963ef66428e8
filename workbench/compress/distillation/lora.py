"""LoRA: a low-rank change of each weight, the only thing that learns.

Added to the weight at the end, so that nothing stays behind.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workbench.compress.core.batch import Batch, grouped
from workbench.modules.layer import Layer
from workbench.tasks.base import Items, Kind
from workbench.util.library_internals import parameters_of


class Adapters(nn.Module):
    """Changes (alpha / r) U D of weights, r = min(rank, the matrix's full rank), layers of one shape together
    (Hu et al. 2021).

    `ups` are U [layers, outputs, r], zero at the start, `downs` D [layers, r, inputs], normal with variance 1
    / inputs. `projections` [width of the student, width of the teacher] learn along with them where they are
    given, and are dropped at the end. All are float32. The change is formed and added to the weight in every
    forward pass: so it works on whatever multiplies by the weight, a mask holds, and folding changes no bit
    of the outputs. It saves the memory of the optimizer, not that of the weights' gradients.
    """

    def __init__(
        self, batches: list[Batch], rank: int, alpha: float, seed: int, projections: list[Tensor]
    ) -> None:
        """Draw the start from `seed`; the layers are not changed before `fold`."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        ups, downs, scales = [], [], []
        for batch in batches:
            rows, columns = batch.shape
            r, device = min(rank, rows, columns), batch.layers[0].parameter.device
            ups.append(nn.Parameter(torch.zeros(len(batch.layers), rows, r, device=device)))
            downs.append(
                nn.Parameter(
                    (torch.randn(len(batch.layers), r, columns, generator=generator) * columns**-0.5).to(
                        device
                    )
                )
            )
            scales.append(alpha / r)
        self.ups, self.downs = nn.ParameterList(ups), nn.ParameterList(downs)
        self.scales = tuple(scales)
        self.projections = nn.ParameterList([nn.Parameter(projection.clone()) for projection in projections])

    def changes(self) -> list[Tensor]:
        """Return the change of each batch's weights, float32 [layers, outputs, inputs], before any mask."""
        return [
            scale * (up @ down) for up, down, scale in zip(self.ups, self.downs, self.scales, strict=True)
        ]

    def count(self) -> int:
        """Return how many numbers learn."""
        return sum(parameter.numel() for parameter in self.parameters())


class Adapted(nn.Module):
    """A model whose adapted weights are replaced while it is called; it is itself left as it is."""

    def __init__(self, model: nn.Module, kind: Kind, layers: list[Layer]) -> None:
        """Copy the weights that are to be adapted, and their masks."""
        super().__init__()
        self.model, self.kind = model, kind
        self.batches = list(grouped(layers))
        self.starts = [batch.matrices() for batch in self.batches]
        self.masks = [batch.masks() for batch in self.batches]

    def forward(self, items: Items) -> Tensor:
        """Return the model's outputs for items that lie on its device."""
        return self.kind.logits(self.model, items)

    def logits(self, items: Items, changes: list[Tensor]) -> Tensor:
        """Return the outputs with `changes` (of each batch, [layers, outputs, inputs]) added to the
        weights.
        """
        weights = {}
        for batch, stack in zip(self.batches, self.changed(changes), strict=True):
            for layer, matrix in zip(batch.layers, stack.unbind(), strict=True):
                stored = layer.as_stored(
                    matrix
                    # As `Batch.write` lays it out: for a transposed one a GPU takes another kernel, which
                    # rounds otherwise
                ).contiguous()
                weights[f"model.{layer.name}.weight"] = stored.to(layer.parameter.dtype)
        logits: Tensor = functional_call(self, weights, (items,))
        return logits

    def changed(self, changes: list[Tensor]) -> list[Tensor]:
        """Return the weights with changes added, float32 [layers, outputs, inputs] of each batch.

        What a mask prunes stays zero.
        """
        return [
            start + (change if mask is None else change * mask)
            for start, change, mask in zip(self.starts, changes, self.masks, strict=True)
        ]

    def fold(self, changes: list[Tensor]) -> None:
        """Write the changed weights into the layers, in each module's dtype.

        Raises:
            CompressionError: a weight is not finite.

        """
        for batch, stack in zip(self.batches, self.changed(changes), strict=True):
            batch.write(stack.detach())


def without_gradients(model: nn.Module) -> None:
    """Make every parameter one that no gradient is computed for.

    The values stay where they are, and other models that share them as they are.
    """
    frozen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parameters = parameters_of(module)
        for name, parameter in parameters.items():
            # no public way replaces a parameter by one that is tied
            if parameter is not None and parameter.requires_grad:
                parameters[name] = frozen.setdefault(
                    id(parameter), nn.Parameter(parameter.detach(), requires_grad=False)
                )


def mean_of(several: list[Adapters]) -> list[Tensor]:
    """Return the mean of the changes of adapters that were trained apart, for each batch: one model, no
    router.
    """
    with torch.no_grad():
        return [
            torch.stack(list(changes)).mean(0)
            for changes in zip(*(adapters.changes() for adapters in several), strict=True)
        ]
