"""Kinds of task, which of them a model's config names, and how a model's answers are scored."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from workbench.errors import ModelError
from workbench.metrics.scores import Scores
from workbench.modules.offload import streaming, streams_to
from workbench.tasks.base import Items, Kind
from workbench.tasks.ctc import FRAME_RECOGNITION
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.tasks.sentence_similarity import SENTENCE_SIMILARITY
from workbench.tasks.speech_recognition import SPEECH_RECOGNITION
from workbench.tasks.text_classification import TEXT_CLASSIFICATION

KINDS: tuple[Kind, ...] = (
    IMAGE_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    LANGUAGE_MODELLING,
    SENTENCE_SIMILARITY,
    SPEECH_RECOGNITION,
    FRAME_RECOGNITION,
)
ENDINGS: tuple[tuple[str, Kind], ...] = (
    ("ForImageClassification", IMAGE_CLASSIFICATION),
    ("ForImageClassificationWithTeacher", IMAGE_CLASSIFICATION),
    ("ForSequenceClassification", TEXT_CLASSIFICATION),
    ("ForCausalLM", LANGUAGE_MODELLING),
    ("LMHeadModel", LANGUAGE_MODELLING),
    ("Model", SENTENCE_SIMILARITY),
    ("ForConditionalGeneration", SPEECH_RECOGNITION),
    ("ForCTC", FRAME_RECOGNITION),
)


def score(kind: Kind, model: nn.Module, items: Items) -> Scores:
    """Return what `model` does on one batch of `items`; the items are moved to the model's device.

    A destroyed model still gets a number: where nothing finite comes out, the answer counts as the worst
    there is.
    """
    with torch.inference_mode(), streaming(model):
        return kind.score(model, items.to(_device(model, items)))


def kind_of(config: Any) -> Kind:
    """Return the kind of task that a model is for, read from its transformers config (or the mapping in
    config.json).

    Raises:
        ModelError: another task than those that the workbench runs, or a config that does not say which.
    """
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    architectures = values.get("architectures") or []
    model_type = values.get("model_type", "?")
    for name in architectures:
        for ending, kind in ENDINGS:
            if name.endswith(ending) and _fits(kind, values):
                _check_classes(kind, values)
                return kind
    supported = ", ".join(dict.fromkeys(kind.name for kind in KINDS))
    if architectures:
        raise ModelError(
            f"a model of architecture {', '.join(architectures)} is for a task that the workbench does not"
            f" run; it runs {supported}"
        )
    kinds = _kinds_of_type(model_type)
    if len(kinds) == 1:
        return kinds[0]
    found = ", ".join(kind.name for kind in kinds) or "none of them"
    raise ModelError(
        f"config.json names no architecture, and model type {model_type!r} can do {found}; "
        f"add 'architectures' to config.json (the workbench runs {supported})"
    )


def _fits(kind: Kind, values: Mapping[str, Any]) -> bool:
    """Return whether a model whose class is named after a kind really is of it."""
    if kind is LANGUAGE_MODELLING:
        return not values.get("is_encoder_decoder")
    if kind is SPEECH_RECOGNITION:
        return values.get("model_type") == "whisper"
    return kind is not SENTENCE_SIMILARITY or _encodes_text(values)


def _encodes_text(values: Mapping[str, Any]) -> bool:
    """Return whether a bare model (BertModel) is an encoder of texts: its family also fills in masked words,
    and has no decoder.
    """
    from transformers.models.auto import modeling_auto as auto

    return values.get("model_type") in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (
        values.get("is_encoder_decoder") or values.get("is_decoder")
    )


def _check_classes(kind: Kind, values: Mapping[str, Any]) -> None:
    """Refuse heads that do not choose one class: several labels an item, or a regression."""
    problem = values.get("problem_type")
    if kind in (IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION) and problem not in (
        None,
        "single_label_classification",
    ):
        raise ModelError(
            f"the model's problem_type is {problem!r}; the workbench scores single_label_classification only"
        )


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
    return streams_to(model) or tensor.device
