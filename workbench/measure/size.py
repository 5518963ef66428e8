"""Three sizes, never mixed up: what papers count, what memory holds, what lies on disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

from workbench.compress.core.batch import grouped
from workbench.formats.affine import Grid
from workbench.formats.stored_forms import Cast, InputScaled, OffsetGrid
from workbench.modules.checkpoint_types import TOTAL, checkpoint_types
from workbench.modules.expert_files import blocks_of_experts, fused_entries
from workbench.modules.layer import Layer
from workbench.modules.packing import Packed, pack_model
from workbench.modules.weight_shapes import DTYPES, StoredTensor, Weight, ceil8, file_length, total
from workbench.shapes.outline import Outline


@dataclass(frozen=True)
class Sizes:
    """Bytes of one model.

    `theoretical_bytes`: non-zero weights at their width, no positions, no scales, as papers count.
    `packed_bytes`: every tensor of the packed form, in memory. `file_bytes`: the packed safetensors file,
    header included.
    """

    theoretical_bytes: int
    packed_bytes: int
    file_bytes: int


def file_content(packed: Packed) -> bytes:
    """Return the very bytes of the safetensors file that an export writes."""
    return safetensors.torch.save(packed.tensors, metadata={"format": "pt"})


def counted_sizes(model: nn.Module, layers: tuple[Layer, ...]) -> Sizes:
    """Return the sizes of a model, as `sizes`, by counting non-zero weights instead of packing them: quick
    enough for a first look.
    """
    outline, promised = (
        Outline.of(model, known=layers),
        {name: layer for layer in layers for name in (layer.name, *layer.others)},
    )
    counts = nonzeros([layer for layer in layers if layer.mask is not None or layer.grid is not None])
    counts = {name: counts[layer.name] for name, layer in promised.items() if layer.name in counts}
    weights = tuple(
        (
            with_promises(weight, promised[weight.name], counts.get(weight.name))
            if weight.name in promised
            else weight
        )
        for weight in outline.weights
    )
    outline = dataclasses.replace(outline, weights=weights)
    bits: float = 8 * total(outline.rest)
    for weight in weights:
        masked = weight.name in promised and promised[weight.name].mask is not None
        bits += (weight.bits or 8 * weight.stored_dtype.itemsize) * (
            counts[weight.name] if masked else weight.count
        )
    entries = outline.entries()
    return Sizes(ceil8(bits), total(entries), file_length(entries))


def nonzeros(layers: list[Layer]) -> dict[str, int]:
    """Return the number of weights of each layer that are not zero."""
    counts_by_name = {
        layer.name: layer.parameter.numel() - layer.change.zeros
        for layer in layers
        if layer.change is not None
    }
    for batch in grouped(layer for layer in layers if layer.name not in counts_by_name):
        counts = (batch.stored() != 0).flatten(1).sum(1).tolist()
        counts_by_name.update(zip((layer.name for layer in batch.layers), counts, strict=True))
    return counts_by_name


def with_promises(weight: Weight, layer: Layer, kept: int | None) -> Weight:
    """Return a weight with the grid of its layer and the number of its weights that are not zero."""
    form = layer.grid
    if form is None:
        return dataclasses.replace(weight, kept=kept)
    if isinstance(form, Cast):
        return dataclasses.replace(
            weight, kept=kept if layer.mask is not None else None, bits=16, cast=form.values.dtype
        )
    base = form.base if isinstance(form, InputScaled) else form
    return dataclasses.replace(
        weight,
        kept=kept,
        bits=form.bits,
        groups=base.scale.shape[1],
        scale_rows=0 if base.scale.shape[0] == weight.rows else base.scale.shape[0],
        zero_point=isinstance(base, OffsetGrid) or (isinstance(base, Grid) and base.zero_point is not None),
        whole_zeros=not isinstance(base, OffsetGrid),
        scale_dtype="F32" if base.scale.dtype == torch.float32 else "F16",
        input_scale=isinstance(form, InputScaled),
        needs_mask=getattr(base, "kept", None) is not None,
    )


def sizes(model: nn.Module, layers: tuple[Layer, ...] = ()) -> Sizes:
    """Return the three sizes of a model; `layers` carry the masks and grids of a compressed one.

    Every weight is packed where it lies, one after another, and only its shape is kept: nothing is copied to
    the host. The file's length follows from what safetensors writes before the tensors, and is that of
    `file_content`.
    """
    packed = pack_model(model, layers, kept=shape_only)
    entries = [
        StoredTensor(name, DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        for name, tensor in packed.tensors.items()
    ]
    return Sizes(packed.theoretical_bytes, packed.packed_bytes, file_length(entries))


def given_sizes(model: nn.Module) -> Sizes:
    """Return the sizes of a dense model as it was given: each tensor once, in the type that its file holds it
    in, or as it is where the model was handed over in memory.
    """
    types, seen, entries = checkpoint_types(model), set[tuple[int, tuple[int, ...]]](), []
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        dtype = types.get(name, tensor.dtype)
        entries.append(
            StoredTensor(name, DTYPES[dtype], tuple(tensor.shape), tensor.numel() * dtype.itemsize)
        )
    entries = fused_entries(entries, blocks_of_experts(model))
    size = vars(model).get(TOTAL) or total(entries)
    return Sizes(size, size, size + file_length(entries) - total(entries))


def shape_only(tensor: Tensor) -> Tensor:
    """Return a tensor without its values."""
    return tensor.to("meta")
