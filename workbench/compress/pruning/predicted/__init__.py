"""What pruning leaves and costs, before it is done: shapes, and how far outputs move."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.compress.core.layer_sample import LayerSample, conditional, relative, weighed
from workbench.compress.method import ErrorTable, WholeTable
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.criterion.seen import Seen
from workbench.compress.pruning.options import Prune
from workbench.compress.pruning.predicted.structured_errors import structured_table
from workbench.compress.pruning.predicted.structured_shapes import after_structure
from workbench.kernels.selection import keep_of_groups
from workbench.modules.weight_shapes import Weight
from workbench.shapes.outline import Outline

SPARSITIES = tuple(index / 32 for index in range(33))


def shapes(outline: Outline, step: Prune) -> Outline | None:
    """Return the outline after pruning, None where shapes do not say which structure goes."""
    return after_structure(outline, step) if step.structured else outline.each(step, masked)


def masked(weight: Weight, step: Prune) -> list[Weight]:
    """Return the weight with as many kept as the step leaves."""
    if step.group is not None:
        kept, of = step.group
        return (
            [weight] if weight.columns % of else [dataclasses.replace(weight, kept=weight.count * kept // of)]
        )
    kept = weight.count - round(step.sparsity * weight.count)
    return [dataclasses.replace(weight, kept=kept, estimated=step.allocation != "uniform")]


def error_table(step: Prune) -> ErrorTable | WholeTable | None:
    """Return the errors of zeros, or of structure that leaves; None where training comes between.

    A budget of zeros that is shared out over layers counts as if each got the same.
    """
    if step.structured:
        return structured_table(step)
    if step.group is not None:
        key: tuple[object, ...] = (step.criterion, step.pattern)
        return ErrorTable(key, (step.sparsity,), lambda about: errors(step, about))
    return ErrorTable((step.criterion,), SPARSITIES, lambda about: errors(step, about))


def errors(step: Prune, about: LayerSample) -> Tensor:
    """Return the errors of zeros at `SPARSITIES` (of n:m: at its own), [knots]: of what the criterion would
    remove from the sampled rows.
    """
    criterion = CRITERIA[step.criterion]
    scores = criterion.scores(SampleSeen(about.weight.unsqueeze(0), about), step.seed).squeeze(0)
    if step.group is not None:
        if about.weight.shape[1] % step.group[1]:
            return torch.zeros(1, device=scores.device)
        gone = ~keep_of_groups(scores, *step.group).unsqueeze(0)
    else:
        flat = scores if criterion.by_row else scores.flatten().unsqueeze(0)
        places = flat.argsort(dim=1, stable=True).argsort(dim=1).view_as(scores)
        limits = torch.tensor(SPARSITIES, device=scores.device) * flat.shape[1]
        gone = places < limits[:, None, None]
    if criterion.makes_up:  # the others make up for what goes: what is left is its removal error
        costs = scores * about.felt.unsqueeze(1)
        return relative((costs * gone).sum((-2, -1)), about)
    return relative(weighed(about.weight * gone, about), about)


@dataclass(frozen=True)
class SampleSeen(Seen):
    """The sampled rows of one layer, as a criterion sees a layer: sums over a column are over these rows."""

    weights: Tensor  # [1, rows, inputs]
    about: LayerSample

    def input_norms(self) -> Tensor:
        """Return sqrt(E[x_i^2]), [1, inputs]."""
        return self.about.moment.diagonal().clamp_min(0).sqrt().unsqueeze(0)

    def mean_gradients(self) -> Tensor:
        """Return E[g] by each weight."""
        return self.about.mean.unsqueeze(0)

    def squared_gradients(self) -> Tensor:
        """Return E[g^2] by each weight."""
        return self.about.square.unsqueeze(0)

    def removal_errors(self) -> Tensor:
        """Return w^2 / d^2."""
        return self.weights.square() * conditional(self.about.moment)

    def random(self, seed: int) -> Tensor:
        """Return numbers by the seed."""
        generator = torch.Generator(self.weights.device).manual_seed(seed)
        return torch.rand(self.weights.shape, generator=generator, device=self.weights.device)
