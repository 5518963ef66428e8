"""Heads and neurons of models whose products have other names or are fused, found by experiment.

A module is run again on what it was given for one item, while some outputs of one of its products are
changed: which inputs of another product change with them says what belongs together. Heads of queries, keys
and values in one product lie side by side or apart, neurons of a gate and its values too; the experiment
tells which. Nothing is read from names but the number of heads, which configurations and modules state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.compress.pruning.prunable_units import Space, UnitPart, blocks, inputs, off, outputs
from workbench.compress.pruning.tracing.probing import Probe, different, given_to
from workbench.errors import MISFITS
from workbench.modules.layer import can_hold

if TYPE_CHECKING:
    from collections.abc import Collection

    from workbench.tasks.base import Items, Kind

MOST_LAYERS = 16  # within a module that is looked at: an attention or a block, not a model
ABOVE = 3  # modules around a product that are looked at
NOT_COUNTS = ("dim", "size", "kv", "key_value")  # in names of numbers that are not how many heads there are


@dataclass(frozen=True)
class TracedAttention:
    """An attention found by experiment: which heads each group of `size` rows of its products acts on.

    `rows`: (name of a product, place of the group of rows, heads that it acts on); `groups`: heads that share
    keys and values, together.
    """

    name: str
    output: str
    heads: int
    size: int
    rows: tuple[tuple[str, int, frozenset[int]], ...]
    groups: tuple[tuple[int, ...], ...]

    def whole(self) -> Space:
        """Return heads as units, or, where heads share keys and values, such groups with all their heads."""
        wide = len(self.groups[0])
        unit = "heads" if wide == 1 else f"key-value groups of {wide} heads"
        return Space(self.name, unit, len(self.groups), self.parts([set(group) for group in self.groups]))

    def within(self) -> list[Space]:
        """Return one space for each group of heads that share keys and values: heads with their queries."""
        return [
            Space(
                self.name,
                f"query heads of key-value head {place}",
                len(group),
                self.parts([{head} for head in group]),
            )
            for place, group in enumerate(self.groups)
        ]

    def parts(self, units: list[set[int]]) -> tuple[UnitPart, ...]:
        """Return the rows and columns of some sets of heads, each a unit: rows that act on nothing else."""
        each, found = torch.arange(self.size), dict[str, list[Tensor]]()
        for unit in units:
            mine: dict[str, list[Tensor]] = {}
            for product, place, acts in self.rows:
                if acts <= unit:
                    mine.setdefault(product, []).append(place * self.size + each)
            for product, indices in mine.items():
                found.setdefault(product, []).append(torch.cat(indices))
        rows = [UnitPart(product, "rows", torch.stack(indices)) for product, indices in found.items()]
        columns = torch.stack(
            [torch.cat([head * self.size + each for head in sorted(unit)]) for unit in units]
        )
        return (*rows, UnitPart(self.output, "columns", columns))


@dataclass(frozen=True)
class Traced:
    """What was found, and why other places that look like it were not taken, by the name of their module."""

    attentions: tuple[TracedAttention, ...]
    neurons: tuple[Space, ...]
    skipped: dict[str, str]


def find_traced(model: nn.Module, kind: Kind, items: Items, known: Collection[str]) -> Traced:
    """Return the attentions and MLPs of a model besides its `known` layers, from one item."""
    modules = dict(model.named_modules())
    readers = {name: own_modules for name, own_modules in around(modules).items() if name not in known}
    owners = {owner for owned in readers.values() for owner in owned}
    try:
        seen = given_to(model, kind, items, {name: modules[name] for name in owners}) if owners else {}
    except (RuntimeError, ValueError, IndexError):  # a model that does not run is told of by others
        seen = {}
    attentions, neurons, skipped = list[TracedAttention](), list[Space](), dict[str, str]()
    found: dict[object, Any] = {}  # of modules that are alike one stands for all
    for reader, owned in readers.items():
        for owner in (name for name in owned if name in seen):
            alike = signature(modules, owner, reader)
            if alike not in found:
                found[alike] = (
                    owner,
                    traced(
                        model, modules, Probe(owner, modules[owner], *seen[owner], modules[reader]), reader
                    ),
                )
            first, result = found[alike]
            if isinstance(result, TracedAttention):
                attentions.append(renamed(result, first, owner))
            elif isinstance(result, Space):
                neurons.append(renamed_space(result, first, owner))
            elif result:
                skipped[owner] = result
            if result:
                break
    taken = {*known, *(one.output for one in attentions), *skipped}
    untaken = {
        owner: reason
        for owner, reason in skipped.items()
        if not any(name.startswith(f"{owner}.") for name in taken)
    }
    return Traced(tuple(attentions), tuple(neurons), untaken)


def head_spaces(attentions: Iterable[TracedAttention], sparsity: float, *, alike: bool) -> list[Space]:
    """Return the heads of attentions as units, by the rule of `find_heads`."""
    found: list[Space] = []
    for one in attentions:
        whole, within = one.whole(), one.within() if len(one.groups[0]) > 1 else []
        nearer = bool(within) and off(within[0].units, sparsity) < off(whole.units, sparsity) - 1e-9
        by_queries = bool(within) and (nearer if alike else whole.units == 1)
        found += within if by_queries else [whole]
    return found


def around(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Return, for every product, the modules around it that hold others too, the nearest first."""
    layers = [
        name for name, module in modules.items() if can_hold(module) and not isinstance(module, nn.Conv2d)
    ]
    found: dict[str, list[str]] = {}
    for layer in layers:
        owner, owned = layer, list[str]()
        for _ in range(ABOVE):
            owner = owner.rpartition(".")[0]
            beside = sum(name.startswith(f"{owner}.") for name in layers) if owner else 0
            if beside > MOST_LAYERS or not owner:
                break
            if beside > 1 and not isinstance(modules[owner], nn.ModuleList):
                owned.append(owner)
        found[layer] = owned
    return found


def signature(modules: dict[str, nn.Module], owner: str, reader: str) -> object:
    """Return what modules have in common of which one experiment speaks for all."""
    inside = tuple(
        (name.removeprefix(owner), type(module), outputs(module), inputs(module))
        for name, module in modules.items()
        if name.startswith(f"{owner}.") and can_hold(module)
    )
    return type(modules[owner]), reader.removeprefix(owner), inside


def traced(
    model: nn.Module, modules: dict[str, nn.Module], probe: Probe, reader: str
) -> TracedAttention | Space | str:
    """Return what a module is whose product `reader` reads the others', "" if nothing of these, or why it
    cannot be taken.
    """
    products = {
        name: module
        for name, module in modules.items()
        if name.startswith(f"{probe.name}.") and name != reader and can_hold(module)
    }
    try:
        before = probe.inputs()
        acting = {name: module for name, module in products.items() if acts(probe, before, module)}
        return judged(model, probe, before, acting, reader) if acting else ""
    except MISFITS:  # a module that does not run by itself, or routes, is none of these
        return ""


def judged(
    model: nn.Module, probe: Probe, before: Tensor, acting: dict[str, nn.Module], reader: str
) -> TracedAttention | Space | str:
    """Return what `traced` does, of products that act on what the reader is given."""
    mlp = mlp_of(probe, before, acting, reader)
    if mlp is not None:
        return mlp
    reasons = []
    for heads in head_counts(model, probe.module, before.shape[1]):
        found = attention_of(probe, before, acting, reader, heads)
        if isinstance(found, TracedAttention):
            return per_head(probe, found) or found
        reasons.append(found)
    return next((reason for reason in reasons if reason), "")


def acts(probe: Probe, before: Tensor, product: nn.Module) -> bool:
    """Return whether what the reader is given depends on a product."""
    return bool(different(probe.inputs(product, torch.arange(outputs(product))), before).any())


def mlp_of(probe: Probe, before: Tensor, acting: dict[str, nn.Module], reader: str) -> Space | None:
    """Return the neurons that a reader reads: every one made, at its own position, by rows of its own."""
    width = before.shape[1]
    half = torch.randperm(width, generator=probe.generator)[: width // 2].sort().values
    parts = []
    for name, product in acting.items():
        for rows in layouts(width, outputs(product)):
            if all(fits(probe, before, product, rows, some) for some in (half, rest_of(half, width))):
                parts.append(UnitPart(name, "rows", rows))
                break
    if not parts or width < 2:
        return None
    columns = UnitPart(reader, "columns", blocks(width, 1))
    return Space(parts[0].module, "neurons", width, (*parts, columns))


def layouts(width: int, rows: int) -> Iterator[Tensor]:
    """Yield which rows each neuron may have in a product, int64 [neurons, k]: one, or two."""
    if rows == width:
        yield blocks(width, 1)
    if rows == 2 * width:
        yield torch.stack([torch.arange(width), torch.arange(width) + width], 1)
        yield blocks(width, 2)


def rest_of(some: Tensor, width: int) -> Tensor:
    """Return the numbers below `width` that are not among some."""
    stays = torch.ones(width, dtype=torch.bool)
    stays[some] = False
    return stays.nonzero().flatten()


def fits(probe: Probe, before: Tensor, product: nn.Module, rows: Tensor, some: Tensor) -> bool:
    """Return whether changing the rows of some neurons at the first position changes these inputs there, and
    no others anywhere.
    """
    changed = different(probe.inputs(product, rows[some].flatten(), first=True), before).cpu()
    elsewhere = bool(changed[1:].any()) or len(changed) == 1
    return (
        not elsewhere
        and not bool(changed[0, rest_of(some, len(rows))].any())
        and bool(
            changed[0, some].float().mean() > 0.9  # a saturated activation hides one here and there
        )
    )


def head_counts(model: nn.Module, module: nn.Module, width: int) -> list[int]:
    """Return the numbers of heads that a module or its configuration states and that divide a width."""
    stated = [*numbers_of(module), *numbers_of(getattr(module, "config", None))]
    stated += [] if stated else numbers_of(getattr(model, "config", None))
    return [count for count in dict.fromkeys(stated) if count > 1 and width % count == 0]


def numbers_of(owner: Any) -> list[int]:
    """Return what an object states under names of heads."""
    found = [] if owner is None else list(vars(owner).items())
    if owner is not None and hasattr(owner, "num_attention_heads"):
        found.insert(0, ("num_attention_heads", owner.num_attention_heads))
    return [
        value
        for name, value in found
        if "head" in name and not any(word in name for word in NOT_COUNTS) and type(value) is int
    ]


def attention_of(
    probe: Probe, before: Tensor, acting: dict[str, nn.Module], reader: str, heads: int
) -> TracedAttention | str:
    """Return an attention of so many heads, or why it is none; "" if nothing looks like one."""
    size = before.shape[1] // heads
    if any(outputs(product) % size for product in acting.values()):
        return ""
    rows = []
    for name, product in acting.items():
        for place in range(outputs(product) // size):
            after = probe.inputs(product, torch.arange(place * size, (place + 1) * size))
            changed = different(after, before).any(0).view(heads, size).any(1)
            rows.append((name, place, frozenset(changed.nonzero().flatten().tolist())))
    shared = {acts for _, _, acts in rows if len(acts) > 1}
    groups = {tuple(sorted(acts)) for acts in shared}
    single = [head for head in range(heads) if not any(head in group for group in groups)]
    ordered = sorted([*groups, *((head,) for head in single)])
    mixed = (
        f"which rows of its products belong to which of {heads} heads cannot be told from what"
        f" {reader.rpartition('.')[2]} reads"
    )
    if sum(map(len, ordered)) != heads or len({len(group) for group in ordered}) > 1:
        return mixed
    for group in ordered:
        alone = [sum(acts == {head} for _, _, acts in rows) for head in group]
        together = sum(acts == set(group) for _, _, acts in rows)
        wanted = (
            (3, 3) if len(group) == 1 else (1, 2)
        )  # queries, keys and values; or queries, and both shared
        if set(alone) != {wanted[0]} or together != wanted[1]:
            return mixed
    return TracedAttention(probe.name, reader, heads, size, tuple(rows), tuple(ordered))


def per_head(probe: Probe, found: TracedAttention) -> str:
    """Return why heads cannot go though they are told apart: something beside the products has a part for
    each; "" if nothing has.
    """
    products = {f"{found.name}.{name}" for name, module in probe.module.named_modules() if can_hold(module)}
    for name, tensor in probe.module.named_parameters():
        owner = f"{found.name}.{name}".rpartition(".")[0]
        bare = owner == found.name
        if owner not in products and found.heads in tensor.shape and (bare or tensor.ndim > 1):
            return f"its parameter {name} {list(tensor.shape)} holds a part for every head"
    items = next((value.shape[0] for value in probe.given if isinstance(value, Tensor)), 1)
    for value in (*probe.given, *probe.named.values()):
        if not isinstance(value, Tensor):
            continue
        listed = value.ndim == 4 and value.shape[1] == found.heads
        flat = value.ndim == 3 and value.shape[0] == items * found.heads
        if listed or flat:
            return (
                f"it is given biases of positions {list(value.shape)} with a part for every head (as ALiBi's"
                " slopes), which stay those of all heads"
            )
    return ""


def renamed(found: TracedAttention, before: str, now: str) -> TracedAttention:
    """Return the same attention in a module of another name."""
    rows = tuple((now + name.removeprefix(before), place, acts) for name, place, acts in found.rows)
    output = now + found.output.removeprefix(before)
    return TracedAttention(now, output, found.heads, found.size, rows, found.groups)


def renamed_space(space: Space, before: str, now: str) -> Space:
    """Return the same units in a module of another name."""
    parts = tuple(
        UnitPart(now + part.module.removeprefix(before), part.axis, part.index) for part in space.parts
    )
    return Space(now + space.block.removeprefix(before), space.unit, space.units, parts)
