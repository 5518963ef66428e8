"""Speech recognition: sound in, words out.

Whisper's family (encoder and decoder); `workbench.tasks.ctc` has the other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from workbench.errors import ModelError, RuntimeRefused
from workbench.metrics.scores import Scores
from workbench.tasks.base import Items
from workbench.tasks.columns import Raw
from workbench.tasks.items import ItemCounts, Pools, Reading
from workbench.tasks.likelihood import Choosing, likelihoods
from workbench.tasks.processors import (
    FEATURE_FILES,
    GENERATION_FILES,
    TOKENIZER_FILES,
    check_tokenizer,
    load_from,
)
from workbench.tasks.transcripts import Writing, spoken_scores, whisper_writing
from workbench.tasks.utterances import PROMPTS, Windows, speech_pools

FRAMES = 100  # of Whisper's features in a second
PREFIX = 4  # tokens before the words, at most


@dataclass(frozen=True)
class SpeechRecognition(Choosing):
    """Utterances with their words; quality is the word error rate of what the model writes, greedily.

    Training, gradients, calibration and distillation see the decoder with the true words before each token
    (teacher forcing). Latency is the whole way from features to as many tokens as the true words have; its
    ratio to the length of the sound is the real-time factor (`Latency.real_time_factors`). Making features
    from sound is not timed: no method changes it.
    """

    name = "speech recognition"
    auto_class = "AutoModelForSpeechSeq2Seq"
    architectures = ("ForConditionalGeneration",)
    type_mapping = None
    primary = "word error rate"
    distribution = None  # words are written one after the other
    sizes = ItemCounts(64, 32, 256)
    latency_items = 1
    sensitivity_items = 32
    data_names = (PROMPTS,)
    default_data = (PROMPTS,)
    files = (*TOKENIZER_FILES, *FEATURE_FILES, *GENERATION_FILES, "normalizer.json")
    kv_cache = False  # that the KV cache of a recipe could replace
    behaviour = "told apart"

    writing: Writing | None = field(default=None, compare=False, repr=False)

    @property
    def writes(self) -> Writing:
        """Return how the model writes; `workbench.zoo.load_task` gives it."""
        if self.writing is None:
            raise ModelError("this speech model has no tokenizer yet: load it with workbench.zoo.load_task")
        return self.writing

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return why a model that writes is none that writes what it hears."""
        return "" if config.get("model_type") == "whisper" else "only Whisper's family is built"

    def processor(self, directory: Path, config: Mapping[str, Any]) -> Writing:  # noqa: ARG002
        """Return how a model hears and writes: its feature extractor, its tokenizer, its special tokens."""
        return whisper_writing(directory, *tokens_and_features(directory, self.name))

    def prepared(
        self,
        model: nn.Module,  # noqa: ARG002
        directory: Path,  # noqa: ARG002
        processor: Any,
    ) -> tuple[Self, tuple[str, ...]]:
        """Return the kind with how this model writes."""
        return replace(self, writing=processor), ()

    def pools(self, reading: Reading, raw: Raw, sizes: ItemCounts) -> Pools:
        """Return utterances, one item a row."""
        writes = self.writes
        return speech_pools(raw, sizes, writes, lambda some: Windows.of(some, writes, reading.config))

    def labels(self, config: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        """Return nothing: words are no classes."""
        return ()

    def batch_size(self, evaluation: Items, *, on_cpu: bool) -> int:  # noqa: ARG002
        """Return how many utterances are run at once."""
        return 4 if on_cpu else 16

    def logits(self, model: nn.Module, items: Items) -> Tensor:
        """Return [N, L, vocabulary] for `input_features` [N, mels, 3000] and `decoder_input_ids` [N, L]."""
        logits: Tensor = model(
            input_features=features(model, items),
            decoder_input_ids=items.inputs["decoder_input_ids"],
            use_cache=False,
        ).logits
        return logits

    def score(self, model: nn.Module, items: Items) -> Scores:
        """Return word errors of what the model writes, and the loss with the true words before each token.

        One encoder pass for both.
        """
        encoded = encode(model, items)
        logits = model(
            encoder_outputs=(encoded,), decoder_input_ids=items.inputs["decoder_input_ids"], use_cache=False
        ).logits
        forced = likelihoods(logits, items.labels)
        heard = self.writes.texts(greedy(model, encoded, self.writes, longest(model, items)))
        return spoken_scores(self.writes.texts(items.labels), heard, forced.loss, forced.weight)

    def run(self, model: nn.Module, items: Items) -> Tensor:
        """Return as many tokens as the longest of the true transcripts has, [N, L], from features to the last
        one.

        A model that stops early or goes on without an end would else seem faster or slower than it is.
        """
        written = int((items.labels != -100).sum(1).max())
        return greedy(model, encode(model, items), self.writes, written, stop=False)

    def transcribe(self, model: nn.Module, items: Items) -> Tensor:
        """Return the tokens that the model writes, [N, L], from features to its own end."""
        return greedy(model, encode(model, items), self.writes, longest(model, items))

    def audio_seconds(self, items: Items) -> float:
        """Return how long the utterances last together, without the silence that fills Whisper's 30
        seconds.
        """
        return float(items.inputs["attention_mask"].sum()) / FRAMES

    def examples(self, model: nn.Module, items: Items) -> list[tuple[str, str]]:
        """Return the true words and those that the model writes, normalised."""
        with torch.no_grad():
            heard = self.writes.texts(self.transcribe(model, items))
        return list(zip(self.writes.texts(items.labels), heard, strict=True))


SPEECH_RECOGNITION = SpeechRecognition()


def tokens_and_features(directory: Path, what: str) -> tuple[Any, Any]:
    """Return the tokenizer and the feature extractor of a folder.

    Raises:
        ModelError: files that are missing or cannot be read.
    """
    from transformers import AutoFeatureExtractor, AutoTokenizer

    check_tokenizer(directory, what)
    if not (directory / "preprocessor_config.json").is_file():
        raise ModelError(
            f"{directory} has no preprocessor_config.json, which says what a speech model makes of sound"
        )
    tokenizer, features = load_from(
        directory, "tokenizer or feature extractor", AutoTokenizer, AutoFeatureExtractor
    )
    return tokenizer, features


def features(model: nn.Module, items: Items) -> Tensor:
    """Return the features in the type that the model computes in."""
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
    return items.inputs["input_features"].to(dtype)


def encode(model: nn.Module, items: Items) -> Tensor:
    """Return the encoder's output, [N, frames, width].

    Raises:
        RuntimeRefused: a model that only runs as a whole.

    """
    if not hasattr(model, "get_encoder"):
        raise RuntimeRefused(
            "speech is written token by token, and this runtime only runs a model as a whole"
        )
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    encoded: Tensor = encoder(features(model, items)).last_hidden_state
    return encoded


def longest(model: nn.Module, items: Items) -> int:
    """Return how many tokens may be written: twice as many as the longest transcript of the data has, within
    what the decoder can hold.

    A destroyed model repeats itself without an end; what it would write beyond counts as if it had stopped
    there.
    """
    config: Any = model.config
    return min(2 * items.labels.shape[1], int(config.max_target_positions) - PREFIX)


def greedy(model: nn.Module, encoded: Tensor, writing: Writing, most: int, *, stop: bool = True) -> Tensor:
    """Return the most likely tokens one after the other, [N, at most `most`], without prefix.

    After the end only end tokens.

    Without `stop` exactly `most` steps are done, ends or not.

    The same as `generate(num_beams=1, do_sample=False)` of transformers without its fallbacks; nothing is
    asked of the device between the steps but whether all are done.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    given = torch.tensor([writing.prefix], device=encoded.device).expand(len(encoded), -1)
    banned = torch.tensor(writing.suppressed, dtype=torch.long, device=encoded.device)
    first = torch.tensor(
        [*writing.suppressed, *writing.suppressed_first], dtype=torch.long, device=encoded.device
    )
    done = torch.zeros(len(encoded), dtype=torch.bool, device=encoded.device)
    written: list[Tensor] = []
    for step in range(most):
        logits = (
            model(encoder_outputs=(encoded,), decoder_input_ids=given, past_key_values=cache, use_cache=True)
            .logits[:, -1]
            .float()
        )
        logits = logits.nan_to_num(nan=-torch.inf).index_fill(1, banned if step else first, -torch.inf)
        token = torch.where(done, writing.end, logits.argmax(-1))
        written.append(token)
        done = done | (token == writing.end)
        given = token.unsqueeze(1)
        if stop and bool(done.all()):
            break
    return torch.stack(written, 1)
