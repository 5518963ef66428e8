"""The second moments of what a layer reads, also where it is one of several factors of a dense layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from workbench.compress.factors import carried, shape_of
from workbench.compress.layers import Layer
from workbench.compress.quantized_inputs import acting_weight
from workbench.errors import CompressionError

if TYPE_CHECKING:
    from workbench.compress.work import Work


def second_moment_of(layer: Layer, work: Work) -> Tensor:
    """Return E[x x^T] of what a layer's matrix is multiplied by, in the dense model, float32.

    For a later factor of a low-rank layer it follows from those in front; where inputs are smoothed, x is divided already.

    Raises:
        CompressionError: the layer is an embedding, or sees no input during calibration.

    """
    dense = shape_of(work.task.model.get_submodule(layer.origin))
    if dense.table:
        raise CompressionError(f"layer {layer.name!r} is an embedding: its rows are looked up, so its inputs have no second moment; take a criterion that reads weights only, such as magnitude")
    moment = work.statistics.second_moment(layer.origin)
    whole = layer.place or layer.origin
    reads = layer if layer.rank is None else work.layers[f"{whole}.0"]
    if reads.columns is not None:  # some of the dense layer's inputs were removed
        moment, dense = moment[reads.columns][:, reads.columns], replace(dense, columns=len(reads.columns))
    place = 0 if layer.rank is None else int(layer.name.rpartition(".")[2])
    if place:
        seen = carried([acting_weight(work.layers[f"{whole}.{index}"].module).detach().float() for index in range(place)], dense)
        moment = seen @ moment @ seen.t()
    return smoothed(moment, layer)


def smoothed(moment: Tensor, layer: Layer) -> Tensor:
    """Return E[x x^T] of a layer's inputs once they are divided by what smoothing moved into the weights."""
    smooth = layer.smooth
    return moment if smooth is None else moment / (smooth.unsqueeze(1) * smooth)
