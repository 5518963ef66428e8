"""Causal language modelling: a window of tokens in, the next token after each position out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.tasks.base import Items
from workbench.tasks.likelihood import Choosing

CONTEXT = 512
TEXT_CHUNK = 20_000  # characters tokenised at a time


@dataclass(frozen=True)
class LanguageModelling(Choosing):
    """The tokens of a window, each given those before it; quality is perplexity."""

    name: str = "language modelling"
    auto_class: str = "AutoModelForCausalLM"
    primary: str = "perplexity"
    latency_items: int = 1  # a window of many tokens

    def logits(self, model: nn.Module, items: Items) -> Tensor:
        """Return [N, L - 1, vocabulary] for `input_ids` [N, L]: what the model expects after each position
        but the last.
        """
        logits: Tensor = model(**items.inputs, use_cache=False).logits
        return logits[:, :-1]


LANGUAGE_MODELLING = LanguageModelling()


def window_items(ids: Tensor) -> Items:
    """Return windows as items: ids [N, L] -> `input_ids` [N, L] and labels [N, L - 1], the token after each
    position.
    """
    return Items({"input_ids": ids}, ids[:, 1:].contiguous())


def windows(texts: Iterable[str], tokenizer: Any, context: int = CONTEXT, limit: int | None = None) -> Tensor:
    """Return the tokens of all texts, one after the other, cut into windows [N, context].

    The last short one is dropped.

    No special tokens are added and no window overlaps another. At most `limit` windows are made, and no more
    text is tokenised than they need.
    """
    ids: list[int] = []
    for chunk in _chunks(texts):
        ids += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit * context:
            break
    count = len(ids) // context if limit is None else min(limit, len(ids) // context)
    return torch.tensor(ids[: count * context], dtype=torch.long).reshape(count, context)


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Join lines and documents into texts of about `TEXT_CHUNK` characters: tokenising is then fast, and
    seams are few.
    """
    gathered, length = [], 0
    for text in texts:
        gathered.append(text if text.endswith("\n") else text + "\n")
        length += len(text)
        if length >= TEXT_CHUNK:
            yield "".join(gathered)
            gathered, length = [], 0
    if gathered:
        yield "".join(gathered)
