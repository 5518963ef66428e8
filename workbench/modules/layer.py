"""The weights that methods work on, seen as matrices whatever the module: Linear, GPT-2's Conv1D, Conv2d,
Embedding.

A `Layer` is one weight with what has been promised about it so far. Methods read `matrix()` ([outputs,
inputs]) and call `write()`; a convolution's inputs are its flattened patches (channel, row, column), an
embedding is a table of [rows, columns]. A weight that several modules share (an output head tied to the
embedding) is one layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.errors import BrokenPromiseError, CompressionError
from workbench.modules.checkpoint_types import inherit
from workbench.modules.input_quantizer import smoothing_of
from workbench.util.library_internals import parameters_of

if TYPE_CHECKING:
    from workbench.formats.stored_forms import Form
    from workbench.kernels.weight_passes import Change


@dataclass
class Layer:
    """One weight of the model being compressed; mutable while `compress` runs, read-only afterwards.

    `origin` is the name in the dense model; the two factors of a low-rank layer share it. `mask` (bool,
    [outputs, inputs], True where a weight is kept) and `grid` (the stored form: codes and scales) are
    promises that later steps must keep. `others` are the modules that share the weight, by name. `reserved`
    says what a layer is that stays dense unless targets name it. `role` is base, first or second in a
    repaired layer, and empty elsewhere.

    `rows` and `columns` (int64) are the outputs and inputs of the dense weight that are left where structure
    was removed, None for all. `place` is where `origin` stands in this model if blocks before it were
    removed, else empty. `finite` says that the weight was seen to be finite since it was written last;
    `change` is what became of it since the dense model, where that is known.
    """

    name: str
    origin: str
    module: nn.Module
    mask: Tensor | None = None
    grid: Form | None = None
    rank: int | None = None
    pristine: bool = True
    others: dict[str, nn.Module] = field(default_factory=dict)
    reserved: str = ""
    role: str = ""
    rows: Tensor | None = None
    columns: Tensor | None = None
    place: str = ""
    finite: bool = False
    # Parameter, mask and grid as they were, and what was found
    looked: tuple[object, object, object, Change] | None = None

    @property
    def transposed(self) -> bool:
        """Return whether the module stores its weight as [inputs, outputs] (GPT-2's Conv1D)."""
        return is_transposed(self.module)

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name by which targets may know the layer."""
        name = (
            self.origin + self.name.removeprefix(self.place) if self.place else self.name
        )  # as the dense model counts blocks
        return tuple(dict.fromkeys((name, self.origin, *self.others)))

    @property
    def patch(self) -> int:
        """Return how many columns of the matrix an input channel has: 1, or the positions of a convolution's
        kernel.
        """
        return math.prod(self.parameter.shape[2:])

    def keep(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Note that the module was cut down to some rows and columns of its matrix (None: all), and cut the
        mask to match.
        """
        device = self.parameter.device
        for side, dimension, index in (("rows", 0, rows), ("columns", 1, columns)):
            if index is not None:
                kept, before = index.to(device), getattr(self, side)
                setattr(self, side, kept if before is None else before[kept])
                self.mask = None if self.mask is None else self.mask.index_select(dimension, kept)
        self.pristine = False

    def left_of(self, dense: Tensor) -> Tensor:
        """Return the rows and columns of a dense matrix [outputs, inputs] that the layer still has, with what
        smoothing moved into its weights.
        """
        dense = dense if self.rows is None else dense[self.rows]
        dense = dense if self.columns is None else dense[:, self.columns]
        return dense if self.smooth is None else dense * self.smooth

    @property
    def smooth(self) -> Tensor | None:
        """Return the divisors of the module's inputs, one a column of the matrix (float32 [inputs]), None if
        it divides by none.

        The weights hold it already: `matrix()` is what the divided inputs are multiplied by.
        """
        channels = smoothing_of(self.module)
        return None if channels is None else channels.repeat_interleave(self.patch)

    @property
    def table(self) -> bool:
        """Return whether rows are looked up, not multiplied: such a layer has no second moment of inputs."""
        return isinstance(self.module, nn.Embedding)

    @property
    def parameter(self) -> nn.Parameter:
        """Return the weight as the module holds it."""
        weight = parameters_of(self.module).get("weight")
        if not isinstance(weight, nn.Parameter):
            raise CompressionError(f"layer {self.name!r} holds no plain weight")
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """Return (outputs, inputs) of the matrix."""
        rows, *columns = self.parameter.shape
        return (columns[0], rows) if self.transposed else (rows, math.prod(columns))

    def as_matrix(self, stored: Tensor) -> Tensor:
        """Return a tensor shaped as the module stores it as [outputs, inputs]."""
        return stored.t() if self.transposed else stored.flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return an [outputs, inputs] tensor in the shape in which the module stores its weight."""
        return matrix.t() if self.transposed else matrix.reshape(self.parameter.shape)

    def matrix(self) -> Tensor:
        """Return the weight as float32 [outputs, inputs], detached.

        Changing it does not change the module.
        """
        return self.as_matrix(self.parameter.detach()).to(
            torch.float32, copy=True, memory_format=torch.contiguous_format
        )

    def write(self, matrix: Tensor) -> None:
        """Store an [outputs, inputs] matrix into the module as a new parameter, in the module's dtype.

        Raises:
            CompressionError: the matrix is not finite.

        """
        if not torch.isfinite(matrix).all():
            raise CompressionError(
                f"layer {self.name!r} {tuple(matrix.shape)} became infinite or NaN: the step is too strong"
                " for it"
            )
        values = torch.empty_like(self.parameter, device=matrix.device, memory_format=torch.contiguous_format)
        self.put(nn.Parameter(values.copy_(self.as_stored(matrix)), requires_grad=False))

    @property
    def change(self) -> Change | None:
        """Return the change of the weight since the dense model, as it was found when the weight, as it is
        now, was looked over.

        None if nobody has (see `workbench.compress.core.invariants`).
        """
        if self.looked is None:
            return None
        parameter, mask, grid, change = self.looked
        return change if parameter is self.parameter and mask is self.mask and grid is self.grid else None

    def put(self, parameter: nn.Parameter) -> None:
        """Give the module, and those that share its weight, another one.

        The old one may belong to the dense model too and is left as it is.
        """
        for module in (self.module, *self.others.values()):
            # Where it already is: torch's own way looks for it everywhere first
            parameters_of(module)["weight"] = parameter
        self.pristine = self.finite = False

    def check(self) -> None:
        """Verify every promise on the tensor itself.

        Raises:
            BrokenPromiseError: a pruned weight is no longer zero, a weight left its grid, or a rank grew.

        """
        stored = self.as_matrix(self.parameter.detach())
        if self.mask is not None and bool((stored[~self.mask] != 0).any()):
            raise BrokenPromiseError(
                f"layer {self.name!r}: {int((stored[~self.mask] != 0).sum())} pruned weights are no longer"
                " zero"
            )
        if self.grid is not None and not torch.equal(self.grid.dequantize().to(stored.dtype), stored):
            raise BrokenPromiseError(
                f"layer {self.name!r}: its weights are not what its {self.grid.bits}-bit codes unpack to"
            )
        if self.rank is not None and self.rank not in self.parameter.shape:
            raise BrokenPromiseError(
                f"layer {self.name!r} {tuple(self.parameter.shape)}: its rank is no longer {self.rank}"
            )


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module stores its weight as [inputs, outputs] (GPT-2's Conv1D)."""
    return type(module).__name__ in {"Conv1D", "QuantizedConv1D"}


def can_hold(module: nn.Module) -> bool:
    """Return whether the module multiplies by a weight that methods know how to see as a matrix."""
    return isinstance(module, nn.Linear | nn.Conv2d) or (is_transposed(module) and hasattr(module, "nf"))


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return a layer's inputs as rows, [samples, inputs], in float32: tokens of a Linear, patches of a
    Conv2d.
    """
    if isinstance(module, nn.Conv2d):
        inputs, padding = inputs.float(), module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            inputs, padding = nn.functional.pad(inputs, edges(module), mode=mode), (0, 0)
        columns = nn.functional.unfold(inputs, module.kernel_size, module.dilation, padding, module.stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return inputs.float().reshape(-1, inputs.shape[-1])


def edges(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return by how much a convolution pads its inputs: (left, right, top, bottom), also where it says it in
    a word.
    """
    if not isinstance(module.padding, str):
        top, left = (int(size) for size in module.padding)
        return left, left, top, top
    if module.padding == "valid":
        return 0, 0, 0, 0
    down, across = (
        dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)
    )  # "same": the odd one goes to the end, as in torch
    return across // 2, across - across // 2, down // 2, down - down // 2


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


def holders_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold a weight of two or more dimensions, by every name, in the model's
    order.
    """
    weights = (
        (name, module, parameters_of(module).get("weight"))
        for name, module in model.named_modules(remove_duplicate=False)
    )
    return {name: module for name, module, weight in weights if weight is not None and weight.ndim >= 2}


def find_layers(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers that methods can work on, and the reason for every other weight that is left as it
    is: those of modules, then parameters of other names.
    """
    layers, left = layers_among(holders_of(model))
    return layers, left | bare_parameters(model)


def layers_among(holders: dict[str, nn.Module]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return (layers, reasons), as `find_layers`, from the modules that hold weights."""
    owners: dict[int, dict[str, nn.Module]] = {}  # modules by weight: more than one where it is shared
    for name, module in holders.items():
        owners.setdefault(id(module.weight), {})[name] = module
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for modules in owners.values():
        reasons = {name: reason for name, module in modules.items() if (reason := why_left(module))}
        if len({is_transposed(module) for module in modules.values()}) > 1:
            reasons = dict.fromkeys(modules, "modules that share its weight store it the other way round")
        if reasons:
            left |= {
                name: reasons.get(name) or f"its weight is shared with {next(iter(reasons))}"
                for name in modules
            }
            continue
        layer = one_layer(modules)
        layers[layer.name] = layer
    return {name: layers[name] for name in holders if name in layers}, left


def bare_parameters(model: nn.Module) -> dict[str, str]:
    """Return the parameters that are no module's weight or bias, by name, and why no method takes them."""
    reasons: dict[str, str] = {}
    for owner, module in model.named_modules():
        for name, tensor in parameters_of(module).items():
            of_a_layer = name == "weight" or (name == "bias" and tensor is not None and tensor.ndim < 2)
            if tensor is not None and not of_a_layer:
                reasons[f"{owner}.{name}" if owner else name] = why_bare(owner, module, tensor)
    return reasons


def why_bare(owner: str, module: nn.Module, tensor: Tensor) -> str:
    """Return why no method takes a parameter of a module that is no weight of it."""
    said = getattr(module, "left_dense", "")
    if said:
        return str(said)
    if "parametrizations" in owner.split("."):
        return "a weight is computed from it and others at every pass (a parametrization)"
    if tensor.ndim < 2:
        return f"{tensor.numel()} numbers that no product multiplies by as a matrix"
    return (
        f"a parameter of {type(module).__name__} itself, not the weight of a Linear, Conv1D, Conv2d or"
        " Embedding"
    )


def one_layer(modules: dict[str, nn.Module]) -> Layer:
    """Return the layer of a weight; of modules that share it, one that multiplies by it speaks for all."""
    name = next((name for name, module in modules.items() if can_hold(module)), next(iter(modules)))
    others = {alias: module for alias, module in modules.items() if alias != name}
    reserved = "an embedding" if isinstance(modules[name], nn.Embedding) else ""
    return Layer(
        name,
        name,
        modules[name],
        others=others,
        reserved=f"a weight shared with {', '.join(others)}" if others else reserved,
    )


def why_left(module: nn.Module) -> str:
    """Return why no method takes the weight of a module, "" if some can.

    Whoever loaded the model may say why in `left_dense`.
    """
    said = getattr(module, "left_dense", "")
    if said:
        return str(said)
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"a convolution in {module.groups} groups is not supported"
    return (
        ""
        if can_hold(module) or isinstance(module, nn.Embedding)
        else f"{type(module).__name__} is not a Linear, Conv1D, Conv2d or Embedding"
    )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted `name` stands in `model`."""
    parent, _, child = name.rpartition(".")
    inherit(model.get_submodule(name), module)
    setattr(model.get_submodule(parent), child, module)
