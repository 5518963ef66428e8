"""How far a student is from its teacher: the divergence of their answers, and what is inside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from workbench.tasks.base import Losses

Divergence = Literal["forward", "reverse", "skewed"]
SMALLEST = 1e-8  # of a squared length or a probability that something is divided by or the logarithm taken of


def divergence_loss(
    kind: Losses,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    divergence: Divergence = "forward",
    skew: float = 0.1,
) -> Tensor:
    """Return T^2 * D(teacher, student) of their answers at temperature T, a scalar, as a `kind` of task
    averages it.

    With p the teacher's distribution and q the student's: `forward` is KL(p || q) (Hinton, Vinyals & Dean
    2015), which makes the student cover all that the teacher holds possible; `reverse` is KL(q || p)
    (MiniLLM, Gu et al. 2024), which lets it keep to what the teacher holds likely; `skewed` is KL(p || skew *
    p + (1 - skew) * q) (DistiLLM, Ko et al. 2024), whose gradient stays bounded where q is nearly 0. Vectors
    that are no logits have no distribution: only `forward` fits them.
    """
    if divergence == "reverse":
        return kind.soft_loss(teacher, student, labels, temperature)
    if divergence == "skewed":
        return kind.soft_loss(mixed(student, teacher, temperature, skew), teacher, labels, temperature)
    return kind.soft_loss(student, teacher, labels, temperature)


def mixed(student: Tensor, teacher: Tensor, temperature: float, skew: float) -> Tensor:
    """Return logits, float32, whose softmax at T is skew * (the teacher's) + (1 - skew) * (the student's).

    All [..., classes].
    """
    soft, wanted = (logits.float().div(temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature * torch.logaddexp(wanted + math.log(skew), soft + math.log1p(-skew))


def state_loss(student: Tensor, teacher: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
    """Return the mean of ||s - t||^2 / ||t||^2 over positions, float32: hidden states as in FitNets (Romero
    et al. 2015), without their unit.

    Both [N, L, width], where a position is a token (a mask [N, L] is 0 where it is padding), or [N, C, H, W],
    where it is an image. The division makes a weight mean the same in every model and layer.
    """
    if student.ndim != 3:
        student, teacher = student.flatten(1), teacher.flatten(1)
    wanted = teacher.float()
    errors = (student.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=SMALLEST)
    return average(errors, masks)


def attention_loss(student: Tensor, teacher: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
    """Return the mean of KL(teacher || student) over heads and rows of attention maps [N, H, L, M], float32
    (MobileBERT, Sun et al. 2020).

    A row says where one token looks; a mask [N, L] is 0 where that token is padding.
    """
    wanted = teacher.float()
    rows = (wanted * (wanted.clamp(min=SMALLEST).log() - student.float().clamp(min=SMALLEST).log())).sum(-1)
    return average(rows.mean(1), masks)


def average(values: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
    """Return the mean over positions, a scalar; those where the first mask of the values' shape is 0 are left
    out.
    """
    mask = next((mask for mask in masks if mask.shape == values.shape), None)
    if mask is None:
        return values.mean()
    kept = mask.to(values.dtype)
    return (values * kept).sum() / kept.sum().clamp(min=1)
