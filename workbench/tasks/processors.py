"""Tokenizers and feature extractors from a model's folder, and which of its files belong to them."""

from __future__ import annotations

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


def set_padding(model: nn.Module, tokenizer: Any) -> None:
    """Agree on a padding token for texts of different lengths: the tokenizer's, else its end of text.

    Raises:
        ModelError: the tokenizer has neither.

    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has no padding token and no end-of-text token; set pad_token in"
                " tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
