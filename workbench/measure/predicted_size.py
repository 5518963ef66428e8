"""The file size of a recipe, computed from shapes alone: no weight is read, so it takes a millisecond.

Exact for dense weights, pruning and low rank. With a grid it is an upper bound: codes that round to zero can make the form
with a mask smaller than what shapes alone promise. It assumes scales that fit float16, as those of ordinary weights do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.compress.layers import find_layers, output_head

if TYPE_CHECKING:
    from workbench.recipe import Recipe, Step

# how safetensors names and orders dtypes: widest first, then by name of the tensor
DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as safetensors writes it, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Weight:
    """A weight that methods can take, as shapes and promises only. `kept` None: no mask; `bits` 0: no grid."""

    name: str
    origin: str
    shape: tuple[int, ...]  # as the module stores it
    rows: int
    columns: int
    dtype: torch.dtype
    kept: int | None = None
    bits: int = 0
    groups: int = 0
    zero_point: bool = False
    rank: int | None = None

    @property
    def count(self) -> int:
        """Return the number of weights, zeros included."""
        return self.rows * self.columns

    def encoded(self) -> list[Entry]:
        """Return the smallest encoding that shapes and promises allow (the rules of `workbench.runtime.packed`)."""
        key, wide = f"{self.name}.weight", self.dtype.itemsize
        mask = Entry(f"{key}.mask", "U8", (ceil8(self.count),), ceil8(self.count))
        if not self.bits:
            options = [[Entry(key, DTYPES[self.dtype], self.shape, self.count * wide)]]
            if self.kept is not None:
                options.append([Entry(f"{key}.values", DTYPES[self.dtype], (self.kept,), self.kept * wide), mask])
            return min(options, key=total)
        scales = self.rows * self.groups
        common = [Entry(f"{key}.scale", "F16", (self.rows, self.groups), 2 * scales)]
        if self.zero_point:
            common.append(Entry(f"{key}.zero_point", "U8", (ceil8(scales * self.bits),), ceil8(scales * self.bits)))
        options = [[self.codes(self.count), *common]]
        if self.kept is not None:
            options.append([self.codes(self.kept), mask, *common])
        return min(options, key=total)

    def codes(self, count: int) -> Entry:
        """Return the packed codes of `count` weights."""
        taken = ceil8(count * self.bits)
        return Entry(f"{self.name}.weight.codes", "U8", (taken,), taken)


def ceil8(bits: int) -> int:
    """Return the bytes that so many bits take."""
    return -(-bits // 8)


def total(entries: Iterable[Entry]) -> int:
    """Return the bytes of all entries."""
    return sum(entry.bytes for entry in entries)


@dataclass(frozen=True)
class Outline:
    """A model as shapes: the weights that methods can take, everything else, and the name of the output head.

    `positions` says how often each weight is applied to one item (tokens, or pixels of a convolution's output).
    """

    weights: tuple[Weight, ...]
    rest: tuple[Entry, ...]
    head: str | None
    positions: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, positions: dict[str, int] | None = None) -> Outline:
        """Read the shapes of a model."""
        layers, _ = find_layers(model)
        weights, rest = [], []
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for key, value in model.state_dict().items():
            mark = (value.data_ptr(), tuple(value.shape))
            if value.numel() and mark in seen:
                continue  # shares its storage with an earlier one: stored once
            seen.add(mark)
            layer = layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
            if layer is None:
                rest.append(Entry(key, DTYPES[value.dtype], tuple(value.shape), value.nbytes))
            else:
                rows, columns = layer.as_matrix(value).shape
                weights.append(Weight(layer.name, layer.name, tuple(value.shape), rows, columns, value.dtype))
        return cls(tuple(weights), tuple(rest), output_head(model), positions or {})

    def after(self, recipe: Recipe) -> Outline | None:
        """Return the outline after a recipe, or None if one of its methods is not known here."""
        made = self
        for step in recipe:
            change = CHANGES.get(step.kind())
            if change is None:
                return None
            weights = [part for weight in made.weights for part in (change(weight, step) if made.takes(weight, step) else [weight])]
            made = dataclasses.replace(made, weights=tuple(weights))
        split = {weight.origin for weight in made.weights if weight.rank is not None}
        return dataclasses.replace(made, rest=tuple(moved_bias(entry, split) for entry in self.rest))

    def takes(self, weight: Weight, step: Step) -> bool:
        """Return whether a step works on a weight (the output head stays dense unless it is named)."""
        return not (step.targets == ("*",) and weight.origin == self.head) and (step.matches(weight.name) or step.matches(weight.origin))

    def file_bytes(self) -> int:
        """Return the bytes of the safetensors file: 8, the header padded to a multiple of 8, the tensors."""
        entries = sorted([*self.rest, *(entry for weight in self.weights for entry in weight.encoded())], key=lambda e: (ORDER.index(e.dtype), e.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in entries:
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.bytes]}
            offset += entry.bytes
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        return 8 + -(-length // 8) * 8 + offset

    def exact(self) -> bool:
        """Return whether `file_bytes` is exact; else it is an upper bound."""
        return not any(weight.bits for weight in self.weights)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of all weights for one item, zeros included, as every kernel of this version does."""
        return sum(weight.count * self.positions.get(weight.origin, 1) for weight in self.weights)


def moved_bias(entry: Entry, split: set[str]) -> Entry:
    """Return a bias under the name that it has once its layer is two."""
    owner, _, last = entry.name.rpartition(".")
    return dataclasses.replace(entry, name=f"{owner}.1.bias") if last == "bias" and owner in split else entry


def lowrank(weight: Weight, step: Any) -> list[Weight]:
    """Return the two factors of a weight, or the weight where that saves nothing."""
    rank = max(1, round(step.rank_ratio * min(weight.rows, weight.columns)))
    if rank * (weight.rows + weight.columns) >= weight.count:
        return [weight]
    flat = len(weight.shape) == 2
    first = (rank, weight.columns) if flat else (rank, *weight.shape[1:])
    second = (weight.rows, rank) if flat else (weight.rows, rank, 1, 1)
    return [
        Weight(f"{weight.origin}.0", weight.origin, first, rank, weight.columns, weight.dtype, rank=rank),
        Weight(f"{weight.origin}.1", weight.origin, second, weight.rows, rank, weight.dtype, rank=rank),
    ]


def prune(weight: Weight, step: Any) -> list[Weight]:
    """Return the weight with as many kept as the step leaves."""
    if step.group is not None:
        kept, of = step.group
        return [weight] if weight.columns % of else [dataclasses.replace(weight, kept=weight.count * kept // of)]
    if step.criterion == "wanda":
        return [dataclasses.replace(weight, kept=weight.rows * (weight.columns - round(step.sparsity * weight.columns)))]
    return [dataclasses.replace(weight, kept=weight.count - round(step.sparsity * weight.count))]


def quantize(weight: Weight, step: Any) -> list[Weight]:
    """Return the weight on a grid, or as it is where the groups do not divide it."""
    group = step.group_size or weight.columns
    if weight.columns % group:
        return [weight]
    return [dataclasses.replace(weight, bits=step.weight_bits, groups=weight.columns // group, zero_point=step.grid == "asymmetric")]


def distill(weight: Weight, step: Any) -> list[Weight]:  # noqa: ARG001  training changes no shape
    """Return the weight: training moves values, not shapes."""
    return [weight]


CHANGES = {"lowrank": lowrank, "prune": prune, "quantize": quantize, "distill": distill}
