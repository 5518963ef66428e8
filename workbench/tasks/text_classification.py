"""Text classification: a text in, one class out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.tasks.base import Items
from workbench.tasks.likelihood import Choosing

MAX_TOKENS = 128


@dataclass(frozen=True)
class TextClassification(Choosing):
    """One label per text; quality is accuracy."""

    name: str = "text classification"
    auto_class: str = "AutoModelForSequenceClassification"
    primary: str = "accuracy"
    masked_texts: ClassVar[bool] = True  # what the mask leaves out changes no answer

    def logits(self, model: nn.Module, items: Items) -> Tensor:
        """Return [N, classes] for `input_ids` and `attention_mask`, both [N, L]."""
        logits: Tensor = model(**items.inputs).logits
        return logits


TEXT_CLASSIFICATION = TextClassification()


def text_items(
    texts: Sequence[str], labels: Sequence[int], tokenizer: Any, max_tokens: int = MAX_TOKENS
) -> Items:
    """Return items of texts, truncated and padded to `max_tokens` tokens: `input_ids`, `attention_mask` [N,
    max_tokens].

    Every set is padded to the same length, so that an item's inputs do not depend on which others it stands
    with.
    """
    encoded = tokenizer(
        list(texts), truncation=True, padding="max_length", max_length=max_tokens, return_tensors="pt"
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    if (
        "token_type_ids" in encoded and encoded["token_type_ids"].any()
    ):  # zeros are the default, and not every model takes them
        inputs["token_type_ids"] = encoded["token_type_ids"]
    return Items(inputs, torch.tensor(labels, dtype=torch.long))
