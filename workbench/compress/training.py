"""Training that keeps promises: pruned weights stay zero, weights on a grid stay on it. Shared by every step that trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.compress.batch import Batch
from workbench.compress.copies import own_parameters
from workbench.compress.hidden import Hidden, hidden_copies
from workbench.compress.layers import Layer
from workbench.compress.work import Work
from workbench.errors import CompressionError
from workbench.recipe import Step
from workbench.tasks.base import Items


@dataclass(frozen=True)
class Plan:
    """One training: Adam with a cosine schedule over `steps`, ended after `stop_at` of them (0: all).

    `what` is shown as progress; `noun` and `advice` go into the error when it diverges. Batches of `batch` items are drawn
    from the task's training items with `seed`. The one who watches may end it where `may_end` (its step can say so afterwards).
    With a `step_rate` above 0 the step sizes of grids are learned too, at that rate of Adam for their logarithms.
    """

    what: str
    noun: str
    advice: str
    steps: int
    learning_rate: float
    batch: int
    seed: int
    stop_at: int = 0
    may_end: bool = True
    step_rate: float = 0.0


@dataclass(frozen=True)
class Trained:
    """How many steps were done, and whether the one who watches ended it there."""

    steps: int
    ended: bool


@torch.enable_grad()  # also where the caller has switched gradients off
def train(
    step: Step, work: Work, layers: list[Layer], plan: Plan, objective: Callable[[Items], Tensor], *, start: Callable[[Batch], Tensor] = Batch.matrices
) -> Trained:
    """Train `work.model` to make `objective(items)` small; masks and grids of `layers` hold after every optimizer step.

    Where weights lie on a grid, float32 copies of them move; `start(batch)` is where these begin, the rounded weights themselves
    or others that round to the same codes.

    All parameters move where the targets of `step` begin with all layers, else those of the modules of `layers`; what a
    target leaves out never does. The parameters become the model's own first. The curve continues that of earlier trainings.
    """
    own_parameters(work.model)  # they are about to be changed in place
    trained = trainable(work.model, layers, kept_out(step, work), everything=step.everything)
    hidden = hidden_copies(layers, start, learn_steps=plan.step_rate > 0)
    steps = [copy.logarithms for copy in hidden if copy.logarithms is not None]
    groups = [{"params": [*trained, *(copy.values for copy in hidden)], "lr": plan.learning_rate}, {"params": steps, "lr": plan.step_rate}]
    optimizer = torch.optim.Adam(groups if steps else groups[:1])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / plan.steps)))
    generator = torch.Generator().manual_seed(plan.seed)
    training, device = work.task.training, next(work.model.parameters()).device
    before, done, ended = len(work.curve), 0, False
    while done < (plan.stop_at or plan.steps) and not ended:
        work.progress(plan.what, done, plan.steps)
        loss = objective(training[torch.randint(len(training), (min(plan.batch, len(training)),), generator=generator)].to(device))
        if not torch.isfinite(loss):
            raise CompressionError(f"{plan.noun} diverged at step {done} of {plan.steps}: loss {loss.item()}; {plan.advice}")
        work.model.zero_grad(set_to_none=True)
        loss.backward()
        pass_through(hidden, layers)
        optimizer.step()
        schedule.step()
        hold(hidden, layers)
        work.curve.append((before + done, float(loss.detach())))
        work.training.watch(work.curve, before + plan.steps)
        done += 1
        ended = plan.may_end and work.training.enough()
    work.progress(plan.what, plan.steps, plan.steps)
    work.model.zero_grad(set_to_none=True)
    work.model.requires_grad_(False)
    for copy in hidden:
        copy.finish()
    for layer in layers:
        layer.pristine = False
    return Trained(done, ended)


def kept_out(step: Step, work: Work) -> set[int]:
    """Return the ids of the parameters of every layer that a target leaves out, bias included."""
    modules = [layer.module for layer in work.layers.values() if step.excluded(*layer.names) is not None]
    modules += [work.model.get_submodule(name) for name in work.left if step.excluded(name) is not None]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def trainable(model: nn.Module, layers: list[Layer], frozen: set[int], *, everything: bool) -> list[nn.Parameter]:
    """Return the parameters that are trained as they are: all, or those of `layers`, but for weights on a grid; `frozen` ids stay."""
    gridded = {id(layer.parameter) for layer in layers if layer.grid is not None}
    chosen = {id(p) for layer in layers for p in layer.module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and (everything or id(parameter) in chosen) and id(parameter) not in frozen)
    return [p for p in model.parameters() if p.requires_grad and id(p) not in gridded]


def pass_through(hidden: list[Hidden], layers: list[Layer]) -> None:
    """Hand each gridded weight's gradient to its hidden copy, and none to pruned weights."""
    for layer in layers:
        if layer.mask is not None and layer.grid is None and layer.parameter.grad is not None:
            layer.parameter.grad.mul_(layer.as_stored(layer.mask))
    for copy in hidden:
        copy.take_gradients()


@torch.no_grad()
def hold(hidden: list[Hidden], layers: list[Layer]) -> None:
    """Bring the weights back to their masks and grids after an optimizer step."""
    for layer in layers:
        if layer.mask is not None and layer.grid is None:
            layer.parameter.mul_(layer.as_stored(layer.mask))
    for copy in hidden:
        copy.settle()
