"""Repair: a small low-rank term beside what pruning or quantization left of a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workbench.calibration.outside_use import used_from_outside
from workbench.compress.core.batch import Batch, attempt, grouped
from workbench.compress.core.context import Work
from workbench.compress.core.moments import second_moment_of
from workbench.compress.low_rank import predicted
from workbench.compress.low_rank.decompose import factors, leading, one_by_one
from workbench.compress.low_rank.options import Repair
from workbench.compress.low_rank.splittable import does_more
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.criterion.seen import Seen
from workbench.compress.pruning.options import Prune
from workbench.compress.registry import METHODS
from workbench.errors import RecipeError
from workbench.modules.factored import Repaired, copies_of, repaired_like
from workbench.modules.layer import Layer, find_layers, replace_module
from workbench.modules.visiting import settle, visiting

__all__ = ["Repair", "repair"]


# What a layer with a term beside it has too
KNOWN = frozenset(dir(Repaired)) | {"training", "base", "first", "second"}


@METHODS.register(
    Repair,
    title="repair",
    shapes=predicted.repair_shapes,
    errors=predicted.repair_errors,
    strength=lambda ratio: min(1.0, (4 * ratio) ** 0.5),
    trains=lambda _: False,
    placed=lambda _: "",
    reads=lambda _: frozenset({"moments"}),
    alone=True,
)
def repair(step: Repair, work: Work) -> None:
    """Fit the term of every layer that lost something, and put it beside the layer."""
    layers = [layer for layer in work.choose(step) if can_repair(step, layer, work)]
    dense = find_layers(work.task.model)[0]
    done = 0
    for batch in alike(layers, work):
        work.progress(step.kind(), done, len(layers))
        attempt(batch, partial(repair_batch, step, dense=dense, work=work))
        done += len(batch.layers)
        for layer in batch.layers:
            work.took(
                step,
                layer,
                f"repaired by rank {step.rank(*batch.shape)}"
                + (f" in {step.repair_rounds} rounds" if step.repair_rounds > 1 else ""),
            )
    work.progress(step.kind(), len(layers), len(layers))


def repair_batch(step: Repair, batch: Batch, dense: dict[str, Layer], work: Work) -> None:
    """Fit the terms of layers of one shape, and put them beside the layers."""
    moments = [second_moment_of(layer, work) for layer in batch.layers]
    with visiting([dense[layer.origin] for layer in batch.layers]):
        wanted = torch.stack([layer.left_of(dense[layer.origin].matrix()) for layer in batch.layers])
    left, right = best_term(wanted - batch.matrices(), moments, step.rank(*batch.shape))
    for _ in range(1, step.repair_rounds):
        prune_again(batch, wanted - left @ right, moments, work)
        left, right = best_term(wanted - batch.matrices(), moments, step.rank(*batch.shape))
    install(batch, left, right, work)


def alike(layers: list[Layer], work: Work) -> Iterator[Batch]:
    """Yield batches of layers that the same step pruned."""
    by_step: dict[object, list[Layer]] = {}
    for layer in layers:
        by_step.setdefault(work.done.get((layer.origin, "prune")), []).append(layer)
    for members in by_step.values():
        yield from grouped(members)


def can_repair(step: Repair, layer: Layer, work: Work) -> bool:
    """Return whether a term can stand beside a layer; if not, the report says why."""
    rows, columns = layer.shape
    rank = step.rank(rows, columns)
    reason = ""
    if layer.rank is not None:
        reason = "a factor of a low-rank layer; a larger rank_ratio is its repair"
    elif layer.others:
        reason = f"{', '.join((layer.name, *layer.others))} share one weight"
    elif layer.table:
        reason = "an embedding has no second moment of inputs"
    elif any(
        getattr(work.done.get((layer.origin, "prune")), option, False)
        for option in ("reconstruct", "train_steps")
    ):
        reason = "its weights were fitted anew when it was pruned, so the dense ones are no longer the aim"
    elif layer.mask is None and layer.grid is None:
        reason = "no earlier step pruned or quantized it"
    elif outside := sorted(used_from_outside(work.statistics).get(layer.origin, frozenset()) - KNOWN):
        reason = (
            f"the model uses {', '.join(outside)} of it, which a layer with a term beside it does not have"
        )
    elif rank * (rows + columns) >= rows * columns:
        reason = f"a term of rank {rank} would take more than the {rows}x{columns} weight itself"
    elif does_more(layer.module):
        reason = f"a {type(layer.module).__name__} does more than one product"
    if reason:
        work.say(layer, f"repair skipped: {reason}")
    return not reason


def best_term(lost: Tensor, moments: list[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return L [layers, o, r] and R [layers, r, i], float32, that minimise ||(lost - L R) X||. lost: float32
    [layers, o, i].
    """
    terms = []
    for part in one_by_one(len(lost)):
        weight = lost[part].double()
        terms.append(
            factors(
                weight,
                leading(weight, torch.stack(moments[part]).double(), rank),
                even=False,
                dtype=torch.float32,
            )
        )
    return torch.cat([stack.left for stack in terms]), torch.cat([stack.right for stack in terms])


@dataclass(frozen=True)
class RestSeen(Seen):
    """What a term leaves over, as a criterion that `repeats` sees it: weights and second moments alone."""

    weights: Tensor
    moments: list[Tensor]

    def input_norms(self) -> Tensor:
        """Return sqrt(E[x_i^2]), [layers, inputs]."""
        return torch.stack([moment.diagonal().clamp_min(0).sqrt() for moment in self.moments])

    def mean_gradients(self) -> Tensor:
        """Refuse: the loss was never asked about these weights."""
        raise RecipeError("what a repair leaves over has no gradients")

    def squared_gradients(self) -> Tensor:
        """Refuse, as `mean_gradients`."""
        return self.mean_gradients()

    def removal_errors(self) -> Tensor:
        """Refuse: nothing makes up for what is removed here."""
        raise RecipeError("what a repair leaves over is not adjusted when zeros are chosen again")

    def random(self, seed: int) -> Tensor:
        """Refuse: a draw is not repeated."""
        raise RecipeError(f"zeros drawn by seed {seed} are not chosen again")


def prune_again(batch: Batch, rest: Tensor, moments: list[Tensor], work: Work) -> None:
    """Prune what the term leaves over, to as many zeros as before, by the criterion of the recipe's own
    pruning.
    """
    pruning: Any = work.done[batch.layers[0].origin, Prune.kind()]
    criterion = CRITERIA[pruning.criterion]
    importance = criterion.scores(RestSeen(rest, moments), pruning.seed)
    old = torch.stack([layer.mask for layer in batch.layers if layer.mask is not None])
    masks = same_budget(importance, old, pruning.group, by_row=criterion.by_row)
    batch.write(rest * masks)
    for layer, mask in zip(batch.layers, masks, strict=True):
        layer.mask = mask


def same_budget(importance: Tensor, mask: Tensor, group: tuple[int, int] | None, *, by_row: bool) -> Tensor:
    """Return masks that keep the most important weights, as many in each group, row or layer as `mask` keeps
    there; both [layers, o, i].
    """
    if group is not None:
        groups, kept = importance.unflatten(2, (-1, group[1])), mask.unflatten(2, (-1, group[1]))
    else:
        groups, kept = (importance, mask) if by_row else (importance.flatten(1), mask.flatten(1))
    places = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    keep: Tensor = places < kept.sum(-1, keepdim=True)
    return keep.view_as(mask)


def install(batch: Batch, left: Tensor, right: Tensor, work: Work) -> None:
    """Put the term beside each layer's module, and entries for all three in the place of the layer's."""
    rank = right.shape[1]
    successors: dict[str, list[Layer]] = {}
    for layer, module in zip(batch.layers, modules_for(batch, rank), strict=True):
        replace_module(work.model, layer.name, module)
        base, first, second = (
            Layer(
                f"{layer.name}.{role}",
                layer.origin,
                getattr(module, role),
                pristine=False,
                role=role,
                place=layer.place,
            )
            for role in ("base", "first", "second")
        )
        base.mask, base.grid, base.rows, base.columns = layer.mask, layer.grid, layer.rows, layer.columns
        first.columns, second.rows = layer.columns, layer.rows
        successors[layer.name] = [base, first, second]
    if any(
        layer.smooth is not None for layer in batch.layers
    ):  # the term reads inputs as they are, not divided
        right = torch.stack(
            [
                part if layer.smooth is None else part / layer.smooth
                for layer, part in zip(batch.layers, right, strict=True)
            ]
        )
    for index, stack in ((1, right), (2, left)):
        Batch(tuple(triple[index] for triple in successors.values())).write(stack)
    settle(work.model, [part for triple in successors.values() for part in triple])
    work.layers = {
        layer.name: layer for name, old in work.layers.items() for layer in successors.get(name, [old])
    }


def modules_for(batch: Batch, rank: int) -> list[Repaired]:
    """Return the modules that take the places of a batch's, each with the old one as its base."""
    modules = [layer.module for layer in batch.layers]
    if (
        any(isinstance(module, nn.Conv2d) for module in modules)
        or len({(type(module), module.training) for module in modules}) > 1
    ):
        return [repaired_like(module, rank) for module in modules]
    template = repaired_like(modules[0], rank)
    terms = copies_of(nn.ModuleList([template.first, template.second]), len(modules))
    return [Repaired(module, *term) for module, term in zip(modules, terms, strict=True)]
