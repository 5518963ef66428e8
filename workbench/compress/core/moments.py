"""The second moments of what a layer reads, also where it is one of several factors of a dense layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from torch import Tensor

from workbench.errors import LayerSkipped
from workbench.modules.factored import carried, shape_of
from workbench.modules.input_quantizer import acting_weight
from workbench.modules.layer import Layer
from workbench.modules.visiting import visiting

if TYPE_CHECKING:
    from workbench.compress.core.context import Work

T = TypeVar("T")

NO_MOMENT = (
    "it is an embedding: its rows are looked up, so its inputs have no second moment; take a criterion that"
    " reads weights only, such as magnitude"
)


def second_moment_of(layer: Layer, work: Work) -> Tensor:
    """Return E[x x^T] of what a layer's matrix is multiplied by, in the dense model, float32.

    For a later factor of a low-rank layer it follows from those in front; where inputs are smoothed, x is
    divided already.

    Raises:
        LayerSkipped: the layer is an embedding, or sees no input during calibration.
    """
    dense = shape_of(work.task.model.get_submodule(layer.origin))
    if dense.table:
        raise LayerSkipped(layer.name, NO_MOMENT)
    moment = work.statistics.second_moment(layer.origin)
    whole = layer.place or layer.origin
    reads = layer if layer.rank is None else work.layers[f"{whole}.0"]
    if reads.columns is not None:  # some of the dense layer's inputs were removed
        moment, dense = moment[reads.columns][:, reads.columns], replace(dense, columns=len(reads.columns))
    place = 0 if layer.rank is None else int(layer.name.rpartition(".")[2])
    if place:
        before = [work.layers[f"{whole}.{index}"] for index in range(place)]
        with visiting(before):
            seen = carried([acting_weight(factor.module).detach().float() for factor in before], dense)
        moment = seen @ moment @ seen.t()
    return smoothed(moment, layer)


def smoothed(moment: Tensor, layer: Layer) -> Tensor:
    """Return E[x x^T] of a layer's inputs once they are divided by what smoothing moved into the weights."""
    smooth = layer.smooth
    return moment if smooth is None else moment / (smooth.unsqueeze(1) * smooth)


def source_of(layer: Layer, work: Work) -> str | None:
    """Return the first layer whose inputs' second moment in the dense model is this one's as it is, None
    where it has one of its own.

    What follows from the moment is the same for all layers of one source, and from one move to the next.
    """
    first = layer.rank is None or layer.name.endswith(".0")
    if layer.table or layer.columns is not None or layer.smooth is not None or not first:
        return None
    return work.statistics.moments().readers.get(layer.origin)


def by_source(
    layers: Sequence[Layer],
    work: Work,
    options: Hashable,
    compute: Callable[[list[Layer]], T],
    source: Callable[[Layer], str | None] | None = None,
) -> list[tuple[T, int]]:
    """Return (a stack, the place in it) of what follows from each layer's second moment, where
    `compute(layers)` makes a stack at once.

    Layers of one source (`source_of`, unless `source` says otherwise) share one place, kept for the next move
    under `options`; all others are computed each time.
    """
    sources = [(source_of(layer, work) if source is None else source(layer)) for layer in layers]
    first_of = {
        name: layer
        for name, layer in zip(reversed(sources), reversed(layers), strict=True)
        if name is not None
    }  # the first of each
    names = list(dict.fromkeys(name for name in sources if name is not None))
    kept = (
        dict(
            zip(
                names,
                work.statistics.stacked(
                    options, names, lambda places: compute([first_of[names[place]] for place in places])
                ),
                strict=True,
            )
        )
        if names
        else {}
    )
    own = [layer for layer, name in zip(layers, sources, strict=True) if name is None]
    computed = compute(own) if own else None
    fresh = iter(range(len(own)))
    return [kept[name] if name is not None else (cast("T", computed), next(fresh)) for name in sources]
