"""What kinds share whose every label is one of the model's classes or tokens: score by likelihood, train by
cross entropy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from workbench.kernels.losses import losses, losses_refused
from workbench.metrics.scores import Scores
from workbench.tasks.base import Items, Kind

CHUNK = 2**24  # logits made at a time: 64 MB in float32, enough rows for a matrix product at full speed
# Of which so many are reduced at a time: 4 MB, so that what is computed of them stays in a processor's cache
CACHED = 2**20
# Made and reduced at a time on a GPU, where few large kernels are quicker than many small ones: 0.4 GB with
# its float32 copy
CUDA_CHUNK = 2**26


@dataclass(frozen=True)
class Unprojected:
    """Logits [..., classes] that are not made yet: what the output head is to be given, `states` [...,
    width], and the head.
    """

    states: Tensor
    head: nn.Module
    classes: int

    def __getitem__(self, index: Any) -> Unprojected:
        """Return some of them; the last dimension cannot be sliced."""
        return replace(self, states=self.states[index])

    def chunks(self, rows: int) -> Iterator[Tensor]:
        """Iterate over the logits of consecutive rows, [at most `rows`, classes]."""
        for some in torch.split(self.states.reshape(-1, self.states.shape[-1]), rows):
            yield self.head(some)


class Choosing(Kind):
    """Base of such kinds: their `logits` are aligned with `items.labels`, [N, classes] or [N, L,
    vocabulary].
    """

    flips_by: ClassVar[str | None] = "answers"
    outputs: ClassVar[str] = "distributions"

    def score(self, model: nn.Module, items: Items) -> Scores:
        """Return the scores of `model` on items that lie on its device; see `likelihoods`."""
        return likelihoods(self.logits(model, items), items.labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the task's loss, what training and gradients are of: the mean cross entropy in nats, a
        float32 scalar, of logits [..., classes] and labels, int64 [...]. Labels of -100 are left out.
        """
        return masked_cross_entropy(logits, labels)

    def soft_loss(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return T^2 * KL(teacher || student at T) in float32, the mean over scored labels (Hinton, Vinyals &
        Dean 2015).
        """
        scored = labels != -100
        soft, wanted = (
            logits[scored].float().div(temperature).log_softmax(-1) for logits in (student, teacher)
        )
        return temperature**2 * F.kl_div(soft, wanted, log_target=True, reduction="batchmean")

    def together(self, answers: Tensor, temperature: float) -> Tensor:
        """Return logits whose softmax at a temperature is the mean of that of several teachers' logits,
        [teachers, ..., classes].
        """
        spread: Tensor = (
            answers.div(temperature).log_softmax(-1).logsumexp(0)
        )  # up to a constant, which a softmax does not see
        return temperature * spread


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy in float32. logits [..., classes]; labels [...], -100 is left out."""
    scored = labels != -100
    return cross_entropy(logits[scored].float(), labels[scored])


def likelihoods(logits: Tensor | Unprojected, labels: Tensor) -> Scores:
    """Return the scores of logits [N, classes] or [N, L, vocabulary] against labels [N] or [N, L].

    Log-likelihoods are computed in float32 whatever the model computes in, and averaged over an item's labels
    in float64. A destroyed model still gets a number: where the likelihood is not finite, the loss is inf and
    the answer counts as wrong.
    """
    return tally(*token_loss(logits, labels), labels)


def tally(loss: Tensor, answers: Tensor, labels: Tensor) -> Scores:
    """Return the scores of items from the loss and the answer of each label, as `token_loss` gives them: [N]
    or [N, L].
    """
    scored = labels != -100
    lost = torch.isposinf(loss) & scored
    correct = (answers == labels) & scored & ~lost
    dims = tuple(range(1, loss.ndim))  # the tokens of a window; none for classes
    weight = _sum(scored, dims)
    divisor = weight.clamp(min=1)
    return Scores(
        loss=(_sum(loss, dims) / divisor).cpu(),
        correct=(_sum(correct, dims) / divisor).cpu(),
        weight=weight.cpu(),
        answers=answers.cpu(),
    )


def token_loss(logits: Tensor | Unprojected, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss (nats, 0 where a label is -100, inf where not finite) and the answer of each label:
    both as `labels`.

    logits: [..., classes], labels: [...]. Reduced by chunks, so that no second copy of a large vocabulary's
    logits is made; logits that are not made yet are made by chunks too, and never stand in memory together.
    """
    target = labels.reshape(-1)
    classes = logits.classes if isinstance(logits, Unprojected) else logits.shape[-1]
    rows, few = (
        max(1, size // classes) for size in ((CUDA_CHUNK, CUDA_CHUNK) if labels.is_cuda else (CHUNK, CACHED))
    )
    chunks = (
        logits.chunks(rows)
        if isinstance(logits, Unprojected)
        else torch.split(logits.reshape(-1, classes), rows)
    )
    reductions = [
        reduced(some, wanted)
        for chunk, labelled in zip(chunks, torch.split(target, rows), strict=True)
        for some, wanted in zip(torch.split(chunk, few), torch.split(labelled, few), strict=True)
    ]
    loss = torch.cat([part[0] for part in reductions]).reshape(labels.shape)
    answers = torch.cat([part[1] for part in reductions]).reshape(labels.shape)
    return torch.where(torch.isfinite(loss), loss, torch.inf), answers


def reduced(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the answer of each row of logits [rows, classes].

    On a GPU by one kernel that reads them once.
    """
    if (
        logits.stride(-1) == 1
        and not logits.requires_grad
        and not losses_refused(logits.device, logits.dtype)
    ):
        return losses(logits, labels)
    return F.nll_loss(
        logits.log_softmax(-1, dtype=torch.float32), labels, ignore_index=-100, reduction="none"
    ), logits.argmax(-1)


def _sum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the float64 sum over `dims` (torch sums over everything when given no dims)."""
    return values.double().sum(dims) if dims else values.double()
