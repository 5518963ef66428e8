"""The weights that methods work on, seen as matrices whatever the module: Linear, GPT-2's Conv1D, Conv2d.

A `Layer` is one weight with what has been promised about it so far. Methods read `matrix()` ([outputs, inputs]) and call
`write()`; a convolution's inputs are its flattened patches (channel, row, column).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.errors import BrokenPromiseError, CompressionError

if TYPE_CHECKING:
    from workbench.runtime.grid import Grid


@dataclass
class Layer:
    """One weight of the model being compressed; mutable while `compress` runs, read-only afterwards.

    `origin` is the name in the dense model; the two factors of a low-rank layer share it. `mask` (bool, [outputs, inputs],
    True where a weight is kept) and `grid` (codes and scales) are promises that later steps must keep.
    """

    name: str
    origin: str
    module: nn.Module
    mask: Tensor | None = None
    grid: Grid | None = None
    rank: int | None = None
    pristine: bool = True

    @property
    def transposed(self) -> bool:
        """Return whether the module stores its weight as [inputs, outputs] (GPT-2's Conv1D)."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def parameter(self) -> nn.Parameter:
        """Return the weight as the module holds it."""
        weight = self.module.weight
        if not isinstance(weight, nn.Parameter):
            raise CompressionError(f"layer {self.name!r} holds no plain weight")
        return weight

    def as_matrix(self, stored: Tensor) -> Tensor:
        """Return a tensor shaped as the module stores it as [outputs, inputs]."""
        return stored.t() if self.transposed else stored.flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return an [outputs, inputs] tensor in the shape in which the module stores its weight."""
        return matrix.t() if self.transposed else matrix.reshape(self.parameter.shape)

    def matrix(self) -> Tensor:
        """Return the weight as float32 [outputs, inputs], detached; changing it does not change the module."""
        return self.as_matrix(self.parameter.detach()).to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def write(self, matrix: Tensor) -> None:
        """Store an [outputs, inputs] matrix into the module, in the module's dtype.

        Raises:
            CompressionError: the matrix is not finite.

        """
        if not torch.isfinite(matrix).all():
            raise CompressionError(f"layer {self.name!r} {tuple(matrix.shape)} became infinite or NaN: the step is too strong for it")
        with torch.no_grad():
            self.parameter.copy_(self.as_stored(matrix))
        self.pristine = False

    def check(self) -> None:
        """Verify every promise on the tensor itself.

        Raises:
            BrokenPromiseError: a pruned weight is no longer zero, a weight left its grid, or a rank grew.

        """
        stored = self.as_matrix(self.parameter.detach())
        if self.mask is not None and bool((stored[~self.mask] != 0).any()):
            raise BrokenPromiseError(f"layer {self.name!r}: {int((stored[~self.mask] != 0).sum())} pruned weights are no longer zero")
        if self.grid is not None and not torch.equal(self.grid.dequantize().to(stored.dtype), stored):
            raise BrokenPromiseError(f"layer {self.name!r}: its weights are not what its {self.grid.bits}-bit codes unpack to")
        if self.rank is not None and self.rank not in stored.shape:
            raise BrokenPromiseError(f"layer {self.name!r} {tuple(stored.shape)}: its rank is no longer {self.rank}")


def can_hold(module: nn.Module) -> bool:
    """Return whether the module has a weight that methods know how to see as a matrix."""
    return isinstance(module, nn.Linear | nn.Conv2d) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return a layer's inputs as rows, [samples, inputs], in float32: tokens of a Linear, patches of a Conv2d."""
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str):
            raise CompressionError(f"padding={module.padding!r} of a convolution is not supported: give it as numbers")
        inputs, padding = inputs.float(), module.padding
        if module.padding_mode != "zeros":
            top, left = (int(size) for size in module.padding)
            inputs, padding = nn.functional.pad(inputs, (left, left, top, top), mode=module.padding_mode), (0, 0)
        columns = nn.functional.unfold(inputs, module.kernel_size, module.dilation, padding, module.stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return inputs.float().reshape(-1, inputs.shape[-1])


def output_head(model: nn.Module) -> str | None:
    """Return the name of the layer that makes the logits, which is left dense unless a recipe names it."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    last: str | None = None
    for name, module in model.named_modules():
        if head is not None and module is head:
            return str(name)
        if isinstance(module, nn.Linear) and module.out_features == classes:
            last = name
    return last if head is None else None


def find_layers(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers that methods can work on, and the reason for every other weight that is left as it is."""
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
            continue
        if id(weight) in owners:
            left[name] = f"its weight is shared with {owners[id(weight)]}"
            if owners[id(weight)] in layers:
                left[owners[id(weight)]] = f"its weight is shared with {name}"
                del layers[owners[id(weight)]]
            continue
        owners[id(weight)] = name
        if isinstance(module, nn.Embedding):
            left[name] = "an embedding is a table, not a product: no method of this version takes it"
        elif isinstance(module, nn.Conv2d) and module.groups != 1:
            left[name] = f"a convolution in {module.groups} groups is not supported"
        elif not can_hold(module):
            left[name] = f"{type(module).__name__} is not a Linear, Conv1D or Conv2d"
        else:
            layers[name] = Layer(name, name, module)
    return layers, left


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted `name` stands in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing. Any function like it may raise `Cancelled` to stop the work at that point."""
