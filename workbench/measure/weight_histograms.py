"""The weights of one layer before and after, as histograms: small records made from the tensors
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.core.layer_report import multiplied, spread_out
from workbench.modules.input_quantizer import acting_weight
from workbench.modules.layer import Layer

if TYPE_CHECKING:
    from torch import nn

    from workbench.compress import Compressed

BINS = 60


@dataclass(frozen=True)
class WeightChange:
    """One layer's weights in the same bins before and after; exact zeros are counted apart, in no bin.

    `edges` has one number more than the counts. Of a layer of low rank, `after` is the product of its two
    factors, which is what it multiplies by; the zeros that pruning left in the factors are not zeros of the
    product.
    """

    name: str
    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    zeros_before: int
    zeros_after: int

    @property
    def weights(self) -> int:
        """Return the number of weights, zeros included."""
        return sum(self.before) + self.zeros_before


def weight_changes(
    dense: nn.Module, compressed: Compressed, first: str = "", bins: int = BINS
) -> Iterator[WeightChange]:
    """Yield the change of every layer of the report, the one named `first` before all others.

    Parameters that are no module's weight, which the report lists too, stay as they are and have none.
    """
    modules = dict(dense.named_modules())
    names = sorted(
        (row.name for row in compressed.report if row.name in modules), key=lambda name: name != first
    )
    for name in names:
        yield weight_change(name, weight_of(dense, name), weight_now(dense, compressed, name), bins)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a layer as it multiplies, float32 [weights]: for two factors their product."""
    return acting_weight(model.get_submodule(name)).detach().float().flatten()


def weight_now(dense: nn.Module, compressed: Compressed, name: str) -> Tensor:
    """Return the weight of a dense model's layer as it multiplies now, float32 [weights], zero where rows,
    columns or the whole block were removed.
    """
    layers = [layer for layer in compressed.layers if layer.origin == name]
    if any(
        row.name == name and not row.weights and row.relative_error == 1 for row in compressed.report
    ):  # not one that shares another's weight
        return torch.zeros_like(weight_of(dense, name))
    if not layers or all(layer.rows is None and layer.columns is None for layer in layers):
        return weight_of(compressed.model, layers[0].place or name if layers else name)
    whole = Layer(name, name, dense.get_submodule(name))
    matrix = whole.as_matrix(whole.parameter)
    return spread_out(
        multiplied([layers], whole), [layers], torch.empty_like(matrix, dtype=torch.float32).unsqueeze(0)
    ).flatten()


def weight_change(name: str, before: Tensor, after: Tensor, bins: int = BINS) -> WeightChange:
    """Return the histograms of two float32 vectors, [weights], over the range of both."""
    low, high = (
        float(x)
        for x in torch.aminmax(
            torch.cat(
                [
                    before.aminmax().min[None],
                    before.aminmax().max[None],
                    after.aminmax().min[None],
                    after.aminmax().max[None],
                ]
            )
        )
    )
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, bins + 1, device=before.device)
    counts = [counted(values, edges) for values in (before, after)]
    zeros = [int((values == 0).sum()) for values in (before, after)]
    return WeightChange(name, tuple(edges.tolist()), counts[0], counts[1], zeros[0], zeros[1])


def counted(values: Tensor, edges: Tensor) -> tuple[int, ...]:
    """Return how many non-zero values lie in each bin [edge, next edge); the last bin holds its end too."""
    bins = len(edges) - 1
    index = torch.bucketize(values[values != 0], edges, right=True).sub_(1).clamp_(0, bins - 1)
    counts: Sequence[int] = torch.bincount(index, minlength=bins).tolist()
    return tuple(counts)
