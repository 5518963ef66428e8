"""Repair: a small low-rank term beside what pruning or quantization left of a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from workbench.compress.core.batch import Batch, grouped
from workbench.compress.core.context import Work
from workbench.compress.core.moments import second_moment_of
from workbench.compress.low_rank.decompose import factors, leading, one_by_one
from workbench.compress.registry import METHODS
from workbench.errors import RecipeError
from workbench.modules.factored import Repaired, copies_of, repaired_like
from workbench.modules.layer import Layer, find_layers, replace_module
from workbench.modules.visiting import settle, visiting
from workbench.recipe import About, Step, configuration


@configuration
class Repair(Step):
    """Add L R of rank r = round(repair_ratio * min(outputs, inputs)), at least 1, to what earlier steps left
    of each weight.

    L R is the rank-r matrix that makes the error of the layer's outputs on calibration data least: min ||(W -
    W' - L R) X||, with W the dense weight (EoRA, Liu et al. 2024). It has a closed form, L = Q and R = Q^T (W
    - W') with Q the first r eigenvectors of the second moment of the lost outputs. Masks and grids of W' stay
    as they are; L and R are stored in the model's dtype, and count in every size. `repair_rounds` above 1
    alternates with the pruning before it: prune W - L R to the same number of zeros by the same criterion,
    then fit L R again (sparse plus low rank as in OATS, Zhang & Papyan 2024).

    What it does not do: train, repair factors of a low-rank layer, embeddings or shared weights, or change a
    bias.
    """

    slider: ClassVar[str] = "repair_ratio"
    position: ClassVar[int] = 35
    aside: ClassVar[bool] = True
    stops: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1)
    about: ClassVar[tuple[About, ...]] = (
        About(
            "repair_ratio",
            "EoRA, Liu et al. 2024",
            "second moments of every layer's inputs, one pass over calibration data",
            "one decomposition a layer, of what was lost",
            "costs bytes: count them against a milder recipe",
        ),
        About(
            "repair_rounds",
            "OATS, Zhang & Papyan 2024",
            "second moments of every layer's inputs, one pass over calibration data",
            "the same, several times",
            "no convergence is promised",
        ),
    )

    repair_ratio: Annotated[
        float,
        Field(gt=0, le=0.5, description="rank of the term that is added, as a fraction of the full rank"),
    ] = 0.05
    repair_rounds: Annotated[
        int,
        Field(
            ge=1, le=64, description="fits of the term; above 1 the pruning before it is done again each time"
        ),
    ] = 1

    def rank(self, rows: int, columns: int) -> int:
        """Return the rank for a weight of this shape."""
        return max(1, round(self.repair_ratio * min(rows, columns)))

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse where there is nothing to repair, or what would be undone."""
        kinds = [step.kind() for step in earlier]
        if not {"prune", "quantize"} & set(kinds):
            raise RecipeError("Repair needs something to repair: put it after Prune or Quantize")
        if "distill" in kinds:
            raise RecipeError(
                "Repair cannot follow Distill: it would pull trained weights back to the dense ones; put"
                " Repair first, then its factors train too"
            )
        if "transfer" in kinds:
            raise RecipeError(
                "Repair cannot follow Transfer: it would pull taught weights back to the dense ones; put"
                " Repair first, then its factors are taught too"
            )
        if self.repair_rounds > 1:
            self.check_rounds(earlier)

    def check_rounds(self, earlier: tuple[Step, ...]) -> None:
        """Refuse to prune again what no rule here could prune again."""
        if any(step.kind() == "quantize" for step in earlier):
            raise RecipeError(
                f"repair_rounds={self.repair_rounds} prunes again after each fit, which would leave the grid"
                " of Quantize: take repair_rounds=1"
            )
        for step in earlier:
            if step.kind() != "prune":
                continue
            if getattr(step, "train_steps", 0):
                raise RecipeError(
                    f"repair_rounds={self.repair_rounds} prunes the dense weights again, which would undo the"
                    " training of Prune: take repair_rounds=1"
                )
            pattern, criterion = getattr(step, "pattern", ""), getattr(step, "criterion", "")
            if pattern != "unstructured" and ":" not in pattern:
                raise RecipeError(
                    f"repair_rounds={self.repair_rounds} needs zeros that can be chosen again;"
                    f" pattern={pattern!r} takes parts out: take repair_rounds=1"
                )
            if criterion not in {"magnitude", "wanda"}:
                raise RecipeError(
                    f"repair_rounds={self.repair_rounds} chooses zeros again by magnitude or wanda, not by"
                    f" {criterion!r}: take one of these, or repair_rounds=1"
                )

    def label(self) -> str:
        """Return such as `repair 5%`."""
        return f"repair {100 * self.repair_ratio:.3g}%" + (
            f" x{self.repair_rounds}" if self.repair_rounds > 1 else ""
        )


@METHODS.register(Repair)
def repair(step: Repair, work: Work) -> None:
    """Fit the term of every layer that lost something, and put it beside the layer."""
    layers = [layer for layer in work.choose(step) if can_repair(step, layer, work)]
    dense = find_layers(work.task.model)[0]
    done = 0
    for batch in alike(layers, work):
        work.progress(step.kind(), done, len(layers))
        moments = [second_moment_of(layer, work) for layer in batch.layers]
        with visiting([dense[layer.origin] for layer in batch.layers]):
            wanted = torch.stack([layer.left_of(dense[layer.origin].matrix()) for layer in batch.layers])
        left, right = best_term(wanted - batch.matrices(), moments, step.rank(*batch.shape))
        for _ in range(1, step.repair_rounds):
            prune_again(batch, wanted - left @ right, moments, work)
            left, right = best_term(wanted - batch.matrices(), moments, step.rank(*batch.shape))
        install(batch, left, right, work)
        done += len(batch.layers)
        for layer in batch.layers:
            work.took(
                step,
                layer,
                f"repaired by rank {step.rank(*batch.shape)}"
                + (f" in {step.repair_rounds} rounds" if step.repair_rounds > 1 else ""),
            )
    work.progress(step.kind(), len(layers), len(layers))


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
    elif rank * (rows + columns) >= rows * columns:
        reason = f"a term of rank {rank} would take more than the {rows}x{columns} weight itself"
    if reason:
        work.say(layer, f"repair skipped: {reason}")
    return not reason


def best_term(lost: Tensor, moments: list[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return L [layers, o, r] and R [layers, r, i], float32, that minimise ||(lost - L R) X||. lost: float32
    [layers, o, i].
    """
    found = []
    for part in one_by_one(len(lost)):
        weight = lost[part].double()
        found.append(
            factors(
                weight,
                leading(weight, torch.stack(moments[part]).double(), rank),
                even=False,
                dtype=torch.float32,
            )
        )
    return torch.cat([stack.left for stack in found]), torch.cat([stack.right for stack in found])


def prune_again(batch: Batch, rest: Tensor, moments: list[Tensor], work: Work) -> None:
    """Prune what the term leaves over, to as many zeros as before, by the criterion of the recipe's own
    pruning.
    """
    pruning: Any = work.done[batch.layers[0].origin, "prune"]
    importance = rest.abs()
    if pruning.criterion == "wanda":
        importance *= torch.stack([moment.diagonal().clamp_min(0).sqrt() for moment in moments]).unsqueeze(1)
    old = torch.stack([layer.mask for layer in batch.layers if layer.mask is not None])
    masks = same_budget(importance, old, pruning.group, by_row=pruning.criterion == "wanda")
    batch.write(rest * masks)
    for layer, mask in zip(batch.layers, masks, strict=True):
        layer.mask = mask


def same_budget(importance: Tensor, mask: Tensor, group: tuple[int, int] | None, *, by_row: bool) -> Tensor:
    """Return masks that keep the most important weights, as many in each group, row or layer as `mask` keeps
    there; both [layers, o, i].
    """
    if group is not None:
        parts, kept = importance.unflatten(2, (-1, group[1])), mask.unflatten(2, (-1, group[1]))
    else:
        parts, kept = (importance, mask) if by_row else (importance.flatten(1), mask.flatten(1))
    places = parts.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    keep: Tensor = places < kept.sum(-1, keepdim=True)
    return keep.view_as(mask)


def install(batch: Batch, left: Tensor, right: Tensor, work: Work) -> None:
    """Put the term beside each layer's module, and entries for all three in the place of the layer's."""
    rank = right.shape[1]
    made: dict[str, list[Layer]] = {}
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
        made[layer.name] = [base, first, second]
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
        Batch(tuple(parts[index] for parts in made.values())).write(stack)
    settle(work.model, [part for parts in made.values() for part in parts])
    work.layers = {layer.name: layer for name, old in work.layers.items() for layer in made.get(name, [old])}


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
