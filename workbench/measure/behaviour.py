"""What a compressed model does differently: answers that changed, classes that suffered, how far its
probabilities moved.

Equal accuracy can hide many changed answers ("Accuracy is not all you need", Dutta et al. 2024): these
records show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import DataError
from workbench.metrics.quality import Estimate, mean, paired_proportions
from workbench.modules.offload import device_of
from workbench.tasks.base import Items, Task
from workbench.util.progress import Progress, no_progress


@dataclass(frozen=True)
class Flip:
    """One item that the two models answer differently.

    `item` counts from 0 in the evaluation data; `kl` is in nats.
    """

    item: int
    label: str
    dense: str
    compressed: str
    kl: float


@dataclass(frozen=True)
class ClassChange:
    """How one class fares: items of it, and the paired change of the fraction answered correctly."""

    name: str
    items: int
    dense: float
    compressed: float
    change: Estimate


@dataclass(frozen=True)
class Behaviour:
    """A classifier's changes. `flips` come most changed first; confusion[label][answer] counts items."""

    items: int
    kl: Estimate
    flips: tuple[Flip, ...]
    classes: tuple[ClassChange, ...]
    dense_confusion: tuple[tuple[int, ...], ...]
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Continuation:
    """What both models say to the same `prompt`: how a language model goes on, what a recogniser hears, how
    alike texts are.
    """

    prompt: str
    dense: str
    compressed: str


def differences(
    task: Task, compressed: nn.Module, confidence: float = 0.95, progress: Progress = no_progress
) -> Behaviour | tuple[Continuation, ...]:
    """Return the answers in which a compressed model differs, as the task's kind shows them.

    Raises:
        DataError: nothing is known of how it could be shown, a classifier without names for its classes, or
            a language model without its tokenizer.
    """
    if task.kind.behaviour == "classes":
        return behaviour(task, compressed, confidence, progress)
    if task.kind.behaviour == "continuations":
        return continuations(task, compressed)
    if task.kind.behaviour == "told apart":
        return told_apart(task, compressed, progress=progress)
    raise DataError(
        f"{task.model_name} does {task.kind.name}, which does not say how changed answers could be shown"
    )


def behaviour(
    task: Task, compressed: nn.Module, confidence: float = 0.95, progress: Progress = no_progress
) -> Behaviour:
    """Return how a compressed classifier behaves on all evaluation items, next to the task's dense model.

    Raises:
        DataError: the task has no classes (language models: see `continuations`).

    """
    if not task.labels:
        raise DataError(
            f"{task.model_name} does {task.kind.name}, which has no classes to compare: ask for continuations"
            " instead"
        )
    before, after = answers(task, task.model, progress), answers(task, compressed, progress)
    labels = task.evaluation.labels.cpu()
    kl = (before.exp() * (before - after)).sum(1).clamp_min(0)  # [N]
    old, new = before.argmax(1), after.argmax(1)
    changed = torch.nonzero(old != new).flatten()
    order = changed[torch.argsort(kl[changed], descending=True, stable=True)]
    flips = tuple(
        Flip(int(i), task.labels[labels[i]], task.labels[old[i]], task.labels[new[i]], float(kl[i]))
        for i in order
    )
    classes = tuple(
        class_change(task.labels[c], (old == labels)[labels == c], (new == labels)[labels == c], confidence)
        for c in range(len(task.labels))
    )
    weight = torch.ones(len(labels), dtype=torch.float64)
    return Behaviour(
        len(labels),
        mean(kl, weight, confidence).within(0.0),
        flips,
        classes,
        confusion(labels, old, len(task.labels)),
        confusion(labels, new, len(task.labels)),
    )


def answers(task: Task, model: nn.Module, progress: Progress) -> Tensor:
    """Return a model's log-probabilities on all evaluation items, float64 [N, classes] on the CPU."""
    device = device_of(model)
    batches = []
    with torch.no_grad():
        for start in range(0, len(task.evaluation), task.batch_size):
            progress("behaviour", start, len(task.evaluation))
            items: Items = task.evaluation[start : start + task.batch_size].to(device)
            batches.append(task.kind.logits(model, items).double().log_softmax(1).cpu())
    return torch.cat(batches)


def class_change(name: str, before: Tensor, after: Tensor, confidence: float) -> ClassChange:
    """Return how one class fares; before, after: bool [items of this class]."""
    if not len(before):
        nothing = Estimate(0.0, -1.0, 1.0)
        return ClassChange(name, 0, 0.0, 0.0, nothing)
    return ClassChange(
        name,
        len(before),
        float(before.double().mean()),
        float(after.double().mean()),
        paired_proportions(before.double(), after.double(), confidence),
    )


def confusion(labels: Tensor, given: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """Return counts[label][answer]."""
    table = torch.bincount(labels * count + given, minlength=count * count).view(count, count)
    return tuple(tuple(int(value) for value in row) for row in table)


def continuations(
    task: Task, compressed: nn.Module, *, prompts: int = 3, prompt_tokens: int = 32, new_tokens: int = 32
) -> tuple[Continuation, ...]:
    """Return the texts that a dense and a compressed language model write after the beginnings of evaluation
    windows.

    Raises:
        DataError: the task is not language modelling, or has no tokenizer.
    """
    if task.kind.behaviour != "continuations" or task.processor is None:
        raise DataError(
            f"{task.model_name} does {task.kind.name}: continuations need a language model with its tokenizer"
        )
    continued = []
    for item in range(min(prompts, len(task.evaluation))):
        prompt = task.evaluation.inputs["input_ids"][item : item + 1, :prompt_tokens]
        texts = [write(model, prompt, new_tokens, task.processor) for model in (task.model, compressed)]
        continued.append(
            Continuation(str(task.processor.decode(prompt[0].tolist(), skip_special_tokens=True)), *texts)
        )
    return tuple(continued)


def told_apart(
    task: Task, compressed: nn.Module, *, items: int = 64, most: int = 12, progress: Progress = no_progress
) -> tuple[Continuation, ...]:
    """Return the items, of the first so many, to which both models give other answers in words.

    The first ones if all are alike.
    """
    device = device_of(compressed)
    rows: list[Continuation] = []
    count = min(items, len(task.evaluation))
    for start in range(0, count, task.batch_size):
        progress("behaviour", start, count)
        some = task.evaluation[start : min(count, start + task.batch_size)].to(device)
        before, after = task.kind.examples(task.model, some), task.kind.examples(compressed, some)
        rows += [Continuation(asked, old, new) for (asked, old), (_, new) in zip(before, after, strict=True)]
    changed = [row for row in rows if row.dense != row.compressed]
    return tuple((changed or rows)[:most])


def write(model: nn.Module, prompt: Tensor, count: int, tokenizer: Any) -> str:
    """Return the text of `count` greedy tokens after a prompt [1, L]."""
    device = device_of(model)
    ids = prompt.to(device)
    generate: Any = model.generate
    with torch.no_grad():
        written = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(written[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
