"""Layers of one shape worked on together: a GPU that is asked 200 times waits for the asking, not for the
work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.errors import CompressionError, LayerSkipped, WorkbenchError
from workbench.formats.stored_forms import Form, kind_of, stacked
from workbench.kernels import weight_trials
from workbench.modules.factored import Shape, shape_of
from workbench.modules.layer import Layer
from workbench.modules.offload import streams_to
from workbench.modules.visiting import visiting
from workbench.util.device import allowed_bytes
from workbench.util.library_internals import copy_each
from workbench.util.text import kind_and_words

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics
    from workbench.compress.core.context import Work
    from workbench.recipe import Step

ROOM = {
    "cuda": 2**27,
    "cpu": 2**20,
}  # weights in a batch at most: half a gigabyte on a GPU, what a cache holds on a CPU
# Bytes that a weight may take on the device of a streamed model while it is worked on, copies and all: no
# less than 8 GB leave batches as they are
WORKING = 64
# A small model is taken in at least about so many batches, so that memory stays a small multiple of it
PARTS = 4
LEAST = 2**22  # weights in a batch where that would make it smaller: below, a GPU would wait for being asked


@dataclass(frozen=True)
class Batch:
    """Layers whose matrices have the same shape [outputs, inputs]; stacks are [layers, outputs, inputs]."""

    layers: tuple[Layer, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Return (outputs, inputs) of each layer."""
        return self.layers[0].shape

    def matrices(self) -> Tensor:
        """Return the weights as float32 [layers, outputs, inputs], a copy.

        Raises:
            CompressionError: a weight is infinite or NaN.

        """
        return self.finite().float()

    def finite(self) -> Tensor:
        """Return the weights in the model's dtype, [layers, outputs, inputs], a copy.

        Raises as `matrices`.
        """
        stack = self.stored()
        if not all(layer.finite for layer in self.layers):
            good = torch.isfinite(stack)
            if not bool(good.all()):
                bad = self.layers[int((~good).flatten(1).any(1).nonzero()[0])]
                raise CompressionError(f"layer {bad.name!r} has infinite or NaN weights")
        return stack

    def stored(self) -> Tensor:
        """Return the weights in the model's dtype, [layers, outputs, inputs], a copy."""
        return torch.stack([layer.as_matrix(layer.parameter.detach()) for layer in self.layers])

    def masks(self) -> Tensor | None:
        """Return which weights stay, bool [layers, outputs, inputs], None where layers have no masks."""
        masks = [layer.mask for layer in self.layers if layer.mask is not None]
        return torch.stack(masks) if masks else None

    def in_place(self) -> list[Tensor] | None:
        """Return the matrices, each [rows, columns], where they lie, for `workbench.kernels.weight_passes`.

        None if its kernels cannot read them, or one may not be finite.
        """
        return matrices_in_place(self.layers)

    def put(self, matrices: Sequence[Tensor]) -> None:
        """Give each module its matrix [outputs, inputs], of its own dtype, as it is: not copied."""
        for layer, matrix in zip(self.layers, matrices, strict=True):
            layer.put(nn.Parameter(layer.as_stored(matrix), requires_grad=False))

    def write(self, stack: Tensor) -> None:
        """Store [layers, outputs, inputs] into the modules, as new parameters in each module's dtype.

        Whether they are finite is seen at the end of the step, in `check_all`: a GPU is not waited for here.
        """
        fresh = [
            torch.empty_like(layer.parameter, device=stack.device, memory_format=torch.contiguous_format)
            for layer in self.layers
        ]
        copy_each(fresh, [layer.as_stored(matrix) for layer, matrix in zip(self.layers, stack, strict=True)])
        for layer, values in zip(self.layers, fresh, strict=True):
            layer.put(nn.Parameter(values, requires_grad=False))

    def grids(self) -> Form:
        """Return the stored forms of all layers as one, tensors [layers, ...].

        Only where every layer has one of the same kind.
        """
        return stacked([layer.grid for layer in self.layers if layer.grid is not None])

    def broken(self) -> Tensor | None:
        """Return whether a promise is broken, or a weight written since the last look is infinite or NaN: a
        bool on the device, None without any to check.
        """
        first, fresh = self.layers[0], any(not layer.finite and not layer.pristine for layer in self.layers)
        if first.mask is None and first.grid is None and not fresh:
            return None
        stored = self.stored()
        wrong = (
            ~torch.isfinite(stored).all()
            if fresh
            else torch.zeros((), dtype=torch.bool, device=stored.device)
        )
        if (masks := self.masks()) is not None:
            wrong |= ((stored != 0) & ~masks).any()
        if first.grid is not None:
            wrong |= (self.grids().dequantize().to(stored.dtype) != stored).any()
        return wrong


def matrices_in_place(layers: Sequence[Layer]) -> list[Tensor] | None:
    """Return the matrices of layers of any shapes where they lie, or None, as `Batch.in_place`."""
    if not layers or not all(layer.finite and not layer.transposed for layer in layers):
        return None
    weights = [layer.as_matrix(layer.parameter.detach()) for layer in layers]
    return weights if weight_trials.suited(weights) else None


def know_finite(layers: Sequence[Layer], statistics: Statistics) -> None:
    """Mark which layers of the dense model are finite, seen once: the others raise where a step reads
    them.
    """

    def look() -> frozenset[str]:
        flags: list[Tensor] = []
        names: list[str] = []
        for batch in grouped(layers):
            flags += torch.isfinite(batch.stored()).flatten(1).all(1).unbind()
            names += [layer.name for layer in batch.layers]
        good = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
        for device, dtype in {(layer.parameter.device, layer.parameter.dtype) for layer in layers}:
            weight_trials.refused(device, dtype)  # tried here, where nobody waits for a move yet
        return frozenset(name for name, fine in zip(names, good, strict=True) if fine)

    finite_names = statistics.once("finite layers", look)
    for layer in layers:
        layer.finite = layer.name in finite_names


def grouped(layers: Iterable[Layer], *, whole: bool = False) -> Iterator[Batch]:
    """Yield batches of layers with the same shape, dtype, device and kind of promises, in order of each
    batch's first layer.

    With `whole`, all of them together if they are not streamed: where they are worked on in place, which
    takes no memory. Layers of a streamed model are on its device while their batch is worked on.
    """
    groups: dict[object, list[Layer]] = {}
    total = 0
    for layer in layers:
        weight = layer.parameter
        total += weight.numel()
        groups.setdefault(
            (layer.shape, weight.dtype, weight.device, layer.mask is None, kind_of(layer.grid)), []
        ).append(layer)
    for group in groups.values():
        weight = group[0].parameter
        room = min(ROOM.get((streams_to(weight) or weight.device).type, 2**20), max(LEAST, total // PARTS))
        if (away := streams_to(weight)) is not None:
            room = min(room, allowed_bytes(away) // WORKING)
        most = len(group) if whole and away is None else max(1, room // max(1, weight.numel()))
        for start in range(0, len(group), most):
            with visiting(group[start : start + most]):
                yield Batch(tuple(group[start : start + most]))


def of_one_shape(layers: list[Layer]) -> Iterator[Batch]:
    """Yield batches whose layers have one shape and are of one sort: a convolution may have the matrix of a
    Linear.
    """
    groups: dict[Shape, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(shape_of(layer.module), []).append(layer)
    for members in groups.values():
        yield from grouped(members)


def attempt(batch: Batch, act: Callable[[Batch], None]) -> None:
    """Do something to a batch; where that fails in a way that no rule foresees, find out for which layers.

    Raises:
        LayerSkipped: it failed for some layers alone, with the kind and the words of each one's exception.
            What was done to the others is to be done again.

    """
    try:
        act(batch)
    except (WorkbenchError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        failed = {}
        for layer in batch.layers:
            try:
                act(Batch((layer,)))
            except (WorkbenchError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as own:  # noqa: BLE001  whatever it is, it is told
                failed[layer.name] = kind_and_words(own)
        all_of_them = {layer.name: kind_and_words(error) for layer in batch.layers}
        raise LayerSkipped.of_all(failed or all_of_them) from error


def batches(step: Step, work: Work) -> Iterator[Batch]:
    """Iterate over the layers that `step` names, batch by batch, reporting progress.

    Raises as `Work.choose`.
    """
    return reported(step, work, work.choose(step))


def reported(step: Step, work: Work, layers: list[Layer], *, whole: bool = False) -> Iterator[Batch]:
    """Iterate over batches of these layers, reporting progress; `whole`: see `grouped`."""
    done = 0
    for batch in grouped(layers, whole=whole):
        work.progress(step.kind(), done, len(layers))
        yield batch
        done += len(batch.layers)
    work.progress(step.kind(), len(layers), len(layers))
