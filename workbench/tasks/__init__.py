"""Kinds of task, the built-in ones registered, and how a model's answers are scored."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from workbench.metrics.scores import Scores
from workbench.modules.offload import streaming, streams_to
from workbench.tasks.base import Items, Kind
from workbench.tasks.ctc import FRAME_RECOGNITION
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.tasks.registry import KINDS
from workbench.tasks.sentence_similarity import SENTENCE_SIMILARITY
from workbench.tasks.speech_recognition import SPEECH_RECOGNITION
from workbench.tasks.text_classification import TEXT_CLASSIFICATION

for built_in in (
    IMAGE_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    LANGUAGE_MODELLING,
    SENTENCE_SIMILARITY,
    SPEECH_RECOGNITION,
    FRAME_RECOGNITION,
):
    KINDS.register(built_in)


def score(kind: Kind, model: nn.Module, items: Items) -> Scores:
    """Return the scores of `model` on one batch of `items`; the items are moved to the model's device.

    A destroyed model still gets a number: where nothing finite comes out, the answer counts as the worst
    there is.
    """
    with torch.no_grad(), streaming(model):
        return kind.score(model, items.to(_device(model, items)))


def _device(model: nn.Module, items: Items) -> torch.device:
    """Return where the model's tensors are; where the items are, for a model without any."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), items.labels)
    return streams_to(model) or tensor.device
