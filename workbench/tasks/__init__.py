"""Kinds of task, which of them a model's config names, and how a model's answers are scored."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workbench.errors import ModelError
from workbench.tasks.base import Items, Kind, Scores
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.tasks.text_classification import TEXT_CLASSIFICATION

KINDS: tuple[Kind, ...] = (IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, LANGUAGE_MODELLING)
ENDINGS = (
    ("ForImageClassification", IMAGE_CLASSIFICATION),
    ("ForImageClassificationWithTeacher", IMAGE_CLASSIFICATION),
    ("ForSequenceClassification", TEXT_CLASSIFICATION),
    ("ForCausalLM", LANGUAGE_MODELLING),
    ("LMHeadModel", LANGUAGE_MODELLING),
)
CHUNK = 2**24  # logits reduced at a time: 64 MB in float32


def score(kind: Kind, model: nn.Module, items: Items) -> Scores:
    """Return what `model` does on one batch of `items`; the items are moved to the model's device.

    Log-likelihoods are computed in float32 whatever the model computes in, and averaged over an item's labels in float64.
    A destroyed model still gets a number: where the likelihood is not finite, the loss is inf and the answer counts as
    wrong.
    """
    with torch.inference_mode():
        items = items.to(_device(model, items))
        loss, answers = _token_loss(kind.logits(model, items), items.labels)
        scored = items.labels != -100
        lost = torch.isposinf(loss) & scored
        correct = (answers == items.labels) & scored & ~lost
        dims = tuple(range(1, loss.ndim))  # the tokens of a window; none for classes
        weight = _sum(scored, dims)
        divisor = weight.clamp(min=1)
        return Scores(
            loss=(_sum(loss, dims) / divisor).cpu(),
            correct=(_sum(correct, dims) / divisor).cpu(),
            weight=weight.cpu(),
            answers=answers.cpu(),
        )


def kind_of(config: Any) -> Kind:
    """Return the kind of task that a model is for, read from its transformers config (or the mapping in config.json).

    Raises:
        ModelError: another task than the three that the workbench runs, or a config that does not say which.

    """
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    architectures = values.get("architectures") or []
    model_type = values.get("model_type", "?")
    for name in architectures:
        for ending, kind in ENDINGS:
            if name.endswith(ending) and not (kind is LANGUAGE_MODELLING and values.get("is_encoder_decoder")):
                _check_classes(kind, values)
                return kind
    supported = ", ".join(kind.name for kind in KINDS)
    if architectures:
        raise ModelError(f"a model of architecture {', '.join(architectures)} is for a task that the workbench does not run; it runs {supported}")
    kinds = _kinds_of_type(model_type)
    if len(kinds) == 1:
        return kinds[0]
    found = ", ".join(kind.name for kind in kinds) or "none of them"
    raise ModelError(f"config.json names no architecture, and model type {model_type!r} can do {found}; "
                     f"add 'architectures' to config.json (the workbench runs {supported})")  # fmt: skip


def _check_classes(kind: Kind, values: Mapping[str, Any]) -> None:
    """Refuse heads that do not choose one class: several labels an item, or a regression."""
    problem = values.get("problem_type")
    if kind is not LANGUAGE_MODELLING and problem not in (None, "single_label_classification"):
        raise ModelError(f"the model's problem_type is {problem!r}; the workbench scores single_label_classification only")


def _kinds_of_type(model_type: str) -> list[Kind]:
    """Return the kinds for which transformers has a class of this model type."""
    from transformers.models.auto import modeling_auto as auto

    mappings: tuple[tuple[Kind, Any], ...] = (
        (IMAGE_CLASSIFICATION, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        (TEXT_CLASSIFICATION, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (LANGUAGE_MODELLING, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    )
    return [kind for kind, mapping in mappings if model_type in mapping]


def _device(model: nn.Module, items: Items) -> torch.device:
    """Return where the model's tensors are; where the items are, for a model without any."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), items.labels)
    return tensor.device


def _sum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the float64 sum over `dims` (torch sums over everything when given no dims)."""
    return values.double().sum(dims) if dims else values.double()


def _token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss (nats, 0 where a label is -100, inf where not finite) and the answer of each label: both as `labels`.

    logits: [..., classes], labels: [...]. Reduced by chunks, so that no second copy of a large vocabulary's logits is made.
    """
    flat, target = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    rows = max(1, CHUNK // flat.shape[-1])
    parts = [(cross_entropy(some.float(), wanted, ignore_index=-100, reduction="none"), some.argmax(-1))
             for some, wanted in zip(torch.split(flat, rows), torch.split(target, rows), strict=True)]  # fmt: skip
    loss = torch.cat([part[0] for part in parts]).reshape(labels.shape)
    answers = torch.cat([part[1] for part in parts]).reshape(labels.shape)
    return torch.where(torch.isfinite(loss), loss, torch.inf), answers
