"""Where a model has units that can be taken out: attention heads and MLP neurons of transformer blocks, whole
blocks.

A `Space` is a set of interchangeable units (the heads of one attention, the neurons of one MLP). It lists,
for every module that a unit touches, which rows (outputs) or columns (inputs) belong to which unit, so that
one rule can score, mask or remove units of any architecture. Channels of convolutions are in
`workbench.compress.pruning.channels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from workbench.modules.layer import can_hold

ATTENTIONS = (  # query, key, value, output: names below the module that holds all four
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("c_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2: one product for all three
)
MLPS = (  # what makes the neurons, then what reads them
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("intermediate.dense",), "output.dense"),
    (("lin1",), "lin2"),
)
HEAD_SIZES = ("head_dim", "attention_head_size")


@dataclass(frozen=True)
class UnitPart:
    """What the units of a space have in one module.

    `index` int64 [units, k]: rows (outputs), or columns (input channels).
    """

    module: str
    axis: Literal["rows", "columns"]
    index: Tensor


@dataclass(frozen=True)
class Space:
    """Units of one kind, of which any may go as long as one stays.

    `block` is what the report calls the place, `unit` the units.
    """

    block: str
    unit: str  # in the plural
    units: int
    parts: tuple[UnitPart, ...]

    def modules(self) -> list[str]:
        """Return the names of the modules that its units touch, each once."""
        return list(dict.fromkeys(part.module for part in self.parts))


@dataclass(frozen=True)
class FoundSpaces:
    """The spaces of a model, and the reason for every place that looks like one and cannot be taken."""

    spaces: tuple[Space, ...]
    skipped: dict[str, str]
    traced: frozenset[str] = frozenset()  # of the spaces, those found by experiment, by their block
    sizes: dict[str, int] = field(default_factory=dict)  # of a head of those that are attentions


@dataclass(frozen=True)
class Attention:
    """One attention: names of its products, and how their rows are divided.

    `owner` holds the numbers of heads.
    """

    name: str
    owner: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    shared: int  # heads of keys and values
    size: int  # of a head

    def moved(self, name: str) -> Attention:
        """Return the same attention where its module has another name (blocks before it are gone)."""
        owner, query, key, value, output = (
            name + part.removeprefix(self.name)
            for part in (self.owner, self.query, self.key, self.value, self.output)
        )
        return replace(self, name=name, owner=owner, query=query, key=key, value=value, output=output)

    @property
    def fused(self) -> bool:
        """Return whether one product makes queries, keys and values."""
        return self.query == self.key

    def whole(self) -> Space:
        """Return units that keep every ratio: a head.

        Or, where heads share keys and values, such a group with all its heads.
        """
        group = self.heads // self.shared
        wide, narrow = blocks(self.shared, group * self.size), blocks(self.shared, self.size)
        if self.fused:
            width = self.heads * self.size
            rows = [UnitPart(self.query, "rows", torch.cat([wide, wide + width, wide + 2 * width], 1))]
        else:
            rows = [
                UnitPart(self.query, "rows", wide),
                UnitPart(self.key, "rows", narrow),
                UnitPart(self.value, "rows", narrow),
            ]
        unit = "heads" if group == 1 else f"key-value groups of {group} heads"
        return Space(self.name, unit, self.shared, (*rows, UnitPart(self.output, "columns", wide)))

    def within(self) -> list[Space]:
        """Return one space for each group of heads that share keys and values: as many query heads of each
        must go.
        """
        group = self.heads // self.shared
        wide = blocks(self.heads, self.size).view(self.shared, group, self.size)
        return [
            Space(
                self.name,
                f"query heads of key-value head {i}",
                group,
                (UnitPart(self.query, "rows", wide[i]), UnitPart(self.output, "columns", wide[i])),
            )
            for i in range(self.shared)
        ]


def blocks(units: int, width: int) -> Tensor:
    """Return indices [units, width]: unit u has `width` consecutive ones."""
    return torch.arange(units * width).view(units, width)


def find_attentions(model: nn.Module) -> tuple[list[Attention], dict[str, str]]:
    """Return every attention of a known form, and why others cannot be taken."""
    modules, attentions, skipped = dict(model.named_modules()), list[Attention](), dict[str, str]()
    for name in modules:
        for form in ATTENTIONS:
            products = members(modules, name, form)
            if products:
                told = attention(modules, name, products)
                if isinstance(told, str):
                    skipped[name] = told
                else:
                    attentions.append(told)
                break
    return attentions, skipped


def members(modules: dict[str, nn.Module], name: str, form: tuple[str, ...]) -> list[str]:
    """Return the full names of the modules of a form below `name`, or nothing if one is missing."""
    names = [f"{name}.{part}" if name else part for part in form]
    return names if all(part in modules and can_hold(modules[part]) for part in names) else []


def outputs(module: nn.Module) -> int:
    """Return how many outputs a Linear, Conv1D or Conv2d has."""
    return int(
        getattr(module, "out_features", 0) or getattr(module, "out_channels", 0) or getattr(module, "nf", 0)
    )


def inputs(module: nn.Module) -> int:
    """Return how many inputs a Linear, Conv1D or Conv2d has."""
    return int(
        getattr(module, "in_features", 0) or getattr(module, "in_channels", 0) or getattr(module, "nx", 0)
    )


def attention(modules: dict[str, nn.Module], name: str, products: list[str]) -> Attention | str:
    """Return an attention with its numbers read from shapes, or why its heads cannot be told apart."""
    query, key, value, output = products
    owner = query.rpartition(".")[0]
    size = next(
        (
            int(getattr(modules[owner], attribute))
            for attribute in HEAD_SIZES
            if hasattr(modules[owner], attribute)
        ),
        0,
    )
    if not size:
        return f"its size of a head is not known: it has neither of {', '.join(HEAD_SIZES)}"
    wide, narrow = outputs(modules[query]), outputs(modules[key])
    if query == key:
        wide, odd = divmod(wide, 3)
        narrow = wide
        if odd:
            return (
                f"the {outputs(modules[query])} outputs of {query} are not queries, keys and values of one"
                " width"
            )
    if (
        wide % size
        or narrow % size
        or wide % max(1, narrow)
        or inputs(modules[output]) != wide
        or (key != query and outputs(modules[value]) != narrow)
    ):
        return (
            f"its heads do not divide: {wide} query and {narrow} key outputs, {inputs(modules[output])} read"
            f" by {output}, {size} a head"
        )
    for parameter, tensor in modules[owner].named_parameters():
        if f"{owner}.{parameter}".rpartition(".")[0] not in products and tensor.shape[-1] != size:
            return f"its parameter {parameter} {list(tensor.shape)} belongs to several heads at once"
    return Attention(name, owner, query, key, value, output, wide // size, narrow // size, size)


def find_neurons(model: nn.Module) -> FoundSpaces:
    """Return the neurons of every MLP of a known form."""
    modules, spaces, skipped = dict(model.named_modules()), list[Space](), dict[str, str]()
    for name in modules:
        for makers, reader in MLPS:
            products = members(modules, name, (*makers, reader))
            if products:
                widths = {outputs(modules[part]) for part in products[:-1]} | {inputs(modules[products[-1]])}
                if len(widths) > 1:
                    skipped[name] = (
                        f"what {products[-1]} reads is not what {' and '.join(products[:-1])} make:"
                        f" {inputs(modules[products[-1]])} inputs"
                    )
                    continue
                each = blocks(widths.pop(), 1)
                rows = tuple(UnitPart(part, "rows", each) for part in products[:-1])
                spaces.append(
                    Space(
                        block_of(name, makers, reader),
                        "neurons",
                        len(each),
                        (*rows, UnitPart(products[-1], "columns", each)),
                    )
                )
                break
    return FoundSpaces(tuple(spaces), skipped)


def block_of(name: str, makers: tuple[str, ...], reader: str) -> str:
    """Return the name of an MLP in the report: that of the module that holds it, or of its first product
    where that holds more.
    """
    return f"{name}.{makers[0]}" if "." in makers[0] or (makers[0], reader) == ("fc1", "fc2") else name


def find_heads(model: nn.Module, sparsity: float, *, alike: bool) -> FoundSpaces:
    """Return the heads of every attention as units.

    Where heads share keys and values there are two ways that keep the model valid: whole groups go, or as
    many query heads of every group. The one that comes nearer to the sparsity is taken, whole groups if both
    do (they shrink the cache as well); if blocks may lose different numbers (`alike` False), whole groups
    wherever there are several.
    """
    attentions, skipped = find_attentions(model)
    spaces: list[Space] = []
    for attended in attentions:
        whole, within = [attended.whole()], attended.within() if attended.heads > attended.shared else []
        if not within:
            spaces += whole
        elif alike:
            spaces += (
                within if off(within[0].units, sparsity) < off(attended.shared, sparsity) - 1e-9 else whole
            )
        else:
            spaces += whole if attended.shared > 1 else within
    return FoundSpaces(tuple(spaces), skipped)


def off(units: int, sparsity: float) -> float:
    """Return how far from the sparsity whole units end up."""
    return abs(removed_count(units, sparsity) / units - sparsity)


def removed_count(units: int, sparsity: float) -> int:
    """Return how many of so many units go: the nearest whole number, half a unit counts as one, and at least
    one stays.
    """
    return max(0, min(units - 1, math.floor(sparsity * units + 0.5 + 1e-9)))


def find_blocks(model: nn.Module) -> dict[str, list[int]]:
    """Return every list of blocks by name, with the positions of the blocks that may go.

    Blocks of a transformer (each holds an attention of a known form) may all go; of a residual network, those
    whose shortcut changes nothing.
    """
    attended = {attended_place.name for attended_place in find_attentions(model)[0]}
    lists: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module):
            children = list(module)
            if isinstance(module, nn.ModuleList) and all(
                any(a.startswith(f"{name}.{i}.") for a in attended) for i in range(len(children))
            ):
                lists[name] = list(range(len(children)))
            elif all(hasattr(child, "shortcut") for child in children):
                lists[name] = [
                    i for i, child in enumerate(children) if isinstance(child.shortcut, nn.Identity)
                ]
    return lists
