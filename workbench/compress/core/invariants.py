"""What is verified after every step, on the tensors themselves: promises hold, and weights are finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch, grouped
from workbench.errors import CompressionError
from workbench.formats.affine import Grid
from workbench.kernels import weight_passes, weight_trials
from workbench.modules.layer import Layer
from workbench.modules.offload import streams_to


def check_all(layers: Sequence[Layer], dense: Mapping[str, Layer]) -> None:
    """Verify every promise of every layer on the tensors themselves, and that what was written is finite.

    Waits for the device once or twice.

    Args:
        layers: of the model as it is.
        dense: those of the dense model, by name: what was done to a weight is noted while it is read.

    Raises:
        CompressionError: a weight is infinite or NaN.
        BrokenPromiseError: see `Layer.check`, which words what is broken.
    """
    look_over([layer for layer in layers if not layer.pristine], dense)
    unseen = [layer for layer in layers if layer.change is None]
    flags = [flag for batch in grouped(unseen) if (flag := batch.broken()) is not None]
    ranks = any(layer.rank is not None and layer.rank not in layer.parameter.shape for layer in layers)
    seen = any(layer.change is not None and layer.change.wrong for layer in layers)
    if ranks or seen or (flags and bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any())):
        for batch in grouped(layers):
            for layer in batch.layers:
                if (
                    not layer.finite
                    and not layer.pristine
                    and not bool(torch.isfinite(layer.parameter).all())
                ):
                    raise CompressionError(
                        f"layer {layer.name!r} {batch.shape} became infinite or NaN: the step is too strong"
                        " for it"
                    )
                layer.check()
    for layer in layers:
        layer.finite = layer.finite or not layer.pristine


def look_over(layers: Sequence[Layer], dense: Mapping[str, Layer]) -> None:
    """Note in `Layer.change` what became of each weight since the dense model, where one kernel can see it:
    see `workbench.kernels.weight_passes`.

    Waits for the device once. Weights of another shape than the dense one, streamed ones, or those stored in
    another form than affine integers, are left.
    """
    fits = [layer for layer in layers if layer.change is None and comparable(layer, dense.get(layer.origin))]
    tables: list[tuple[Batch, Tensor]] = []
    for batch in grouped(fits, whole=True):
        stacks = [
            [layer.as_matrix(version.parameter.detach()) for version in (dense[layer.origin], layer)]
            for layer in batch.layers
        ]
        masks = [layer.mask for layer in batch.layers if layer.mask is not None]
        grids = [layer.grid for layer in batch.layers if isinstance(layer.grid, Grid)]
        before, now = [stack[0] for stack in stacks], [stack[1] for stack in stacks]
        if weight_trials.suited(now, before, masks, [grid.codes for grid in grids]) and all(
            part.is_contiguous()
            for grid in grids
            for part in (grid.scale, grid.zero_point)
            if part is not None
        ):
            tables.append((batch, weight_passes.survey(before, now, masks or None, grids or None)))
    if not tables:
        return
    changes = iter(weight_passes.changes(torch.cat([table.to(tables[0][1].device) for _, table in tables])))
    for batch, _ in tables:
        for layer in batch.layers:
            layer.looked = layer.parameter, layer.mask, layer.grid, next(changes)


def comparable(layer: Layer, dense: Layer | None) -> bool:
    """Return whether a weight stands for the whole of a dense one of its shape, and multiplies what that is
    given.
    """
    if (
        dense is None
        or streams_to(layer.parameter) is not None
        or layer.rank is not None
        or layer.role
        or layer.transposed
        or layer.rows is not None
        or layer.columns is not None
    ):
        return False
    ours, theirs = layer.parameter, dense.parameter
    same = (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    return same and (layer.grid is None or isinstance(layer.grid, Grid)) and layer.smooth is None
