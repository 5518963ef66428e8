"""What temperature does to the answers that a student is taught: one example, softened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench.errors import DataError
from workbench.modules.offload import device_of
from workbench.tasks.base import Task

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
MOST = 10  # answers shown


@dataclass(frozen=True)
class Softened:
    """The dense model's answer to training item `item`, at several temperatures.

    `answers` are names of classes or tokens, the likeliest first, and `probabilities[t][a]` that of answer a
    at temperatures[t], of all answers there are; `rest[t]` is what the answers not shown have together.
    `entropy[t]` is that of the whole distribution, in nats. `truth` is the label. The order of answers is the
    same at every temperature.
    """

    item: int
    truth: str
    answers: tuple[str, ...]
    temperatures: tuple[float, ...]
    probabilities: tuple[tuple[float, ...], ...]
    rest: tuple[float, ...]
    entropy: tuple[float, ...]


@torch.no_grad()
def softened(task: Task, item: int = 0, temperatures: Sequence[float] = TEMPERATURES) -> Softened:
    """Return softmax(logits / T) of the dense model for one training item.

    Of text or speech, for a token in the middle, as the last one often ends the text.

    Raises:
        DataError: no such item, a temperature of 0 or below, or a model whose answers are vectors.
    """
    if not 0 <= item < len(task.training):
        raise DataError(
            f"there is no training item {item}: {task.data_name!r} has {len(task.training)}, counted from 0"
        )
    if not temperatures or min(temperatures) <= 0:
        raise DataError(f"temperatures={tuple(temperatures)} must all be above 0")
    some = task.training[item : item + 1]
    logits, labels = task.kind.logits(task.model, some.to(device_of(task.model))), some.labels
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise DataError(
            f"{task.kind.name} has no distribution for each label that a temperature could soften"
        )
    scored = (labels.flatten() != -100).nonzero().flatten()
    place = int(scored[(len(scored) - 1) // 2])
    row, label = logits.flatten(0, -2)[place].double().cpu(), int(labels.flatten()[place])
    top = row.argsort(descending=True)[:MOST]
    soft = torch.stack(
        [(row / temperature).softmax(0) for temperature in temperatures]
    )  # [temperatures, classes]
    shown = soft[:, top]
    return Softened(
        item,
        name_of(task, label),
        tuple(name_of(task, int(place)) for place in top),
        tuple(float(t) for t in temperatures),
        tuple(tuple(line) for line in shown.tolist()),
        tuple((1 - shown.sum(1)).clamp(min=0).tolist()),
        tuple(torch.special.entr(soft).sum(1).tolist()),
    )


def name_of(task: Task, place: int) -> str:
    """Return the name of a class, the text of a token, or its number."""
    if place < len(task.labels):
        return task.labels[place]
    tokenizer: Any = getattr(task.processor, "tokenizer", task.processor)
    decode = getattr(tokenizer, "decode", None)
    return repr(decode([place])) if callable(decode) else str(place)
