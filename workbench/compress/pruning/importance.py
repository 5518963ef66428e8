"""How much each weight of a batch matters: what calibration says about its layers, read by a criterion."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.core.batch import Batch
from workbench.compress.core.moments import source_of
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.criterion.seen import Seen
from workbench.compress.pruning.evidence import Evidence
from workbench.compress.pruning.sparsegpt import inverse_factors
from workbench.kernels.column_loops import saliency
from workbench.modules.layer import Layer

if TYPE_CHECKING:
    from workbench.compress.pruning.options import Prune


def importance(step: Prune, batch: Batch, matrices: Tensor, evidence: Evidence) -> Tensor:
    """Return the importance of each weight, float32 [layers, outputs, inputs].

    -1 for those that an earlier round has taken.
    """
    scores = raw_importance(step, batch, matrices, evidence)
    if (masks := batch.masks()) is not None:
        scores.masked_fill_(~masks, -1.0)
    return scores


@dataclass(frozen=True)
class BatchSeen(Seen):
    """Weights of a batch, and the evidence about its layers."""

    weights: Tensor
    batch: Batch
    evidence: Evidence

    def input_norms(self) -> Tensor:
        """Return sqrt(E[x_i^2]), [layers, inputs]."""
        return input_norms(self.batch, self.evidence)

    def mean_gradients(self) -> Tensor:
        """Return E[g] by each weight, float32 [layers, outputs, inputs]."""
        return torch.stack([self.evidence.gradients(layer).mean for layer in self.batch.layers])

    def squared_gradients(self) -> Tensor:
        """Return E[g^2] by each weight, float32 [layers, outputs, inputs]."""
        return torch.stack([self.evidence.gradients(layer).square for layer in self.batch.layers])

    def removal_errors(self) -> Tensor:
        """Return w^2 / d^2, [layers, outputs, inputs], from the damped inverse of each second moment."""
        kept = torch.ones_like(self.weights, dtype=torch.bool)
        return saliency(self.weights, inverse_factors(self.batch.layers, self.evidence), kept)

    def random(self, seed: int) -> Tensor:
        """Return numbers by the seed and each layer's name, [layers, outputs, inputs]."""
        return torch.stack([random_scores(seed, layer, self.weights) for layer in self.batch.layers])


def raw_importance(step: Prune, batch: Batch, matrices: Tensor, evidence: Evidence) -> Tensor:
    """Return the importance [layers, outputs, inputs] without regard to masks; a new tensor."""
    return CRITERIA[step.criterion].scores(BatchSeen(matrices, batch, evidence), step.seed)


def comparable(step: Prune, batch: Batch, matrices: Tensor, evidence: Evidence) -> Tensor:
    """Return importance on one scale for all layers, as `importance` is shaped: what one threshold over the
    model needs.

    How is a fact of the criterion (`across`): as it is, or as a squared error of the layer's outputs, divided
    by E|Wx|^2, so that it is relative.
    """
    scores, across = importance(step, batch, matrices, evidence), CRITERIA[step.criterion].across
    if across == "as it is":
        return scores
    outputs = torch.stack(
        [
            output_energy(matrix, evidence.moment(layer))
            for matrix, layer in zip(matrices, batch.layers, strict=True)
        ]
    )
    taken = scores < 0
    squared = scores.square() if across == "root of output error" else scores
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
