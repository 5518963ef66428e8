"""A weight as its shape, its promises and the tensors that a file stores of it: what a method changes before
any value is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from workbench.modules.factored import Shape

# how safetensors names and orders dtypes: widest first, then by name of the tensor
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its dtype as safetensors writes it, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Weight:
    """A weight that methods can take, as shapes and promises only.

    `kept` None: no mask; `bits` 0: no grid.
    """

    name: str
    origin: str
    shape: tuple[int, ...]  # as the module stores it
    rows: int
    columns: int
    dtype: torch.dtype
    kept: int | None = None
    bits: float = 0
    groups: int = 0
    zero_point: bool = False
    whole_zeros: bool = True  # zero points are integers of `bits`, else numbers as the scales
    scale_rows: int = 0  # rows of scales, 0: one for each output
    input_scale: bool = False  # a float16 multiplier for each input
    needs_mask: bool = False  # zero is on the grid by a mask only
    cast: torch.dtype | None = None  # stored in another floating-point dtype; `bits` is its width
    rank: int | None = None
    scale_dtype: str = "F16"
    others: tuple[str, ...] = ()  # names of the modules that share it
    reserved: bool = False  # stays dense unless targets name it
    table: bool = False
    transposed: bool = False  # stored as [inputs, outputs]
    file_dtype: torch.dtype | None = None  # of the checkpoint, where that is narrower than `dtype`
    # The layer's own share of a budget depends on its values: `kept` is the average over layers
    estimated: bool = False

    @property
    def count(self) -> int:
        """Return the number of weights, zeros included."""
        return self.rows * self.columns

    @property
    def stored_dtype(self) -> torch.dtype:
        """Return the type that its numbers are stored in where they are on no grid."""
        return self.cast or self.file_dtype or self.dtype

    @property
    def form_shape(self) -> Shape:
        """Return the shape that forms of low rank depend on."""
        kernel = (self.shape[2], self.shape[3]) if len(self.shape) == 4 else (1, 1)
        return Shape(self.rows, self.columns, kernel, convolution=len(self.shape) == 4, table=self.table)

    def encoded(self) -> list[StoredTensor]:
        """Return the smallest encoding that shapes and promises allow (the rules of
        `workbench.modules.packing`).
        """
        key, stored = f"{self.name}.weight", self.stored_dtype
        mask = StoredTensor(f"{key}.mask", "U8", (ceil8(self.count),), ceil8(self.count))
        if not self.bits or self.cast is not None:
            options = [[StoredTensor(key, DTYPES[stored], self.shape, self.count * stored.itemsize)]]
            if self.kept is not None:
                options.append(
                    [
                        StoredTensor(
                            f"{key}.values", DTYPES[stored], (self.kept,), self.kept * stored.itemsize
                        ),
                        mask,
                    ]
                )
            return min(options, key=total)
        options = [] if self.needs_mask else [[self.codes(self.count), *self.sides()]]
        if self.kept is not None:
            options.append([self.codes(self.kept), mask, *self.sides()])
        return min(options, key=total)

    def sides(self) -> list[StoredTensor]:
        """Return the tensors stored beside codes: scales, zero points, multipliers of inputs."""
        key, rows = f"{self.name}.weight", self.scale_rows or self.rows
        scales, wide = rows * self.groups, 4 if self.scale_dtype == "F32" else 2
        tensors = [StoredTensor(f"{key}.scale", self.scale_dtype, (rows, self.groups), wide * scales)]
        if self.zero_point and self.whole_zeros:
            tensors.append(
                StoredTensor(
                    f"{key}.zero_point", "U8", (ceil8(scales * self.bits),), ceil8(scales * self.bits)
                )
            )
        elif self.zero_point:
            tensors.append(
                StoredTensor(f"{key}.zero_point", self.scale_dtype, (rows, self.groups), wide * scales)
            )
        if self.input_scale:
            tensors.append(StoredTensor(f"{key}.input_scale", "F16", (self.columns,), 2 * self.columns))
        return tensors

    def codes(self, count: int) -> StoredTensor:
        """Return the packed codes of `count` weights."""
        taken = ceil8(count * self.bits)
        return StoredTensor(f"{self.name}.weight.codes", "U8", (taken,), taken)


def ceil8(bits: float) -> int:
    """Return the bytes that so many bits take."""
    return math.ceil(bits / 8)


def total(entries: Iterable[StoredTensor]) -> int:
    """Return the bytes of all entries."""
    return sum(entry.bytes for entry in entries)


def file_length(entries: Iterable[StoredTensor]) -> int:
    """Return the bytes of a safetensors file of these tensors: 8, the header padded to a multiple of 8, the
    tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in sorted(entries, key=lambda e: (ORDER.index(e.dtype), e.name)):
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset
