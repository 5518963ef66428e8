"""Distill: train the compressed model to answer like the dense one, keeping every promise."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workbench.compress.layers import Layer
from workbench.compress.work import Work
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import METHODS, Step, configuration


@configuration
class Distill(Step):
    """Train against the dense model's logits: alpha * T^2 * KL(teacher || student at T) + (1 - alpha) * cross entropy.

    (Hinton, Vinyals & Dean 2015.) Adam with a cosine schedule over all weights that the recipe left free. Pruned weights
    stay zero. Weights on a grid keep their scales: the gradient passes straight through the rounding (Bengio et al. 2013)
    to a hidden copy, and the codes follow it.

    What it does not do: learn scales, match hidden states, move batch-norm statistics or use dropout (the student trains in
    eval mode), keep the best step rather than the last, or see more data than the task's training items.
    """

    slider: ClassVar[str] = "temperature"
    position: ClassVar[int] = 40
    stops: ClassVar[tuple[float, ...]] = (1.0, 2.0, 4.0)

    temperature: Annotated[float, Field(gt=0, le=100, description="softens both distributions; 1 leaves them as they are")] = 2.0
    alpha: Annotated[float, Field(ge=0, le=1, description="weight of the teacher's answers against the true labels")] = 0.9
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="optimizer steps")] = 60
    learning_rate: Annotated[float, Field(gt=0, le=1, description="peak learning rate of Adam")] = 5e-4
    distill_batch: Annotated[int, Field(ge=1, le=65536, description="training items per step")] = 64

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse distilling a dense model from itself."""
        if not earlier:
            raise RecipeError("Distill cannot come first: the student would still be its teacher, with nothing to recover; put it after Prune, LowRank or Quantize")

    def label(self) -> str:
        """Return such as `T2`."""
        return f"distilled T{self.temperature:g}"


@METHODS.register(Distill)
@torch.enable_grad()  # also where the caller has switched gradients off
def distill(step: Distill, work: Work) -> None:
    """Train the free weights of `work.model`; targets limit which layers' weights may move."""
    work.check_targets(step)
    layers = [layer for layer in work.layers.values() if step.matches(layer.name) or step.matches(layer.origin)]
    if not layers:
        raise CompressionError(f"{step!r} finds no layer that it can train: {', '.join(step.targets)}")
    trained, hidden = trainable(work.model, layers, everything=step.targets == ("*",))
    optimizer = torch.optim.Adam([*trained, *hidden.values()], lr=step.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / step.steps)))
    generator = torch.Generator().manual_seed(step.seed)
    training, kind, device = work.task.training, work.task.kind, next(work.model.parameters()).device
    for index in range(step.steps):
        work.progress("distill", index, step.steps)
        items = training[torch.randint(len(training), (min(step.distill_batch, len(training)),), generator=generator)].to(device)
        with torch.no_grad():
            wanted = kind.logits(work.task.model, items)
        loss = distillation_loss(kind.logits(work.model, items), wanted, items.labels, step.temperature, step.alpha)
        if not torch.isfinite(loss):
            raise CompressionError(f"distillation diverged at step {index} of {step.steps}: loss {loss.item()}; lower learning_rate={step.learning_rate:g}")
        work.model.zero_grad(set_to_none=True)
        loss.backward()
        pass_through(hidden, layers)
        optimizer.step()
        schedule.step()
        hold(hidden, layers)
        work.curve.append((index, float(loss.detach())))
    work.progress("distill", step.steps, step.steps)
    work.model.zero_grad(set_to_none=True)
    work.model.requires_grad_(False)
    for layer in layers:
        layer.pristine = False
        work.took(step, layer, f"distilled {step.steps} steps at T={step.temperature:g}")
    for name in work.left if step.targets == ("*",) else ():  # embeddings and shared weights learn too
        work.say(name, f"distilled {step.steps} steps at T={step.temperature:g}")


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """Return the scalar loss. student, teacher: logits [..., classes]; labels [...], -100 is left out."""
    scored = labels != -100
    student, teacher, labels = student[scored].float(), teacher[scored].float(), labels[scored]
    soft = F.kl_div((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), log_target=True, reduction="batchmean")
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


def trainable(model: nn.Module, layers: list[Layer], *, everything: bool) -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    """Return (parameters trained as they are, hidden float32 copies of the weights that lie on a grid)."""
    gridded = {id(layer.parameter) for layer in layers if layer.grid is not None}
    chosen = {id(p) for layer in layers for p in layer.module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and (everything or id(parameter) in chosen))
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in gridded]
    hidden = {layer.name: layer.matrix() for layer in layers if layer.grid is not None}
    return trained, hidden


def pass_through(hidden: dict[str, Tensor], layers: list[Layer]) -> None:
    """Hand each gridded weight's gradient to its hidden copy, and none to pruned weights."""
    for layer in layers:
        gradient = layer.parameter.grad
        if gradient is None:
            continue
        if layer.mask is not None:
            gradient.mul_(layer.as_stored(layer.mask))
        if layer.grid is not None:
            hidden[layer.name].grad = layer.as_matrix(gradient).float().contiguous()


def hold(hidden: dict[str, Tensor], layers: list[Layer]) -> None:
    """Bring the weights back to their masks and grids after an optimizer step."""
    with torch.no_grad():
        for layer in layers:
            if layer.mask is not None:
                target = hidden[layer.name] if layer.grid is not None else layer.as_matrix(layer.parameter)
                target.mul_(layer.mask)
            if layer.grid is not None:
                layer.grid = layer.grid.snap(hidden[layer.name])
                layer.parameter.copy_(layer.as_stored(layer.grid.dequantize()))
