"""Speech recognition by connectionist temporal classification (Graves et al. 2006): one letter or blank for
every frame of sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import ModelError
from workbench.metrics.scores import Scores
from workbench.tasks.audio import RATE
from workbench.tasks.base import Items
from workbench.tasks.columns import Raw
from workbench.tasks.items import ItemCounts, Pools, Reading
from workbench.tasks.speech_recognition import SpeechRecognition, tokens_and_features
from workbench.tasks.transcripts import Writing, spoken_scores
from workbench.tasks.utterances import Frames, speech_pools
from workbench.util.library_internals import frames_of

NEVER = -1e4  # a logit


@dataclass(frozen=True)
class FrameRecognition(SpeechRecognition):
    """Models such as wav2vec 2.0.

    Answers are the most likely letter of each frame, repeats merged, without a language model.

    Characters that the model cannot write count as errors in what is wanted.
    """

    name = "speech recognition (CTC)"
    auto_class = "AutoModelForCTC"
    architectures = ("ForCTC",)

    def why_not(self, config: Mapping[str, Any]) -> str:  # noqa: ARG002
        """Return "": how a model hears is checked where its feature extractor is read."""
        return ""

    def processor(self, directory: Path, config: Mapping[str, Any]) -> Writing:
        """Return how a model hears and writes: its feature extractor, its tokenizer and its blank."""
        tokenizer, features = tokens_and_features(directory, self.name)
        if features.model_input_names[0] != "input_values" or features.sampling_rate != RATE:
            raise ModelError(
                f"{directory} reads {features.model_input_names[0]} at {features.sampling_rate} Hz; of CTC"
                f" models only those that read the wave at {RATE} Hz are built"
            )
        return Writing(tokenizer, features, end=int(config.get("pad_token_id") or 0))

    def pools(self, reading: Reading, raw: Raw, sizes: ItemCounts) -> Pools:  # noqa: ARG002
        """Return utterances, one item a row."""
        return speech_pools(raw, sizes, self.writes, lambda some: Frames.of(some, self.writes))

    def logits(self, model: nn.Module, items: Items) -> Tensor:
        """Return [N, frames, letters] for `input_values` [N, samples].

        Frames beyond an utterance's end are blank for certain.
        """
        dtype = next(
            (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32
        )
        mask, blank = items.inputs["attention_mask"], self.writes.end
        told = (
            {"attention_mask": mask} if getattr(self.writes.features, "return_attention_mask", False) else {}
        )
        logits: Tensor = model(input_values=items.inputs["input_values"].to(dtype), **told).logits
        frames = frames_of(model, mask.sum(1)).unsqueeze(1)  # [N, 1]
        beyond = torch.arange(logits.shape[1], device=logits.device) >= frames  # [N, frames]
        silent = torch.full_like(logits[0, 0], NEVER)
        silent[blank] = 0.0
        return torch.where(beyond.unsqueeze(-1), silent, logits)

    def score(self, model: nn.Module, items: Items) -> Scores:
        """Return word errors, and the loss of each utterance per letter."""
        logits = self.logits(model, items)
        count = (items.labels != -100).sum(1)
        loss = self.each_loss(logits, items.labels) / count
        loss = torch.where(torch.isfinite(loss), loss, torch.inf)
        return spoken_scores(
            self.writes.texts(items.labels), self.writes.texts(self.merged(logits)), loss, count
        )

    def run(self, model: nn.Module, items: Items) -> Tensor:
        """Return the letters that the model writes, as `transcribe`: it takes the same time whatever is
        heard.
        """
        return self.transcribe(model, items)

    def transcribe(self, model: nn.Module, items: Items) -> Tensor:
        """Return the letters that the model writes, [N, frames], -1 where there is none."""
        return self.merged(self.logits(model, items))

    def merged(self, logits: Tensor) -> Tensor:
        """Return the most likely letter of each frame, int64 [items, frames], -1 for blanks and repeats."""
        best = logits.argmax(-1)
        again = F.pad(best[:, 1:] == best[:, :-1], (1, 0))
        return torch.where(again | (best == self.writes.end), -1, best)

    def each_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood of each utterance, nats, [N].

        0 where it has more letters than frames.
        """
        chances = logits.float().log_softmax(-1).transpose(0, 1)  # [frames, N, letters]
        frames = torch.full((len(labels),), logits.shape[1], dtype=torch.long)
        counts = (labels != -100).sum(1)
        return F.ctc_loss(
            chances,
            labels.clamp(min=0),
            frames,
            counts.cpu(),
            blank=self.writes.end,
            reduction="none",
            zero_infinity=True,
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean negative log-likelihood per letter in nats, a scalar. labels: int64 [items,
        letters], -100 where there is none.
        """
        return self.each_loss(logits, labels).sum() / (labels != -100).sum()

    # Frames have no labels of their own
    def soft_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,  # noqa: ARG002
        temperature: float,
    ) -> Tensor:
        """Return T^2 * KL(teacher || student at T) in nats, the mean over all frames, of logits [items,
        frames, letters].
        """
        soft, wanted = (
            logits.float().flatten(0, 1).div(temperature).log_softmax(-1) for logits in (student, teacher)
        )
        return temperature**2 * F.kl_div(soft, wanted, log_target=True, reduction="batchmean")

    def audio_seconds(self, items: Items) -> float:
        """Return how long the utterances last together."""
        return float(items.inputs["attention_mask"].sum()) / RATE


FRAME_RECOGNITION = FrameRecognition()
