"""The packed form of a compressed model: the tensors that are stored, and back.

Per weight the smallest of what its promises allow: `dense` values; `bitmask` (one bit a weight says where the
non-zero values are, then the values), both in 16 bits where that was the promise; `grid` (packed codes,
scales, zero points and multipliers of inputs, see `workbench.formats.stored_forms`); `grid+bitmask` (codes of
the non-zero weights only). Weights that share storage are stored once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import ExportError
from workbench.formats.bit_packing import pack, unpack
from workbench.formats.serialization import Codes, codes_of, format_of, restored, side_tensors
from workbench.formats.stored_forms import Cast, Form
from workbench.modules.checkpoint_types import checkpoint_types, narrowed
from workbench.modules.expert_files import blocks_of_experts, fused_tensors
from workbench.modules.layer import Layer
from workbench.modules.visiting import visiting


@dataclass(frozen=True)
class Encoding:
    """How one weight is stored.

    `shape` and `dtype` are the module's; codes and masks run over the [outputs, inputs] matrix.

    `groups` of inputs and `scale_rows` (0: one for each output) are the shape of the scales; `number_format`
    says what a code stands for.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    bits: int = 0
    groups: int = 0
    transposed: bool = False
    same_as: str = ""
    number_format: str = "integer"
    scale_rows: int = 0

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Return (outputs, inputs)."""
        if self.transposed:
            return self.shape[1], self.shape[0]
        return self.shape[0], int(torch.Size(self.shape[1:]).numel())


@dataclass(frozen=True)
class Packed:
    """Tensors to store, by name, and for every entry of the state dict how it is encoded in them."""

    tensors: dict[str, Tensor]
    encodings: dict[str, Encoding]
    theoretical_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of all stored tensors, in memory: codes, scales, zero points, masks, values."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def manifest(self) -> dict[str, Any]:
        """Return the encodings as plain JSON data."""
        return {name: asdict(encoding) for name, encoding in self.encodings.items()}


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor in the host's memory, as files want it."""
    return tensor.cpu().contiguous()


def pack_model(
    model: nn.Module, layers: tuple[Layer, ...] = (), kept: Callable[[Tensor], Tensor] = on_host
) -> Packed:
    """Return the packed form of a model.

    `layers` carry the masks and grids of a compressed one, `kept` says what is kept of each packed tensor.
    """
    by_key = {f"{name}.weight": layer for layer in layers for name in (layer.name, *layer.others)}
    tensors: dict[str, Tensor] = {}
    encodings: dict[str, Encoding] = {}
    owners: dict[tuple[int, tuple[int, ...]], str] = {}
    theoretical_bits, types = 0, checkpoint_types(model)
    for key, value in model.state_dict().items():
        owner = owners.setdefault((value.data_ptr(), tuple(value.shape)), key) if value.numel() else key
        if owner != key:
            encodings[key] = Encoding("shared", tuple(value.shape), dtype_name(value), same_as=owner)
            continue
        layer = by_key.get(key)
        promised = [layer] if layer is not None and (layer.mask is not None or layer.grid is not None) else []
        with visiting(promised):  # of a streamed model: a host takes seconds a gigabyte
            here = promised[0].parameter.detach() if promised else value
            stored, encodings[key] = encode(here, layer, types.get(key))
            tensors.update({f"{key}{suffix}": kept(tensor) for suffix, tensor in stored.items()})
            width = (
                layer.grid.bits
                if layer is not None and layer.grid is not None
                else 8 * next(iter(stored.values())).element_size()
            )
            theoretical_bits += width * (
                value.numel() if layer is None or layer.mask is None else int(torch.count_nonzero(here))
            )
    stored_tensors = fused_tensors(tensors, blocks_of_experts(model))
    return Packed(stored_tensors, encodings, -(-theoretical_bits // 8))


def dtype_name(tensor: Tensor) -> str:
    """Return such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def encode(
    value: Tensor, layer: Layer | None, known: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Encoding]:
    """Return the smallest encoding of one entry of the state dict, which its checkpoint holds in the type
    `known`: tensors by name suffix, and its description.
    """
    shape, dtype = tuple(value.shape), dtype_name(value)
    dense = ({"": narrowed(value, known)}, Encoding("dense", shape, dtype))
    if layer is None or (layer.mask is None and layer.grid is None):
        return dense
    matrix = layer.as_matrix(value)
    nonzero = matrix != 0
    if layer.grid is None or isinstance(layer.grid, Cast):
        values = narrowed(matrix, known) if layer.grid is None else layer.grid.values
        whole = narrowed(value, known) if layer.grid is None else layer.as_stored(values)
        options = [({"": whole}, Encoding("dense", shape, dtype))]
        if layer.mask is not None:
            options.append(
                (
                    {".values": values[nonzero], ".mask": pack(nonzero, 1)},
                    Encoding("bitmask", shape, dtype, transposed=layer.transposed),
                )
            )
    else:
        options = grid_options(
            layer.grid, nonzero, {"shape": shape, "dtype": dtype, "transposed": layer.transposed}
        )
    return min(options, key=lambda option: sum(tensor.nbytes for tensor in option[0].values()))


def grid_options(
    form: Form, nonzero: Tensor, about: dict[str, Any]
) -> list[tuple[dict[str, Tensor], Encoding]]:
    """Return the ways to store codes: all of them, or those of non-zero weights only.

    A form that is zero by a mask allows the second alone.
    """
    codes, sides = codes_of(form), side_tensors(form)
    scale = sides[".scale"]
    rows = 0 if scale.shape[0] == codes.shape[0] else scale.shape[0]
    about |= {
        "bits": form.bits,
        "groups": scale.shape[1],
        "scale_rows": rows,
        "number_format": format_of(form),
    }
    some = (
        {".codes": pack(codes[nonzero], form.bits), ".mask": pack(nonzero, 1), **sides},
        Encoding("grid+bitmask", **about),
    )
    if getattr(form, "kept", None) is not None:
        return [some]
    return [({".codes": pack(codes, form.bits), **sides}, Encoding("grid", **about)), some]


def unpack_state(tensors: dict[str, Tensor], manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict that `pack_model` stored.

    Raises:
        ExportError: a tensor is missing or of the wrong length, or an encoding is unknown.

    """
    encodings = {
        key: Encoding(**{**about, "shape": tuple(about["shape"])}) for key, about in manifest.items()
    }
    state: dict[str, Tensor] = {}
    for key, encoding in encodings.items():
        if encoding.kind != "shared":
            try:
                state[key] = decode(key, tensors, encoding)
            except (KeyError, ValueError, RuntimeError) as error:
                raise ExportError(
                    f"weight {key!r} ({encoding.kind}, {list(encoding.shape)}) cannot be unpacked: {error}"
                ) from None
    return state | {
        key: state[encoding.same_as] for key, encoding in encodings.items() if encoding.kind == "shared"
    }


def decode(key: str, tensors: dict[str, Tensor], encoding: Encoding) -> Tensor:
    """Return one weight in the module's shape and dtype."""
    dtype: torch.dtype = getattr(torch, encoding.dtype)
    if encoding.kind == "dense":
        return tensors[key].to(dtype)
    rows, columns = encoding.matrix_shape
    if encoding.kind == "bitmask":
        matrix = torch.zeros(rows, columns, dtype=dtype)
        matrix[unpack(tensors[f"{key}.mask"], 1, rows * columns).view(rows, columns).bool()] = tensors[
            f"{key}.values"
        ].to(dtype)
    elif encoding.kind in {"grid", "grid+bitmask"}:
        matrix = decode_grid(key, tensors, encoding).dequantize().to(dtype)
    else:
        raise ValueError(f"unknown encoding {encoding.kind!r}")
    return matrix.t().contiguous() if encoding.transposed else matrix.view(encoding.shape)


def decode_grid(key: str, tensors: dict[str, Tensor], encoding: Encoding) -> Form:
    """Return the stored form of one weight; codes that were left out are those of zero, or masked."""
    rows, columns = encoding.matrix_shape
    sides = {name.removeprefix(key): tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
    if encoding.kind == "grid":
        codes, kept = unpack(sides[".codes"], encoding.bits, rows * columns).view(rows, columns), None
    else:
        kept = unpack(sides[".mask"], 1, rows * columns).view(rows, columns).bool()
        codes = unpack(sides[".codes"], encoding.bits, int(kept.sum()))
    return restored(
        Codes(
            codes, kept, encoding.bits, encoding.number_format, (encoding.scale_rows or rows, encoding.groups)
        ),
        sides,
    )
