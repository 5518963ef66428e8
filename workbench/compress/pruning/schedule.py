"""When weights go: at once, in rounds with training between them, after a training that pushes them towards
zero.

The helpers are for every pattern: what a round removes is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.compress.training.plan import Plan
from workbench.compress.training.trainer import train

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune
    from workbench.modules.layer import Layer
    from workbench.tasks.base import Items


def cubic(sparsity: float, index: int, rounds: int) -> float:
    """Return the sparsity after round `index` of `rounds`, counted from 1: much at first, little at the end
    (Zhu & Gupta 2017).

    The last is exactly `sparsity`.
    """
    return sparsity * (1 - (1 - index / rounds) ** 3)


def rounds(step: Prune, work: Work, norm: Callable[[], Tensor] | None = None) -> Iterator[float]:
    """Yield the sparsity of each round.

    Between them, and before the first where there is a penalty, the model is trained.

    `norm()` returns what a penalty keeps small, as a scalar of the model's weights: by default the sum of |w|
    of the layers that the step names. The trainings minimise the task's loss on training items; whatever
    masks the layers hold by then stay. After the last round nothing is trained: its share is small, and
    Distill is there for it.
    """
    layers = trained_layers(step, work)
    if step.penalty:
        penalised(step, work, layers, norm or (lambda: absolute_sum(named_layers(step, work))))
    for index in range(1, step.rounds + 1):
        yield cubic(step.sparsity, index, step.rounds)
        if index < step.rounds and step.train_steps:
            layers = trained_layers(step, work)
            train(step, work, layers, plan(step, index), lambda items: loss_of(work, items))
    if step.train_steps:
        report(step, work, trained_layers(step, work))


def penalised(step: Prune, work: Work, layers: list[Layer], norm: Callable[[], Tensor]) -> None:
    """Train with the task's loss plus penalty * norm(), so that what is to be removed is small before it goes
    (L1: Tibshirani 1996).
    """
    train(step, work, layers, plan(step, 0), lambda items: loss_of(work, items) + step.penalty * norm())


def plan(step: Prune, index: int) -> Plan:
    """Return the training after round `index`; each draws other batches."""
    advice = f"lower train_rate={step.train_rate:g}" + (
        f" or penalty={step.penalty:g}" if step.penalty and index == 0 else ""
    )
    return Plan(
        "prune training",
        f"training of {type(step).__name__} after round {index}",
        advice,
        step.train_steps,
        step.train_rate,
        step.train_batch,
        step.seed + index,
        may_end=False,
    )


def loss_of(work: Work, items: Items) -> Tensor:
    """Return the task's loss of the model as it is, such as the mean cross entropy with the items' labels."""
    return work.task.kind.loss(work.task.kind.logits(work.model, items), items.labels)


def absolute_sum(layers: list[Layer]) -> Tensor:
    """Return the sum of |w| over layers, a scalar that gradients flow through."""
    return torch.stack([layer.parameter.abs().sum(dtype=torch.float32) for layer in layers]).sum()


def named_layers(step: Prune, work: Work) -> list[Layer]:
    """Return the layers whose weights the step may remove."""
    return [layer for layer in work.layers.values() if work.takes(step, layer)]


def trained_layers(step: Prune, work: Work) -> list[Layer]:
    """Return the layers whose weights may move in training: those that the targets pick, the output head
    too.
    """
    return [layer for layer in work.layers.values() if step.takes(*layer.names)]


def report(step: Prune, work: Work, layers: list[Layer]) -> None:
    """Say of every weight that learned how long it did."""
    between = step.rounds - 1
    trainings = [f"{step.train_steps} steps with penalty {step.penalty:g} first"] if step.penalty else []
    trainings += [f"{step.train_steps} steps after each of {between} rounds"] if between else []
    outcome = "trained " + ", ".join(trainings)
    for layer in layers:
        work.say(layer, outcome)
    for name in work.left if step.everything else ():
        work.say(name, outcome if step.takes(name) else f"prune left out by target {step.excluded(name)!r}")
