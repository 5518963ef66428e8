"""Layers of one shape worked on together: a GPU that is asked 200 times waits for the asking, not for the work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.compress.layers import Layer
from workbench.errors import CompressionError
from workbench.runtime.forms import Form, kind_of, stacked

if TYPE_CHECKING:
    from workbench.compress.work import Work
    from workbench.recipe import Step

ROOM = {"cuda": 2**27, "cpu": 2**20}  # weights in a batch at most: half a gigabyte on a GPU, what a cache holds on a CPU
PARTS = 4  # a small model is taken in at least about so many batches, so that memory stays a small multiple of it
LEAST = 2**22  # weights in a batch where that would make it smaller: below, a GPU would wait for being asked


@dataclass(frozen=True)
class Batch:
    """Layers whose matrices have the same shape [outputs, inputs]; stacks are [layers, outputs, inputs]."""

    layers: tuple[Layer, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Return (outputs, inputs) of each layer."""
        rows, columns = self.layers[0].as_matrix(self.layers[0].parameter).shape
        return rows, columns

    def matrices(self) -> Tensor:
        """Return the weights as float32 [layers, outputs, inputs], a copy.

        Raises:
            CompressionError: a weight is infinite or NaN.

        """
        stack = self.stored().float()
        finite = torch.isfinite(stack)
        if not bool(finite.all()):
            bad = self.layers[int((~finite).flatten(1).any(1).nonzero()[0])]
            raise CompressionError(f"layer {bad.name!r} has infinite or NaN weights")
        return stack

    def stored(self) -> Tensor:
        """Return the weights in the model's dtype, [layers, outputs, inputs], a copy."""
        return torch.stack([layer.as_matrix(layer.parameter.detach()) for layer in self.layers])

    def write(self, stack: Tensor) -> None:
        """Store [layers, outputs, inputs] into the modules, as new parameters in each module's dtype.

        Raises:
            CompressionError: a value is not finite.

        """
        if not bool(torch.isfinite(stack).all()):
            bad = self.layers[int((~torch.isfinite(stack)).flatten(1).any(1).nonzero()[0])]
            raise CompressionError(f"layer {bad.name!r} {tuple(stack.shape[1:])} became infinite or NaN: the step is too strong for it")
        fresh = [torch.empty_like(layer.parameter, device=stack.device, memory_format=torch.contiguous_format) for layer in self.layers]
        torch._foreach_copy_(fresh, [layer.as_stored(matrix) for layer, matrix in zip(self.layers, stack, strict=True)])
        for layer, values in zip(self.layers, fresh, strict=True):
            layer.put(nn.Parameter(values, requires_grad=False))

    def grids(self) -> Form:
        """Return the stored forms of all layers as one, tensors [layers, ...]; only where every layer has one of the same kind."""
        return stacked([layer.grid for layer in self.layers if layer.grid is not None])

    def check(self) -> None:
        """Verify every promise of every layer on the tensors themselves; see `Layer.check`, which words what is broken."""
        first = self.layers[0]
        stored = self.stored() if first.mask is not None or first.grid is not None else torch.zeros(0, device=first.parameter.device)
        broken = torch.zeros((), dtype=torch.bool, device=stored.device)
        if first.mask is not None:
            masks = torch.stack([layer.mask for layer in self.layers if layer.mask is not None])
            broken |= ((stored != 0) & ~masks).any()
        if first.grid is not None:
            broken |= (self.grids().dequantize().to(stored.dtype) != stored).any()
        if bool(broken) or any(layer.rank is not None and layer.rank not in layer.parameter.shape for layer in self.layers):
            for layer in self.layers:
                layer.check()


def grouped(layers: Iterable[Layer]) -> Iterator[Batch]:
    """Yield batches of layers with the same shape, dtype, device and kind of promises, in order of each batch's first layer."""
    groups: dict[object, list[Layer]] = {}
    total = 0
    for layer in layers:
        total += layer.parameter.numel()
        weight = layer.parameter
        groups.setdefault((layer.as_matrix(weight).shape, weight.dtype, weight.device, layer.mask is None, kind_of(layer.grid)), []).append(layer)
    for group in groups.values():
        weight = group[0].parameter
        room = min(ROOM.get(weight.device.type, 2**20), max(LEAST, total // PARTS))
        most = max(1, room // max(1, weight.numel()))
        yield from (Batch(tuple(group[start : start + most])) for start in range(0, len(group), most))


def batches(step: Step, work: Work) -> Iterator[Batch]:
    """Iterate over the layers that `step` names, batch by batch, reporting progress; raises as `Work.choose`."""
    return reported(step, work, work.choose(step))


def reported(step: Step, work: Work, layers: list[Layer]) -> Iterator[Batch]:
    """Iterate over batches of these layers, reporting progress."""
    done = 0
    for batch in grouped(layers):
        work.progress(step.kind(), done, len(layers))
        yield batch
        done += len(batch.layers)
    work.progress(step.kind(), len(layers), len(layers))
