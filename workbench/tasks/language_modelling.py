"""Causal language modelling: a window of tokens in, the next token after each position out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import DataError
from workbench.tasks import columns
from workbench.tasks.base import Items
from workbench.tasks.items import ItemCounts, Pool, Pools, Reading
from workbench.tasks.likelihood import Choosing
from workbench.tasks.processors import (
    GENERATION_FILES,
    TOKENIZER_FILES,
    load_tokenizer,
    opening,
    positions,
)
from workbench.tasks.reading.chats import written
from workbench.tasks.sources import PYTHON_DOCS, WIKITEXT

CONTEXT = 512
TEXT_CHUNK = 20_000  # characters tokenised at a time
# Windows of text read for each window wanted, so that the ones picked are spread over the text
READ_AHEAD = 8
LONG = 32  # tokens of a window from which on a few of them say something, and take a CPU seconds
FEW_LONG = 4


@dataclass(frozen=True)
class LanguageModelling(Choosing):
    """The tokens of a window, each given those before it; quality is perplexity."""

    name = "language modelling"
    auto_class = "AutoModelForCausalLM"
    architectures = ("ForCausalLM", "LMHeadModel")
    type_mapping = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    primary = "perplexity"
    distribution = "token"
    sizes = ItemCounts(64, 32, 256)
    latency_items = 1  # a window of many tokens
    sensitivity_items = 16
    data_names = (PYTHON_DOCS, WIKITEXT)
    default_data = (WIKITEXT, PYTHON_DOCS)
    files = (*TOKENIZER_FILES, *GENERATION_FILES)
    kv_cache = True
    behaviour = "continuations"
    chunked_head = True
    fused_blocks = True

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return why a model that writes does not only go on with a text."""
        return "it has an encoder as well" if config.get("is_encoder_decoder") else ""

    def processor(self, directory: Path, config: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """Return the tokenizer of a folder."""
        return load_tokenizer(directory, self.name)

    def pools(self, reading: Reading, raw: columns.Raw, sizes: ItemCounts) -> Pools:
        """Return windows of running text."""
        return window_pools(reading, raw, sizes)

    def labels(self, config: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        """Return nothing: tokens are no classes."""
        return ()

    def batch_size(self, evaluation: Items, *, on_cpu: bool) -> int:  # noqa: ARG002
        """Return how many windows are run at once."""
        return 4 if on_cpu else 16

    def cpu_looks(self, items: Items) -> tuple[int, ...]:
        """Return a look at 4 windows before the one at 16.

        Its interval is three to four times as wide (half of that if a recipe next to this one was measured
        before), and it is there after a third of the time. The looks after it widen by 5 to 10%.
        """
        return (FEW_LONG,) if items.labels.shape[1] >= LONG else ()

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


def windows(
    texts: Iterable[str],
    tokenizer: Any,
    context: int = CONTEXT,
    limit: int | None = None,
    begin: Sequence[int] = (),
) -> Tensor:
    """Return the tokens of all texts, one after the other, cut into windows [N, context].

    The last short one is dropped. Each begins with the tokens `begin`, those that the tokenizer puts before a
    text; no other special tokens are added, and no window overlaps another. At most `limit` windows are made,
    and no more text is tokenised than they need.
    """
    ids: list[int] = []
    room = context - len(begin)
    for chunk in _chunks(texts):
        ids += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit * room:
            break
    count = len(ids) // room if limit is None else min(limit, len(ids) // room)
    cut = torch.tensor(ids[: count * room], dtype=torch.long).reshape(count, room)
    return torch.cat([torch.tensor(list(begin), dtype=torch.long).expand(count, -1), cut], 1)


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


def window_pools(reading: Reading, raw: columns.Raw, sizes: ItemCounts) -> Pools:
    """Return windows of running text.

    Raises:
        DataError: a window that the model cannot hold, or less text than one.
    """
    longest = positions(reading.config)
    context = reading.context or min(CONTEXT, longest or CONTEXT)
    begin = opening(reading.processor)
    if context < 2 + len(begin) or (longest and context > longest):
        raise DataError(
            f"context={context}: a window needs at least {2 + len(begin)} tokens"
            + (f" and at most the model's {longest}" if longest else "")
        )
    word = reading.processor.decode(begin) if begin else ""
    notes = [
        f"windows of {context} tokens" + (f", each after {word!r} as the tokenizer begins" * bool(begin))
    ]
    held_out_name = columns.held_out(raw)

    def pool(split: str, wanted: int) -> Pool:
        rows = raw.splits[split]
        chosen = columns.text_column(raw.name, rows)
        (column,) = chosen.columns
        notes.extend(note for note in chosen.notes() if note not in notes)
        texts = (
            written(rows[column], reading.processor, column, raw.name, word)
            if chosen.chat
            else (text for text in rows[column] if text)
        )
        ids = windows(texts, reading.processor, context, READ_AHEAD * wanted, begin)
        if not len(ids):
            raise DataError(
                f"data {raw.name!r} ({split}) hold less text than one window of {context} tokens: give more"
                " text or a smaller context"
            )
        return Pool(len(ids), lambda index: window_items(ids[torch.tensor(list(index), dtype=torch.long)]))

    rest = sizes.calibration + sizes.training
    train = pool(columns.train_name(raw, held_out_name), rest + (0 if held_out_name else sizes.evaluation))
    held_out = pool(held_out_name, sizes.evaluation) if held_out_name else None
    return train, held_out, tuple(notes)
