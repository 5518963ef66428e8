"""Tokenizers and feature extractors from a model's folder, and which of its files belong to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from workbench.errors import ModelError
from workbench.util.quiet import quiet
from workbench.util.text import one_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
FEATURE_FILES = ("preprocessor_config.json", "processor_config.json")
GENERATION_FILES = ("generation_config.json",)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")  # in config.json
PLACES = re.compile(
    "(?:absolute_)?position_embeddings?|embed_positions?|wpe|positions_embed"
)  # names of tables
PROBE = "a"  # a text that every tokenizer knows


def load_tokenizer(directory: Path, what: str) -> Any:
    """Return the tokenizer of a folder, which `what` (a kind of task) needs.

    Raises:
        ModelError: no tokenizer files, files that cannot be read, or ones that need code of their own.
    """
    from transformers import AutoTokenizer

    check_tokenizer(directory, what)
    return load_from(directory, "tokenizer", AutoTokenizer)


def check_tokenizer(directory: Path, what: str) -> None:
    """Refuse a folder without any file of tokens with `ModelError`."""
    if not any(
        (directory / name).is_file()
        for name in TOKENIZER_FILES
        if name.startswith(("tokenizer.", "vocab", "spiece", "sentencepiece"))
    ):
        raise ModelError(
            f"{directory} has no tokenizer (tokenizer.json, or vocab.txt, or tokenizer.model); {what} needs"
            " one"
        )


def load_from(directory: Path, called: str, *loaders: Any, **options: Any) -> Any:
    """Return the objects that transformers' loaders make of a folder's files: one, or a list of several.

    Raises:
        ModelError: the files cannot be read, or need code of their own; the message names what is `called`.
    """
    with quiet():
        try:
            loaded = [
                loader.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **options)
                for loader in loaders
            ]
        except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise ModelError(
                f"{directory}: its {called} cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from None
    return loaded[0] if len(loaded) == 1 else loaded


def set_padding(model: nn.Module, tokenizer: Any) -> tuple[str, ...]:
    """Agree on a padding token for texts of different lengths, and return notes: the model's own, which it
    looks for to find the end of a text, else the tokenizer's, else its end of text.

    Padding stands on the right, so that each token has the position that it has alone. Models that answer by
    their last token of all keep their tokenizer's side: their positions are relative (XLNet).

    Raises:
        ModelError: the tokenizer has neither.
    """
    config: Any = model.config
    own, notes = getattr(config, "pad_token_id", None), list[str]()
    in_vocabulary = isinstance(own, int) and 0 <= own < (getattr(config, "vocab_size", None) or own + 1)
    word = tokenizer.convert_ids_to_tokens(own) if in_vocabulary else None
    if tokenizer.pad_token is None and word is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has no padding token and no end-of-text token; set pad_token in"
                " tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if word is not None and tokenizer.pad_token_id != own:
        if tokenizer.pad_token is not None:
            notes.append(
                f"texts are padded with {word!r}, which the model's config names, not with the tokenizer's"
                f" {tokenizer.pad_token!r}"
            )
        tokenizer.pad_token = word
    elif word is None:
        config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.padding_side != "right" and getattr(config, "summary_type", None) != "last":
        tokenizer.padding_side = "right"
        notes.append("texts are padded on the right, so that positions count from their first word")
    return tuple(notes)


def positions(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model's config.json says that it reads, None where it does not say.

    Tables of relative positions have no end.
    """
    said = {**config, **(config.get("text_config") or {})}
    if "relative_attention_num_buckets" in said:
        return None
    numbers = (said.get(name) for name in POSITIONS)
    return next((number for number in numbers if isinstance(number, int) and number > 0), None)


def most_tokens(model: nn.Module) -> int | None:
    """Return how many tokens a model reads by its config and its tables of positions; None: without an end.

    RoBERTa's family leaves out the first rows of its table, up to that of the padding.
    """
    config: Any = model.config
    ends = [end] if (end := positions(config.to_dict())) else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and PLACES.fullmatch(name.rsplit(".", 1)[-1]):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            ends.append(module.num_embeddings - skipped)
    return min(ends, default=None)


def opening(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text of its own accord: mostly none, or one that says
    where a text begins.
    """
    given = tokenizer(PROBE, return_special_tokens_mask=True)
    ids, added = list(given["input_ids"]), list(given.get("special_tokens_mask", ()))
    if 0 in added:
        return ids[: added.index(0)]
    return ids[:1] if added and ids[0] == tokenizer.bos_token_id else []
