"""Text classification: a text in, one class out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from workbench.errors import DataError
from workbench.tasks import columns
from workbench.tasks.base import Items
from workbench.tasks.items import ItemCounts, Pools, Reading, labelled_pools
from workbench.tasks.likelihood import Choosing
from workbench.tasks.processors import (
    TOKENIZER_FILES,
    load_tokenizer,
    most_tokens,
    positions,
    set_padding,
)
from workbench.tasks.reading.lengths import count_cut, text_length
from workbench.tasks.reading.tally import Tally
from workbench.tasks.reading.texts import ReadColumns

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

    limit: int | None = field(
        default=None, compare=False
    )  # tokens that the model reads, None: without an end
    # Kinds of tokens, by which it is told of which of two texts each is; None: as many as the tokenizer says
    segments: int | None = field(default=None, compare=False)

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
        """Return the kind with the number of tokens that this model reads, once model and tokenizer agree on
        padding, and notes.
        """
        notes = set_padding(model, processor) if processor is not None else ()
        return replace(self, limit=most_tokens(model), segments=segments_of(model)), notes

    def pools(self, reading: Reading, raw: columns.Raw, sizes: ItemCounts) -> Pools:  # noqa: ARG002
        """Return texts or pairs of texts, one item a row, after checking every label."""
        limit = self.limit or positions(reading.config)
        longest = text_length(reading.context, reading.processor, limit, MAX_TOKENS)
        tally = Tally("texts")

        def make(texts: list[list[Any]], labels: list[int], rows: Sequence[int], read: ReadColumns) -> Items:
            for column, some in zip(read.columns, texts, strict=True):
                for row, text in zip(rows, some, strict=True):
                    if not isinstance(text, str):
                        raise DataError(f"item {row} has {text!r} in column {column!r}; a text is needed")
            count_cut(tally, texts, reading.processor, longest, limit)
            first, second = texts[0], texts[1] if len(texts) > 1 else None
            return text_items(
                first, labels, reading.processor, longest, seconds=second, segments=self.segments
            )

        return labelled_pools(raw, reading.config, columns.text_columns, make, tally.notes)

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


def segments_of(model: nn.Module) -> int | None:
    """Return the number of kinds of tokens (`token_type_ids`) by which a model is told of which of two texts
    each is: 0 where it takes none, None where its config does not say.
    """
    if "token_type_ids" not in signature(model.forward).parameters:
        return 0
    kinds = getattr(model.config, "type_vocab_size", None)
    return None if kinds is None else int(kinds)


def text_items(
    texts: Sequence[str],
    labels: Sequence[int],
    tokenizer: Any,
    max_tokens: int = MAX_TOKENS,
    *,
    seconds: Sequence[str] | None = None,
    segments: int | None = None,
) -> Items:
    """Return items of texts, or of pairs with their second texts, truncated and padded to `max_tokens`
    tokens: `input_ids`, `attention_mask` [N, max_tokens]; of pairs also `token_type_ids` where the model has
    two or more kinds of tokens (`segments`; None: where the tokenizer gives them).

    Every set is padded to the same length, so that an item's inputs do not depend on which others it stands
    with.
    """
    given = [list(texts)] if seconds is None else [list(texts), list(seconds)]
    told = {"return_token_type_ids": True} if len(given) > 1 and (segments or 0) > 1 else {}
    encoded = tokenizer(
        *given, truncation=True, padding="max_length", max_length=max_tokens, return_tensors="pt", **told
    )
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in encoded and (segments is None or segments > 1):
        # Zeros are the default, and not every model takes them
        names += ["token_type_ids"] * (len(given) > 1 or bool(encoded["token_type_ids"].any()))
    return Items({name: encoded[name] for name in names}, torch.tensor(labels, dtype=torch.long))
