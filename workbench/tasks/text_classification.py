"""Text classification: a text in, one class out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from workbench.errors import DataError
from workbench.tasks import columns
from workbench.tasks.base import Items
from workbench.tasks.items import ItemCounts, Pools, Reading, labelled_pools
from workbench.tasks.likelihood import Choosing
from workbench.tasks.processors import TOKENIZER_FILES, load_tokenizer, set_padding

MAX_TOKENS = 128


@dataclass(frozen=True)
class TextClassification(Choosing):
    """One label per text; quality is accuracy."""

    name = "text classification"
    auto_class = "AutoModelForSequenceClassification"
    architectures = ("ForSequenceClassification",)
    type_mapping = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    primary = "accuracy"
    distribution = "text"
    sizes = ItemCounts(2000, 512, 5000)
    latency_items = 16
    sensitivity_items = 256
    data_names = ()
    default_data = ()
    files = TOKENIZER_FILES
    kv_cache = False
    behaviour = "classes"
    masked_texts = True

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return why a head does not choose one class."""
        return columns.not_one_class(config)

    def processor(self, directory: Path, config: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """Return the tokenizer of a folder."""
        return load_tokenizer(directory, self.name)

    def prepared(
        self,
        model: nn.Module,
        directory: Path,  # noqa: ARG002
        processor: Any,
    ) -> tuple[Self, tuple[str, ...]]:
        """Return the kind as it is, once model and tokenizer agree on a padding token."""
        if processor is not None:
            set_padding(model, processor)
        return self, ()

    def pools(self, reading: Reading, raw: columns.Raw, sizes: ItemCounts) -> Pools:  # noqa: ARG002
        """Return texts, one item a row, after checking every label."""
        longest = min(
            MAX_TOKENS,
            reading.context or MAX_TOKENS,
            int(reading.config.get("max_position_embeddings") or MAX_TOKENS),
        )

        def make(texts: list[Any], labels: list[int], rows: Sequence[int], column: str) -> Items:
            for row, text in zip(rows, texts, strict=True):
                if not isinstance(text, str):
                    raise DataError(f"item {row} has {text!r} in column {column!r}; a text is needed")
            return text_items(texts, labels, reading.processor, longest)

        return labelled_pools(raw, reading.config, columns.text_columns, make)

    def labels(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the classes."""
        return columns.classes(config)

    def batch_size(self, evaluation: Items, *, on_cpu: bool) -> int:  # noqa: ARG002
        """Return how many texts are run at once."""
        return 128 if on_cpu else 512

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
