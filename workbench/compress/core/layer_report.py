"""The per-layer report: what was done to each weight, what it cost, or why nothing was done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.compress.core.batch import Batch, grouped
from workbench.compress.core.invariants import look_over
from workbench.formats.stored_forms import effective_bits
from workbench.kernels.weight_passes import Change
from workbench.modules.checkpoint_types import narrower
from workbench.modules.factored import kind_of, product
from workbench.modules.input_quantizer import acting_weight
from workbench.modules.layer import Layer, can_hold
from workbench.modules.visiting import visiting
from workbench.util.library_internals import children_of

if TYPE_CHECKING:
    from workbench.compress.core.context import Work

PIECE = {"cuda": 2**25, "cpu": 2**20}  # weights that are compared at once


@dataclass(frozen=True)
class LayerReport:
    """One weight of the dense model.

    `shape` is [outputs, inputs] in that; None means that the property does not apply.

    `sparsity` is the fraction of exact zeros, `bits` the width of the codes, `relative_error` ||W' - W|| /
    ||W|| (Frobenius, what was removed counts as zero), `weights` the number of weights now stored, zeros
    included, `effective_bits` what each of these takes with its share of scales and zero points (see
    `workbench.formats.stored_forms`). A weight that several modules share is counted under the one that
    `outcome` names; `weights` is 0 under the others.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    sparsity: float | None
    rank: int | None
    bits: int | None
    relative_error: float | None
    outcome: str
    effective_bits: float | None = None


def layer_reports(work: Work) -> tuple[LayerReport, ...]:
    """Return one report for every weight of the dense model, in the order of its modules."""
    now: dict[str, list[Layer]] = {}
    for layer in work.layers.values():
        now.setdefault(layer.origin, []).append(layer)
    measured = changes(work.dense, now)
    return tuple(
        one_report(
            name,
            "; ".join(outcomes) or work.left.get(name, "left dense"),
            now.get(name, []),
            measured.get(name),
            work,
        )
        for name, outcomes in work.outcomes.items()
    )


def one_report(
    name: str, outcome: str, now: list[Layer], change: tuple[float, int] | None, work: Work
) -> LayerReport:
    """Return the report of one weight.

    `now` holds the layer, its factors, or nothing if no method can take it or it was removed.
    """
    shape = matrix_shape(work, name)
    if work.place(name) is None:
        return LayerReport(name, shape, 0, None, None, None, 1.0, outcome)
    if name in work.shared:
        return LayerReport(name, shape, 0, None, None, None, None, outcome)
    if change is None:
        weight = weight_named(work.model, str(work.place(name)))  # of a router, some rows may have left
        return LayerReport(name, shape, weight.numel(), None, None, None, None, outcome)
    error, zeros = change
    count = sum(layer.parameter.numel() for layer in now)
    bits = next((layer.grid.bits for layer in now if layer.grid is not None), None)
    return LayerReport(
        name,
        shape,
        count,
        zeros / count,
        now[-1].rank,
        bits,
        None if math.isnan(error) else error,
        outcome,
        effective_bits_of(now, work.file_types),
    )


def effective_bits_of(
    layers: Sequence[Layer], types: Mapping[str, torch.dtype] | None = None
) -> float | None:
    """Return the bits a weight that layers take, scales and zero points included, None if none of them is on
    a grid; see `workbench.formats.stored_forms`. `types` are those of the checkpoint's tensors.
    """
    if all(layer.grid is None for layer in layers):
        return None
    return effective_bits(
        (
            layer.grid,
            layer.parameter.numel(),
            8 * narrower(layer.parameter.dtype, (types or {}).get(f"{layer.name}.weight")).itemsize,
        )
        for layer in layers
    )


def matrix_shape(work: Work, name: str) -> tuple[int, ...]:
    """Return [outputs, inputs] of a dense weight, or its shape where it is no matrix."""
    if name in work.dense:
        return work.dense[name].shape
    parent, _, last = name.rpartition(".")
    module = children_of(work.task.model.get_submodule(parent)).get(last)
    if module is None or (not isinstance(module, nn.Embedding) and not can_hold(module)):
        return tuple(weight_named(work.task.model, name).shape)
    return Layer(name, name, module).shape


def weight_named(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a module, or a parameter of another name, by its name."""
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    module = children_of(owner).get(last)
    weight = owner.get_parameter(last) if module is None else module.weight
    assert isinstance(weight, Tensor)  # noqa: S101  for the type checker: find_layers has seen it
    return weight


def changes(dense: dict[str, Layer], now: dict[str, list[Layer]]) -> dict[str, tuple[float, int]]:
    """Return (||W' - W|| / ||W||, NaN for an all-zero W; exact zeros stored) of every weight, shape by shape:
    few kernels, one wait each.

    Weights that left with removed structure count as zero.
    """
    measured = untouched(dense, now)
    look_over([layers[0] for name, layers in now.items() if len(layers) == 1 and name not in measured], dense)
    measured |= {
        name: told
        for name, layers in now.items()
        if name not in measured and (told := known_change(layers)) is not None
    }
    alike: dict[object, list[str]] = {}
    for name, layers in now.items():
        if name in dense and name not in measured:
            alike.setdefault(
                tuple((layer.parameter.shape, layer.parameter.dtype, layer.role) for layer in layers), []
            ).append(name)
    for names in alike.values():
        for batch in grouped(dense[name] for name in names):
            mine = [layer.name for layer in batch.layers]
            successors = [now[name] for name in mine]
            with visiting([layer for part in successors for layer in part]):
                both = compared(batch, successors).tolist()
            measured.update(
                {name: (error, int(count)) for name, error, count in zip(mine, *both, strict=True)}
            )
    return measured


def untouched(dense: dict[str, Layer], now: dict[str, list[Layer]]) -> dict[str, tuple[float, int]]:
    """Return (relative error, exact zeros), as `changes`, of the weights that no step wrote: an embedding is
    often a quarter of a model. They are looked at once, not at every move.
    """
    same = [
        dense[name]
        for name, (layer, *more) in now.items()
        if name in dense and not more and layer.pristine and layer.smooth is None
    ]
    unseen = [layer for layer in same if layer.change is None]
    for batch in grouped(unseen):
        for layer, change in zip(
            batch.layers, unchanged([layer.parameter for layer in batch.layers]), strict=True
        ):
            layer.looked = layer.parameter, layer.mask, layer.grid, change
    return {layer.name: told for layer in same if (told := known_change([layer])) is not None}


def unchanged(weights: Sequence[Tensor]) -> list[Change]:
    """Return the changes of weights that are the dense model's: no error, and the zeros that they have
    anyway.
    """
    sums = torch.stack(
        [
            torch.stack(
                [
                    torch.linalg.vector_norm(
                        weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)
                    )
                    .double()
                    .square(),
                    torch.count_nonzero(weight),
                ]
            )
            for weight in weights
        ]
    ).tolist()
    return [
        Change(squares, 0.0, weight.numel() - int(count), 0)
        for weight, (squares, count) in zip(weights, sums, strict=True)
    ]


def compared(batch: Batch, successors: list[list[Layer]]) -> Tensor:
    """Return the relative errors of what became of a batch of dense weights, and the exact zeros stored,
    float64 [2, layers].

    A weight that stands for one of its own shape is gone through piece by piece: the output head of a large
    model is a gigabyte in float32.
    """
    if any(
        len(part) > 1 or part[0].rows is not None or part[0].columns is not None or part[0].smooth is not None
        for part in successors
    ):
        zeros = sum(
            (Batch(tuple(part)).stored() == 0).flatten(1).sum(1) for part in zip(*successors, strict=True)
        )
        original = batch.stored().float()
        change = spread_out(multiplied(successors, batch.layers[0]), successors, original).sub_(original)
        return torch.stack(
            [
                (change.flatten(1).norm(dim=1) / original.flatten(1).norm(dim=1)).double(),
                torch.as_tensor(zeros).double(),
            ]
        )
    rows, columns = batch.shape
    step = max(1, PIECE.get(batch.layers[0].parameter.device.type, 2**20) // (len(successors) * columns))
    sums = torch.zeros(3, len(successors), dtype=torch.float64, device=batch.layers[0].parameter.device)
    for start in range(0, rows, step):
        before, after = (
            torch.stack(
                [layer.as_matrix(layer.parameter.detach())[start : start + step] for layer in layers]
            ).flatten(1)
            for layers in (batch.layers, [successor for (successor,) in successors])
        )
        zeros, original = (after == 0).sum(1), before.float()
        sums += torch.stack(
            [
                (after.float() - original).norm(dim=1).double().square(),
                original.norm(dim=1).double().square(),
                zeros.double(),
            ]
        )
    return torch.stack([(sums[0] / sums[1]).sqrt(), sums[2]])


def known_change(layers: list[Layer]) -> tuple[float, int] | None:
    """Return (relative error, exact zeros), as `changes`, of one weight, None if nobody looked it over."""
    change = layers[0].change if len(layers) == 1 else None
    if change is None:
        return None
    return (math.sqrt(change.errors / change.squares) if change.squares else math.nan), change.zeros


def multiplied(successors: list[list[Layer]], dense: Layer) -> Tensor:
    """Return the matrices [layers, outputs, inputs] that layers multiply by, float32. `successors` holds each
    one's factors.
    """
    first = successors[0]
    if len(first) == 1:
        return acting([part for (part,) in successors])
    stacks = {
        part.role or str(place): torch.stack(
            [acting_weight(layers[place].module).detach() for layers in successors]
        ).float()
        for place, part in enumerate(first)
    }
    if "base" in stacks:
        base = acting([layer for layers in successors for layer in layers if layer.role == "base"])
        return base + stacks["second"].flatten(2) @ stacks["first"].flatten(2)
    return product(list(stacks.values()), kind_of([layer.module for layer in first]), table=dense.table)


def acting(layers: list[Layer]) -> Tensor:
    """Return the matrices [layers, outputs, inputs] as they act on what the layers are given: without what
    smoothing moved into them.
    """
    stack = Batch(tuple(layers)).stored().float()
    if all(layer.smooth is None for layer in layers):
        return stack
    return torch.stack(
        [
            matrix if layer.smooth is None else matrix / layer.smooth
            for layer, matrix in zip(layers, stack, strict=True)
        ]
    )


def spread_out(current: Tensor, successors: list[list[Layer]], like: Tensor) -> Tensor:
    """Return matrices [layers, rows, columns] in the dense shape, zero where rows or columns left."""
    rows = [next((layer.rows for layer in layers if layer.rows is not None), None) for layers in successors]
    columns = [
        next((layer.columns for layer in layers if layer.columns is not None), None) for layers in successors
    ]
    if all(index is None for index in (*rows, *columns)):
        return current
    full = torch.zeros_like(like)
    down, across = (torch.arange(size, device=like.device) for size in like.shape[1:])
    for place, matrix in enumerate(current):
        mine, yours = rows[place], columns[place]
        full[place, (down if mine is None else mine)[:, None], across if yours is None else yours] = matrix
    return full
