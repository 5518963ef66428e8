"""What one model did on some items, item by item: what every metric is computed from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What one model did on some items; tensors on the CPU, first dimension = item.

    `loss` [N] float64: mean negative log-likelihood of the item's labels, in nats. `correct` [N] float64:
    fraction of the item's labels that were the most likely answer. `weight` [N] float64: number of labels (1,
    or tokens of a window). `answers` [N] or [N, L] int64: the most likely class or token, or a hash of a
    transcript, so that flips can be counted. `details` [N] float64 by name: what a kind's own metric is made
    of (`cosine` and `score`; `word errors` and `words`).
    """

    loss: Tensor
    correct: Tensor
    weight: Tensor
    answers: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.loss)

    @staticmethod
    def join(parts: list[Scores]) -> Scores:
        """Return consecutive parts as one."""
        loss, correct, weight, answers = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("loss", "correct", "weight", "answers")
        )
        return Scores(
            loss,
            correct,
            weight,
            answers,
            {name: torch.cat([part.details[name] for part in parts]) for name in parts[0].details},
        )

    def first(self, count: int) -> Scores:
        """Return the scores of the first `count` items."""
        details = {name: values[:count] for name, values in self.details.items()}
        return Scores(
            self.loss[:count], self.correct[:count], self.weight[:count], self.answers[:count], details
        )
