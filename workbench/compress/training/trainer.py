"""Training that keeps promises: pruned weights stay zero, weights on a grid stay on it.

Shared by every step that trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workbench.compress.core.batch import Batch
from workbench.compress.core.context import Work
from workbench.compress.training import checkpoints
from workbench.compress.training.plan import Objective, Plan, Shown, Trained
from workbench.compress.training.run import Run
from workbench.compress.training.shadow_weights import hidden_copies
from workbench.compress.training.trainable import Moving
from workbench.compress.training.validation import held_out
from workbench.modules.layer import Layer
from workbench.modules.sharing import own_parameters
from workbench.recipe import Step


@torch.enable_grad()  # also where the caller has switched gradients off
def train(
    step: Step,
    work: Work,
    layers: list[Layer],
    plan: Plan,
    objective: Objective,
    *,
    start: Callable[[Batch], Tensor] = Batch.matrices,
    shown: Shown | None = None,
) -> Trained:
    """Train `work.model` to make `objective(items)` small.

    Masks and grids of `layers` hold after every optimizer step.

    Where weights lie on a grid, float32 copies of them move; `start(batch)` is where these begin, the rounded
    weights themselves or others that round to the same codes. Where `work.model` only stands for changes of
    another model, `shown()` is that model as it is at the moment: what looks look at, and what a checkpoint
    is known by.

    All parameters move where the targets of `step` begin with all layers, else those of the modules of
    `layers`; what a target leaves out never does. The parameters become the model's own first. The curve
    continues that of earlier trainings.

    It ends where it diverges (see `workbench.compress.training.divergence_guard`): the weights go back to the
    best ones seen, and the warnings say so. They are those of the best look, else those before the tenth of
    all steps in which training loss was lowest, or those that it began with.

    Raises:
        CompressionError: loss or gradients are not finite before the first step, or not even one item fits
            into memory.
    """
    shown = shown or (lambda: work.model)
    held = (
        held_out(work, plan.look_every, plan.steps, f"{plan.prefix}look_every")
        if 0 < plan.look_every < plan.steps
        else None
    )
    path = checkpoints.checkpoint_path(shown(), told(plan, work)) if plan.checkpoint_every else None
    own_parameters(work.model)  # they are about to be changed in place
    trained = trainable(work.model, layers, kept_out(step, work), everything=step.everything)
    moving = Moving(layers, trained, hidden_copies(layers, start, learn_steps=plan.step_rate > 0))
    if plan.widen:
        moving.widen(work.model)
    run = Run.begun(work, plan, moving, held, shown)
    run.resume(path)
    with repeatable_convolutions():
        run.go(objective, path)
    work.progress(plan.what, plan.steps, plan.steps)
    work.model.zero_grad(set_to_none=True)
    work.model.requires_grad_(False)
    moving.narrow()
    for copy in moving.hidden:
        copy.finish()
    for layer in layers:
        layer.pristine = layer.finite = False
    return Trained(run.done, run.ended, tuple(run.looks), run.kept)


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Have cuDNN take only algorithms that add in one order: else the gradient of a convolution differs in
    its last bit from run to run.
    """
    chosen = torch.backends.cudnn
    before = chosen.deterministic, chosen.benchmark
    chosen.deterministic, chosen.benchmark = True, False
    try:
        yield
    finally:
        chosen.deterministic, chosen.benchmark = before


def told(plan: Plan, work: Work) -> list[object]:
    """Return all that a checkpoint is known by besides the weights that it starts from."""
    told_plan = dataclasses.replace(plan, stop_at=0, checkpoint_every=0)
    return [
        told_plan,
        work.task.model_fingerprint,
        work.task.data_fingerprint,
        next(work.model.parameters()).device.type,
        torch.__version__,
    ]


def kept_out(step: Step, work: Work) -> set[int]:
    """Return the ids of the parameters of every layer that a target leaves out, bias included."""
    modules = [layer.module for layer in work.layers.values() if step.excluded(*layer.names) is not None]
    by_name = dict(work.model.named_modules())
    own = dict(work.model.named_parameters())
    left = [name for name in work.left if step.excluded(name) is not None]
    modules += [by_name[name] for name in left if name in by_name]
    bare = {id(own[name]) for name in left if name in own}
    return bare | {id(parameter) for module in modules for parameter in module.parameters()}


def trainable(
    model: nn.Module, layers: list[Layer], frozen: set[int], *, everything: bool
) -> list[nn.Parameter]:
    """Return the parameters that are trained as they are: all, or those of `layers`, but for weights on a
    grid; `frozen` ids stay.
    """
    gridded = {id(layer.parameter) for layer in layers if layer.grid is not None}
    chosen = {id(p) for layer in layers for p in layer.module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(
            parameter.is_floating_point()
            and (everything or id(parameter) in chosen)
            and id(parameter) not in frozen
        )
    return [p for p in model.parameters() if p.requires_grad and id(p) not in gridded]
