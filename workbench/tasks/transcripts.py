"""Words of speech: how a model writes them as tokens, how they are made comparable, and how many are
wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import DataError, ModelError
from workbench.metrics.scores import Scores

EXTRA = "install it with: pip install 'compression-workbench[speech]'"


@dataclass(frozen=True)
class Writing:
    """How a speech model writes: `features` makes its inputs from sound, `tokenizer` its tokens from words
    and back.

    `prefix` are the tokens before the first word, `end` the one after the last; `suppressed` are never
    written, nor `suppressed_first` as the first word (Whisper, from its generation_config.json). Of CTC
    models, `end` is the blank.
    """

    tokenizer: Any
    features: Any
    prefix: tuple[int, ...] = ()
    end: int = -1
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()

    @cached_property
    def normaliser(self) -> Any:
        """Return Whisper's normaliser (Radford et al. 2022), as transformers has it.

        The model's own spellings, none if it brings none.
        """
        from transformers.models.whisper import english_normalizer

        return english_normalizer.EnglishTextNormalizer(
            getattr(self.tokenizer, "english_spelling_normalizer", None) or {}
        )

    def normalise(self, text: str) -> str:
        """Return words so that two spellings of the same ones are equal: lower case, no punctuation, numbers
        as figures.
        """
        return " ".join(str(self.normaliser(text)).split())

    def texts(self, ids: Tensor) -> list[str]:
        """Return normalised texts of token ids [N, L]; negative ones are left out."""
        return [self.normalise(self.written([token for token in row if token >= 0])) for row in ids.tolist()]

    def written(self, ids: Sequence[int]) -> str:
        """Return the words that tokens stand for, exactly."""
        told = (
            {"group_tokens": False} if hasattr(self.tokenizer, "word_delimiter_token") else {}
        )  # repeats are merged before, where they are
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False, **told
            )
        )


def whisper_writing(directory: Path, tokenizer: Any, features: Any) -> Writing:
    """Return how a Whisper model writes, from its generation_config.json.

    One of many languages writes English.

    Raises:
        ModelError: no such file, or one without the first tokens.
    """
    path = directory / "generation_config.json"
    try:
        said: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        start, end, plain = (
            int(said["decoder_start_token_id"]),
            said["eos_token_id"],
            int(said["no_timestamps_token_id"]),
        )
        many = bool(said.get("is_multilingual"))
        language = (int(said["lang_to_id"]["<|en|>"]), int(said["task_to_id"]["transcribe"])) if many else ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} does not say how the model begins to write ({type(error).__name__}: {error}); fetch the"
            " model with its generation_config.json"
        ) from None
    return Writing(
        tokenizer,
        features,
        (start, *language, plain),
        int(end[0] if isinstance(end, list) else end),
        tuple(said.get("suppress_tokens") or ()),
        tuple(said.get("begin_suppress_tokens") or ()),
    )


def word_errors(wanted: str, heard: str) -> tuple[int, int]:
    """Return (words wrong, missing or too many; words wanted) of one utterance, both texts normalised.

    Raises:
        DataError: jiwer is not installed.

    """
    try:
        import jiwer
    except ImportError:
        raise DataError(f"word error rate needs jiwer, which is not installed; {EXTRA}") from None
    counted = jiwer.process_words(wanted, heard)
    return counted.substitutions + counted.deletions + counted.insertions, len(wanted.split())


def spoken_scores(wanted: Sequence[str], heard: Sequence[str], loss: Tensor, weight: Tensor) -> Scores:
    """Return the scores of utterances from normalised texts, and the loss [N] per token in nats with the
    number of tokens [N].

    `correct` is the share of words that are right, `answers` a hash of each transcript.
    """
    counted = [word_errors(said, written) for said, written in zip(wanted, heard, strict=True)]
    errors, word_counts = (torch.tensor([pair[i] for pair in counted], dtype=torch.float64) for i in (0, 1))
    hashes = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") for text in heard]
    return Scores(
        loss=loss.double().cpu(),
        correct=(1 - errors / word_counts).clamp(min=0),
        weight=weight.double().cpu(),
        answers=torch.tensor(hashes, dtype=torch.long),
        details={"word errors": errors, "words": word_counts},
    )
