"""How much each weight matters: the criteria of pruning, for a batch of layers of one shape at a time."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch
from workbench.compress.core.moments import source_of
from workbench.compress.pruning.evidence import Evidence
from workbench.compress.pruning.sparsegpt import inverse_factors
from workbench.kernels.column_loops import saliency
from workbench.modules.layer import Layer

if TYPE_CHECKING:
    from workbench.compress.pruning.options import Prune

BY_INPUTS = ("wanda", "sparsegpt")


def importance(step: Prune, batch: Batch, matrices: Tensor, evidence: Evidence) -> Tensor:
    """Return the importance of each weight, float32 [layers, outputs, inputs].

    -1 for those that an earlier round has taken.

    `magnitude` |w|; `wanda` |w| * sqrt(E[x^2]); `taylor` |w * E[g]|; `fisher` w^2 * E[g^2] / 2; `random`
    uniform in [0, 1) from the step's seed and the layer's name; `sparsegpt` w^2 / d^2, with d the diagonal of
    the inverse second moment's Cholesky factor: what removing the weight costs once the columns after it have
    been adjusted (0 where the layer never reads).
    """
    scores = raw_importance(step, batch, matrices, evidence)
    if batch.layers[0].mask is not None:
        scores.masked_fill_(
            ~torch.stack([layer.mask for layer in batch.layers if layer.mask is not None]), -1.0
        )
    return scores


def raw_importance(step: Prune, batch: Batch, matrices: Tensor, evidence: Evidence) -> Tensor:
    """Return the importance without regard to masks; a new tensor."""
    if step.criterion == "random":
        return torch.stack([random_scores(step.seed, layer, matrices) for layer in batch.layers])
    if step.criterion == "wanda":
        return matrices.abs() * input_norms(batch, evidence).unsqueeze(1)
    if step.criterion == "taylor":
        return (matrices * torch.stack([evidence.gradients(layer).mean for layer in batch.layers])).abs_()
    if step.criterion == "fisher":
        return (
            matrices.square() * torch.stack([evidence.gradients(layer).square for layer in batch.layers]) / 2
        )
    if step.criterion == "sparsegpt":
        return saliency(
            matrices, inverse_factors(batch.layers, evidence), torch.ones_like(matrices, dtype=torch.bool)
        )
    return matrices.abs()


def comparable(step: Prune, batch: Batch, matrices: Tensor, evidence: Evidence) -> Tensor:
    """Return importance on one scale for all layers, as `importance` is shaped.

    What one threshold over the model needs.

    `magnitude` is |w| itself (Han et al. 2015, See et al. 2016); `taylor` and `fisher` are changes of the
    loss, `random` draws from one distribution: all as they are. `wanda` and `sparsegpt` measure squared
    errors of a layer's outputs: squared where they are not, and divided by the layer's squared outputs
    E|Wx|^2, so that they are relative errors.
    """
    scores = importance(step, batch, matrices, evidence)
    if step.criterion not in BY_INPUTS:
        return scores
    outputs = torch.stack(
        [
            output_energy(matrix, evidence.moment(layer))
            for matrix, layer in zip(matrices, batch.layers, strict=True)
        ]
    )
    taken = scores < 0
    squared = scores.square() if step.criterion == "wanda" else scores
    tiny = torch.finfo(torch.float32).tiny
    return (squared / outputs.clamp_min(tiny)[:, None, None]).masked_fill_(taken, -1.0)


def output_energy(matrix: Tensor, moment: Tensor) -> Tensor:
    """Return E|Wx|^2 = tr(W E[x x^T] W^T), a scalar."""
    return ((matrix @ moment) * matrix).sum()


def random_scores(seed: int, layer: Layer, like: Tensor) -> Tensor:
    """Return uniform numbers [outputs, inputs] that depend on the seed, the layer's name and the device
    only.
    """
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(f"{seed}:{layer.name}".encode()))
    return torch.rand(like.shape[1:], generator=generator, device=like.device)


def input_norms(batch: Batch, evidence: Evidence) -> Tensor:
    """Return sqrt(E[x_i^2]) of each layer's inputs, float32 [layers, inputs]; proportional to Wanda's ||x||.

    The dense model's are kept for the next move.
    """
    sources = [source_of(layer, evidence.work) if evidence.dense else None for layer in batch.layers]

    def compute() -> Tensor:
        moments = (
            evidence.moment(layer) if source is None else evidence.statistics.moments().matrices[source]
            for layer, source in zip(batch.layers, sources, strict=True)
        )
        device = batch.layers[
            0
        ].parameter.device  # a streamed model's moments lie at home: no whole one goes there
        return torch.stack([moment.diagonal().to(device) for moment in moments]).clamp_min(0).sqrt()

    return (
        compute()
        if None in sources
        else evidence.statistics.once(("input norms", tuple(sources)), compute, optional=True)
    )
