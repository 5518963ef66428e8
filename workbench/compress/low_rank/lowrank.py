"""LowRank: replace one large product by two small ones, or three."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from workbench.compress.core.batch import Batch, attempt, of_one_shape
from workbench.compress.core.context import Work
from workbench.compress.core.moments import second_moment_of
from workbench.compress.low_rank import predicted
from workbench.compress.low_rank.convolution import convolution_factors, spatial
from workbench.compress.low_rank.decompose import Stack, decompose
from workbench.compress.low_rank.options import LowRank
from workbench.compress.low_rank.rank_allocation import (
    Candidate,
    allocate,
    direction_energies,
    output_energy,
    slopes,
    spatial_energies,
)
from workbench.compress.low_rank.splittable import can_split
from workbench.compress.method import GRADIENTS, SHARED_OUT, Reads
from workbench.compress.registry import METHODS
from workbench.errors import LayerSkipped
from workbench.modules.factored import (
    Factors,
    Form,
    copies_of,
    cost,
    factors_like,
    form_for,
    full_ranks,
    most_rank,
    shape_of,
)
from workbench.modules.layer import Layer, replace_module
from workbench.modules.visiting import settle

__all__ = ["LowRank", "lowrank"]


def why_not_placed(step: LowRank) -> str:
    """Return why a step cannot be taken block by block, "" if it can."""
    if step.rank_allocation == "loss":
        return GRADIENTS
    return SHARED_OUT if step.rank_allocation != "uniform" else ""


def reads(step: LowRank) -> frozenset[Reads]:
    """Return the statistics that a step reads."""
    statistics: set[Reads] = set()
    if step.factorization == "whitened" or step.rank_allocation != "uniform":
        statistics.add("moments")
    if step.rank_allocation == "loss":
        statistics.add("gradients")
    return frozenset(statistics)


@dataclass(frozen=True)
class LayerForm:
    """One layer and the form that it gets."""

    layer: Layer
    form: Form


@METHODS.register(
    LowRank,
    title="rank",
    shapes=predicted.lowrank_shapes,
    errors=predicted.lowrank_errors,
    strength=lambda ratio: 1 - ratio,
    trains=lambda _: False,
    placed=why_not_placed,
    reads=reads,
    alone=True,
)
def lowrank(step: LowRank, work: Work) -> None:
    """Factorise layers, replacing each module by two or three in a row."""
    layers = [layer for layer in work.choose(step) if can_split(layer, work)]
    if step.factorization == "whitened":
        warn_of_few_rows([layer for layer in layers if not layer.table], work)
    plans = (
        allocated(step, layers, work) if step.rank_allocation != "uniform" else uniform(step, layers, work)
    )
    groups: dict[Form, list[Layer]] = {}
    for plan in plans:
        groups.setdefault(plan.form, []).append(plan.layer)
    done = 0
    for form, members in groups.items():
        for batch in of_one_shape(members):
            work.progress(step.kind(), done, len(layers))
            attempt(batch, partial(factorise, form=form, step=step, work=work))
            done += len(batch.layers)
            for layer in batch.layers:
                work.took(step, layer, words(step, layer, form))
    work.progress(step.kind(), len(layers), len(layers))


def factorise(batch: Batch, form: Form, step: LowRank, work: Work) -> None:
    """Put factors in the places of layers of one shape."""
    install(batch, form, weights_of_factors(batch, form, step, work), work)


def warn_of_few_rows(layers: list[Layer], work: Work) -> None:
    """Warn where calibration has fewer rows than a layer has inputs, so that its second moment is
    singular.
    """
    few = [layer for layer in layers if 0 < work.statistics.rows(layer.origin) < layer.shape[1]]
    if few:
        rows, columns = work.statistics.rows(few[0].origin), few[0].shape[1]
        work.warnings.append(
            f"lowrank: calibration is too small for {len(few)} layers, such as {few[0].origin!r} ({rows} rows"
            f" for {columns} inputs): a small ridge makes up for it; more calibration items would be better"
        )


def uniform(step: LowRank, layers: list[Layer], work: Work) -> list[LayerForm]:
    """Return the same ratio for every layer that it makes smaller; the report says where it would not."""
    plans = []
    for layer in layers:
        shape = shape_of(layer.module)
        form = form_for(shape, step.conv, step.rank_ratio)
        if cost(shape, form) < shape.count:
            plans.append(LayerForm(layer, form))
        else:
            work.say(layer, f"lowrank skipped: {too_much(layer, form)}")
    return plans


def too_much(layer: Layer, form: Form) -> str:
    """Return why a form saves nothing, and below which ratio it would."""
    shape = shape_of(layer.module)
    size = f"{shape.rows}x{shape.columns}"
    if len(form.ranks) > 1:
        return f"ranks {form.ranks[0]} and {form.ranks[1]} of {size} save no weights"
    most = most_rank(shape, form.kind)
    below = (
        f"below rank_ratio {(most + 0.5) / full_ranks(shape, form.kind)[0]:.2f} it would"
        if most
        else "no rank would"
    )
    return f"rank {form.ranks[0]} of {size} saves no weights ({below})"


def allocated(step: LowRank, layers: list[Layer], work: Work) -> list[LayerForm]:
    """Return ranks shared out under the budget of the uniform ones.

    The report says which layers stay whole.
    """
    batches = list(of_one_shape(layers))
    candidates = [candidate for batch in batches for candidate in candidates_of(batch, step, work)]
    ranks = allocate(candidates)
    plans = []
    for layer, candidate in zip(
        (layer for batch in batches for layer in batch.layers), candidates, strict=True
    ):
        rank = ranks[candidate.name]
        if rank is not None:
            plans.append(LayerForm(layer, Form(candidate.kind, (rank,))))
        else:
            work.say(
                layer,
                f"lowrank skipped: whole, it is worth its weights by {step.rank_allocation} (uniform rank"
                f" {candidate.rank})",
            )
    return plans


def candidates_of(batch: Batch, step: LowRank, work: Work) -> list[Candidate]:
    """Return each layer with the worth of its directions: relative to the layer's outputs by energy, in the
    loss by loss.
    """
    shape = shape_of(batch.layers[0].module)
    form = form_for(shape, step.conv, step.rank_ratio)

    def compute() -> list[Tensor]:
        return worths(batch, step, form.kind, work)

    about = step.factorization, step.rank_allocation, form.kind, tuple(layer.origin for layer in batch.layers)
    if all(layer.pristine for layer in batch.layers):
        if form.kind != "spatial":
            stacked(batch, step.factorization, work)  # all in one stack, whatever ranks they will get
        worth = work.statistics.once(("worth of ranks", *about), compute, lasting=True)
    else:
        worth = compute()
    return [
        Candidate(layer.name, shape, form.kind, form.ranks[0], worth[index])
        for index, layer in enumerate(batch.layers)
    ]


def worths(batch: Batch, step: LowRank, kind: str, work: Work) -> list[Tensor]:
    """Return the worth per weight of each step of rank of each layer, float64 [most_rank + 1] on the CPU."""
    by_loss = step.rank_allocation == "loss"
    felt = torch.stack([sensitivity(layer, work) for layer in batch.layers]) if by_loss else None
    moments = torch.stack(moments_of(batch, work))
    shape = shape_of(batch.layers[0].module)
    if kind == "spatial":
        pairs = [
            spatial(layer.matrix().double().view(layer.parameter.shape), most_rank(shape, kind))
            for layer in batch.layers
        ]
        gains = torch.stack(
            [
                spatial_energies(first, last, moments[index], shape, None if felt is None else felt[index])
                for index, (first, last) in enumerate(pairs)
            ]
        )
    else:
        gains = direction_energies(*stacked(batch, step.factorization, work), moments, felt)
    totals = (
        output_energy(batch.matrices(), moments, felt).clamp_min(torch.finfo(torch.float64).tiny).tolist()
    )
    return [
        slopes(shape, kind, layer / (1 if by_loss else total), total if by_loss else 1.0)
        for layer, total in zip(gains.cpu(), totals, strict=True)
    ]


def sensitivity(layer: Layer, work: Work) -> Tensor:
    """Return how much the loss feels each output: the Fisher information of its row of weights, over the
    energy of the inputs, [outputs].
    """
    if layer.table:
        raise LayerSkipped(
            layer.name, "it is an embedding: rank_allocation='loss' cannot weigh it; take uniform"
        )
    square = work.statistics.gradients(layer.origin).square
    square = square if layer.rows is None else square[layer.rows]
    square = square if layer.columns is None else square[:, layer.columns]
    return square.sum(1) / second_moment_of(layer, work).diagonal().sum().clamp_min(
        torch.finfo(torch.float32).tiny
    )


def moments_of(batch: Batch, work: Work) -> list[Tensor]:
    """Return E[x x^T] of each layer's inputs; of a table, where every row counts alike, the identity."""
    if batch.layers[0].table:
        weight = batch.layers[0].parameter
        return [torch.eye(weight.shape[1], device=weight.device)] * len(batch.layers)
    return [second_moment_of(layer, work) for layer in batch.layers]


def weights_of_factors(batch: Batch, form: Form, step: LowRank, work: Work) -> list[Tensor]:
    """Return the weights of the factors, a stack [layers, *as stored] for each."""
    whitened = step.factorization == "whitened"
    if form.kind == "channel":
        left, right = (
            part.clone(memory_format=torch.contiguous_format)
            for part in sliced(*stacked(batch, step.factorization, work), form.ranks[0])
        )
        if batch.layers[0].table:
            return [left, right.mT.contiguous()]
        kernel = batch.layers[0].parameter.shape[2:] if isinstance(batch.layers[0].module, nn.Conv2d) else ()
        return [right.unflatten(2, (-1, *kernel)), left[..., None, None]] if kernel else [right, left]
    by_layer = []
    for layer, matrix in zip(batch.layers, batch.matrices(), strict=True):
        kernel = matrix.double().view(layer.parameter.shape)
        moment = second_moment_of(layer, work).double() if whitened else None
        by_layer.append(convolution_factors(kernel, form, moment))
    return [torch.stack(stack).to(batch.layers[0].parameter.dtype) for stack in zip(*by_layer, strict=True)]


def sliced(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the solution of a rank: the first columns and rows."""
    return left[..., :rank], right[..., :rank, :]


def stacked(batch: Batch, factorization: str, work: Work) -> tuple[Tensor, Tensor]:
    """Return the factors of every rank that saves weights, [layers, o, k] and [layers, k, i].

    The dense model's are kept.
    """
    if not all(layer.pristine for layer in batch.layers):
        fresh = fresh_stack(batch, factorization, work)
        return fresh.left, fresh.right
    located = work.statistics.stacked(
        ("factors", factorization),
        [layer.origin for layer in batch.layers],
        lambda places: fresh_stack(
            Batch(tuple(batch.layers[place] for place in places)), factorization, work
        ),
    )
    first = located[0][0]
    if len(first.left) == len(located) and all(
        stack is first and place == index for index, (stack, place) in enumerate(located)
    ):
        return first.left, first.right
    return torch.stack([stack.left[place] for stack, place in located]), torch.stack(
        [stack.right[place] for stack, place in located]
    )


def fresh_stack(batch: Batch, factorization: str, work: Work) -> Stack:
    """Return the factors of layers of one shape, worked out together."""
    layer = batch.layers[0]
    moments = moments_of(batch, work) if factorization == "whitened" and not layer.table else None
    stack = decompose(
        batch.matrices(),
        moments,
        most_rank(replace(shape_of(layer.module), kernel=(1, 1), convolution=False), "channel"),
        layer.parameter.dtype,
    )
    finite = torch.isfinite(stack.left).flatten(1).all(1) & torch.isfinite(stack.right).flatten(1).all(1)
    if not bool(finite.all()):
        bad = batch.layers[int((~finite).nonzero()[0])]
        raise LayerSkipped(
            bad.name, f"{batch.shape} has factors that are infinite or NaN in {layer.parameter.dtype}"
        )
    return stack


def install(batch: Batch, form: Form, weights: list[Tensor], work: Work) -> None:
    """Replace each layer's module by its factors, and its entry by one for each. weights: a stack [layers,
    *as stored] for each factor.
    """
    successors: dict[str, list[Layer]] = {}
    ranks = (form.ranks[0], form.ranks[-1], form.ranks[-1])
    for index, (layer, module) in enumerate(zip(batch.layers, modules_for(batch, form), strict=True)):
        for part, stack in zip(module, weights, strict=True):
            part.weight = nn.Parameter(stack[index], requires_grad=False)
        replace_module(work.model, layer.name, module)
        successors[layer.name] = [
            Layer(
                f"{layer.name}.{place}",
                layer.origin,
                part,
                rank=ranks[place],
                pristine=False,
                place=layer.place,
            )
            for place, part in enumerate(module)
        ]
        successors[layer.name][0].columns, successors[layer.name][-1].rows = layer.columns, layer.rows
    settle(work.model, [part for factors in successors.values() for part in factors])
    work.layers = {
        layer.name: layer for name, old in work.layers.items() for layer in successors.get(name, [old])
    }


def modules_for(batch: Batch, form: Form) -> list[Factors]:
    """Return the modules that take the places of a batch's.

    Layers that are alike but for their numbers share one template.
    """
    modules = [layer.module for layer in batch.layers]
    plain = [not isinstance(module, nn.Conv2d | nn.Embedding) for module in modules]
    alike = {(type(module), getattr(module, "bias", None) is None, module.training) for module in modules}
    if not all(plain) or len(alike) > 1:
        return [factors_like(module, form) for module in modules]
    copies: list[Factors] = copies_of(factors_like(modules[0], form), len(modules))
    for module, factors in zip(modules, copies, strict=True):
        if getattr(module, "bias", None) is not None:
            factors[-1].bias = module.bias
    return copies


def words(step: LowRank, layer: Layer, form: Form) -> str:
    """Return a few words on the form that a layer got, for the report."""
    full = full_ranks(shape_of(layer.module), form.kind)
    how = "svd" if layer.table else step.factorization
    kind = "" if form.kind == "channel" else f", {form.kind}"
    share = "" if step.rank_allocation == "uniform" else f", share by {step.rank_allocation}"
    if len(form.ranks) > 1:
        return (
            f"ranks {form.ranks[0]} of {full[0]} in and {form.ranks[1]} of {full[1]} out by"
            f" {how}{kind}{share}"
        )
    return f"rank {form.ranks[0]} of {full[0]} by {how}{kind}{share}"
