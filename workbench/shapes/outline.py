"""The file size of a recipe, computed from shapes alone: no weight is read, so it takes a millisecond.

Exact for dense weights, pruning and low rank. With a grid it is an upper bound: codes that round to zero can
make the form with a mask smaller than what shapes alone promise. It assumes scales that fit float16, as those
of ordinary weights do. For an average of widths it is close: which layer gets which width depends on values.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.formats.stored_forms import HALVES
from workbench.modules.factored import Form, Shape, cost, factor_shapes, form_for
from workbench.modules.layer import Layer, find_layers, output_head
from workbench.shapes.inputs import BUFFERS, after_activations

if TYPE_CHECKING:
    from workbench.recipe import Recipe, Step
    from workbench.shapes.structured import Anatomy

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
class Entry:
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
    # The layer's own share of a budget depends on its values: `kept` is the average over layers
    estimated: bool = False

    @property
    def count(self) -> int:
        """Return the number of weights, zeros included."""
        return self.rows * self.columns

    @property
    def form_shape(self) -> Shape:
        """Return what forms of low rank depend on."""
        kernel = (self.shape[2], self.shape[3]) if len(self.shape) == 4 else (1, 1)
        return Shape(self.rows, self.columns, kernel, convolution=len(self.shape) == 4, table=self.table)

    def encoded(self) -> list[Entry]:
        """Return the smallest encoding that shapes and promises allow (the rules of
        `workbench.modules.packing`).
        """
        key, stored = f"{self.name}.weight", self.cast or self.dtype
        mask = Entry(f"{key}.mask", "U8", (ceil8(self.count),), ceil8(self.count))
        if not self.bits or self.cast is not None:
            options = [[Entry(key, DTYPES[stored], self.shape, self.count * stored.itemsize)]]
            if self.kept is not None:
                options.append(
                    [Entry(f"{key}.values", DTYPES[stored], (self.kept,), self.kept * stored.itemsize), mask]
                )
            return min(options, key=total)
        options = [] if self.needs_mask else [[self.codes(self.count), *self.sides()]]
        if self.kept is not None:
            options.append([self.codes(self.kept), mask, *self.sides()])
        return min(options, key=total)

    def sides(self) -> list[Entry]:
        """Return what is stored beside codes: scales, zero points, multipliers of inputs."""
        key, rows = f"{self.name}.weight", self.scale_rows or self.rows
        scales, wide = rows * self.groups, 4 if self.scale_dtype == "F32" else 2
        found = [Entry(f"{key}.scale", self.scale_dtype, (rows, self.groups), wide * scales)]
        if self.zero_point and self.whole_zeros:
            found.append(
                Entry(f"{key}.zero_point", "U8", (ceil8(scales * self.bits),), ceil8(scales * self.bits))
            )
        elif self.zero_point:
            found.append(Entry(f"{key}.zero_point", self.scale_dtype, (rows, self.groups), wide * scales))
        if self.input_scale:
            found.append(Entry(f"{key}.input_scale", "F16", (self.columns,), 2 * self.columns))
        return found

    def codes(self, count: int) -> Entry:
        """Return the packed codes of `count` weights."""
        taken = ceil8(count * self.bits)
        return Entry(f"{self.name}.weight.codes", "U8", (taken,), taken)


def ceil8(bits: float) -> int:
    """Return the bytes that so many bits take."""
    return math.ceil(bits / 8)


def total(entries: Iterable[Entry]) -> int:
    """Return the bytes of all entries."""
    return sum(entry.bytes for entry in entries)


def file_length(entries: Iterable[Entry]) -> int:
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


@dataclass(frozen=True)
class Outline:
    """A model as shapes: the weights that methods can take, everything else, and the name of the output head.

    `positions` says how often each weight is applied to one item (tokens, or pixels of a convolution's
    output). `slack` are bytes that the header may take beyond what is known from shapes.
    """

    weights: tuple[Weight, ...]
    rest: tuple[Entry, ...]
    head: str | None
    positions: dict[str, int] = dataclasses.field(default_factory=dict)
    slack: int = 0
    anatomy: Anatomy | None = None  # without it, what a structured step leaves is unknown

    @classmethod
    def of(
        cls,
        model: nn.Module,
        positions: dict[str, int] | None = None,
        anatomy: Anatomy | None = None,
        known: Iterable[Layer] | None = None,
    ) -> Outline:
        """Read the shapes of a model; `known` are its layers, where they have been found before."""
        layers = {
            name: layer
            for layer in (find_layers(model)[0].values() if known is None else known)
            for name in (layer.name, *layer.others)
        }
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
                name, others = (
                    key.removesuffix(".weight"),
                    (layer.name, *layer.others) if layer.others else (),
                )
                weights.append(
                    Weight(
                        name,
                        layer.name,
                        tuple(value.shape),
                        *layer.shape,
                        value.dtype,
                        reserved=bool(layer.reserved),
                        table=layer.table,
                        others=others,
                    )
                )
        return cls(tuple(weights), tuple(rest), output_head(model), positions or {}, anatomy=anatomy)

    def after(self, recipe: Recipe) -> Outline | None:
        """Return the outline after a recipe, or None if one of its methods is not known here."""
        made = self
        for step in recipe:
            if getattr(step, "structured", False):
                from workbench.shapes.structured import after_structure

                left = after_structure(made, step)
                if left is None:
                    return None
                made = left
                continue
            if step.kind() == "activations":
                made = after_activations(made, step)
                continue
            change = CHANGES.get(step.kind())
            if change is None:
                return None
            weights = [
                part
                for weight in made.weights
                for part in (change(weight, step) if made.takes(weight, step) else [weight])
            ]
            made = dataclasses.replace(
                made, weights=tuple(weights), slack=made.slack + slack(step, len(made.weights))
            )
        moved = {
            weight.origin: weight.name
            for weight in made.weights
            if weight.name != weight.origin and not weight.others
        }  # the last of several
        return dataclasses.replace(made, rest=tuple(moved_bias(entry, moved) for entry in made.rest))

    def takes(self, weight: Weight, step: Step) -> bool:
        """Return whether a step works on a weight (the output head stays dense unless it is named)."""
        return step.takes(
            weight.name, weight.origin, *weight.others, head=weight.origin == self.head or weight.reserved
        )

    def entries(self) -> list[Entry]:
        """Return the tensors that are stored."""
        return [*self.rest, *(entry for weight in self.weights for entry in weight.encoded())]

    def file_bytes(self) -> int:
        """Return the bytes of the safetensors file."""
        return file_length(self.entries()) + self.slack

    def exact(self) -> bool:
        """Return whether `file_bytes` is exact.

        Else it is an upper bound (a close estimate where a budget is divided over the layers by their
        values).
        """
        return not self.slack and not any(weight.bits or weight.estimated for weight in self.weights)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of all weights for one item, zeros included, as every kernel of this
        version does.

        A table costs none. Factors in front of a stride are counted as if they came after it: a lower bound
        for those.
        """
        return sum(
            weight.count * self.positions.get(weight.origin, 1) for weight in self.weights if not weight.table
        )


def slack(step: Step, weights: int) -> int:
    """Return the bytes of header that a step may add: ranks that are shared out by values make other layers
    two than uniform ones.
    """
    return 256 * weights if getattr(step, "rank_allocation", "uniform") != "uniform" else 0


def moved_bias(entry: Entry, moved: dict[str, str]) -> Entry:
    """Return a bias, or what rounds inputs, under the name that it has once its layer is several.

    `moved` has the names of the modules that hold it now.
    """
    owner, _, last = entry.name.rpartition(".")
    return (
        dataclasses.replace(entry, name=f"{moved[owner]}.{last}")
        if last in {"bias", *BUFFERS} and owner in moved
        else entry
    )


def lowrank(weight: Weight, step: Any) -> list[Weight]:
    """Return the factors of a weight, or the weight where they save nothing.

    Shared out, uniform ranks stand for all.
    """
    shape = weight.form_shape
    form = form_for(shape, step.conv, step.rank_ratio)
    if weight.others or cost(shape, form) >= weight.count:
        return [weight]
    return [
        part(weight, str(index), stored, form.ranks[min(index, len(form.ranks) - 1)])
        for index, stored in enumerate(factor_shapes(shape, form))
    ]


def part(weight: Weight, name: str, stored: tuple[int, ...], rank: int) -> Weight:
    """Return one of the weights that take the place of another."""
    return Weight(
        f"{weight.origin}.{name}",
        weight.origin,
        stored,
        stored[0],
        math.prod(stored[1:]),
        weight.dtype,
        rank=rank,
        table=weight.table and name == "0",
    )


def repair(weight: Weight, step: Any) -> list[Weight]:
    """Return the weight with two small ones beside it, where something was lost and they take less than the
    weight itself.
    """
    rank = step.rank(weight.rows, weight.columns)
    untouched = weight.kept is None and not weight.bits
    if (
        untouched
        or weight.table
        or weight.others
        or weight.rank is not None
        or rank * (weight.rows + weight.columns) >= weight.count
    ):
        return [weight]
    first, second = factor_shapes(weight.form_shape, Form("channel", (rank,)))
    return [
        part(weight, "first", first, rank),
        part(weight, "second", second, rank),
        dataclasses.replace(weight, name=f"{weight.origin}.base"),
    ]


def prune(weight: Weight, step: Any) -> list[Weight]:
    """Return the weight with as many kept as the step leaves."""
    if step.group is not None:
        kept, of = step.group
        return (
            [weight] if weight.columns % of else [dataclasses.replace(weight, kept=weight.count * kept // of)]
        )
    return [
        dataclasses.replace(
            weight,
            kept=weight.count - round(step.sparsity * weight.count),
            estimated=step.allocation != "uniform",
        )
    ]


def quantize(weight: Weight, step: Any) -> list[Weight]:
    """Return the weight in its stored form, or as it is where the groups do not divide it."""
    group = step.group_size or weight.columns
    if weight.columns % group:
        return [weight]
    if step.number_format in HALVES:
        return [dataclasses.replace(weight, bits=16, cast=HALVES[step.number_format])]
    integer, hqq = step.number_format == "integer", step.rounding == "hqq"
    made = dataclasses.replace(
        weight,
        bits=step.weight_bits,
        groups=weight.columns // group,
        scale_rows=int(step.granularity == "tensor"),
        scale_dtype="F32" if step.number_format == "float8" else "F16",
        zero_point=integer and step.grid == "asymmetric",
        whole_zeros=not hqq,
        needs_mask=hqq and weight.kept is not None,
        input_scale=step.rounding == "awq" and not weight.table,
        estimated=weight.estimated or step.mixed,
    )
    return [made]


def distill(weight: Weight, step: Any) -> list[Weight]:  # noqa: ARG001  training changes no shape
    """Return the weight: training moves values, not shapes."""
    return [weight]


CHANGES = {
    "lowrank": lowrank,
    "prune": prune,
    "quantize": quantize,
    "repair": repair,
    "distill": distill,
    "qat": distill,
    "transfer": distill,
    "kvcache": distill,
}
