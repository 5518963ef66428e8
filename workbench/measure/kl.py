"""KL divergence of a compressed model's answers from the dense model's: how far the distributions moved, also
where no answer flipped.

KL(dense || compressed) = sum over classes of p log(p / q), in nats, for every scored answer; the mean over
items weighted by answers. Equal accuracy hides changes that this shows ("Accuracy is not all you need", Dutta
et al. 2024). Both models' outputs are kept while items are scored (`workbench.measure.evaluation.outputs`),
so that nothing is run twice; logits are made of them piece by piece at the end. A point says how many items
and answers its value is of. Of a point that stopped early the divergences of its items are kept, a number
each, so that one that goes on is of all items as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workbench.calibration.statistics import Statistics
from workbench.errors import DataError
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.measure.evaluation.outputs import Outputs
from workbench.metrics.estimate import Estimate
from workbench.metrics.intervals import mean
from workbench.metrics.scores import Scores
from workbench.modules.offload import streaming
from workbench.util.progress import Progress, no_progress

WHAT = "KL to the dense model"  # as `missing` and progress name it
CHUNK = 2**22  # logits compared at a time
CUDA_CHUNK = 2**26


@dataclass(frozen=True)
class Each:
    """The divergence of single items, on the CPU: which they are (int64 [n], growing), the mean over each
    one's answers in nats and their number (float64 [n]).
    """

    index: Tensor
    kl: Tensor
    answers: Tensor

    def joined(self, earlier: Each | None) -> Each:
        """Return these items and those of `earlier` that are not among them, in order."""
        if earlier is None:
            return self
        others = ~torch.isin(earlier.index, self.index)
        index, kl, answers = (
            torch.cat([old[others], new])
            for old, new in (
                (earlier.index, self.index),
                (earlier.kl, self.kl),
                (earlier.answers, self.answers),
            )
        )
        order = index.argsort()
        return Each(index[order], kl[order], answers[order])


@dataclass(frozen=True)
class Divergence:
    """KL(dense || compressed) in nats an answer: its mean with an interval, of how many items and answers,
    and of each item.
    """

    kl: Estimate
    items: int
    answers: int
    each: Each = field(compare=False, repr=False)


@dataclass
class Reference:
    """The dense model's scores, and its outputs: kept while it is scored, then within the budget of what is
    computed once.

    Mutable.

    Where they had to be thrown out, the dense model reads the items again.
    """

    evaluator: Evaluator
    statistics: Statistics
    live: Outputs | None = None
    handed: bool = False

    def scores(self, count: int, progress: Progress = no_progress) -> Scores:
        """Return the dense model's scores on the first `count` evaluation items, computed once."""
        kept: list[Scores] = self.statistics.once("dense scores", list)
        return self.evaluator.scores(self.evaluator.task.model, kept, count, progress, self.reading())

    def all_scores(self) -> Scores | None:
        """Return the dense model's scores on all evaluation items, if they have been read.

        Nothing is computed.
        """
        kept: list[Scores] = self.statistics.once("dense scores", list)
        return kept[0] if kept and len(kept[0]) == len(self.evaluator.items) else None

    def reading(self) -> Outputs | None:
        """Return where its outputs are put while it is scored.

        None where nobody needs them, or they are known.
        """
        if self.live is None and not self.handed:
            self.live = self.evaluator.outputs()
        return self.live

    def outputs(self, count: int, progress: Progress) -> Outputs:
        """Return its outputs for the first `count` evaluation items."""
        live, whole = self.reading(), len(self.evaluator.items)
        if live is not None and count < whole and not live.covers(whole):
            return live if live.covers(count) else self.again(count, progress)
        rows_and_read = self.statistics.once("dense outputs", lambda: self.hand_over(progress))
        return Outputs(self.evaluator.sampler, *rows_and_read)

    def hand_over(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Return rows and which were read, of all items, no longer held here."""
        whole = len(self.evaluator.items)
        outputs = (
            self.live if self.live is not None and self.live.covers(whole) else self.again(whole, progress)
        )
        self.live, self.handed = None, True
        assert outputs.rows is not None  # noqa: S101  for the type checker: it covers all items
        return outputs.rows, outputs.read

    def again(self, count: int, progress: Progress) -> Outputs:
        """Return its outputs of the first `count` items, read now."""
        outputs = Outputs(self.evaluator.sampler)
        self.evaluator.scores(self.evaluator.task.model, [], count, progress, outputs)
        return outputs


def divergence(
    evaluator: Evaluator,
    reference: Reference,
    model: nn.Module,
    mine: Outputs,
    count: int,
    *,
    level: float,
    same: bool = False,
    earlier: Each | None = None,
    progress: Progress = no_progress,
) -> Divergence:
    """Return how far a model's distributions are from the dense model's, on the first `count` items as far as
    both are kept.

    Args:
        evaluator: that both were scored with.
        reference: the dense model's outputs.
        model: the compressed model.
        mine: its outputs.
        count: evaluation items that were read.
        level: of the interval: Student's t on the items' means weighted by answers, no lower end below 0.
        same: the model is the dense one, read in batches of its own: 0, without the rounding.
        earlier: of items that the same model read before, whose outputs are gone.
        progress: told, and may stop it.

    Raises:
        DataError: of fewer than two items it is known or outputs are kept.
    """
    dense = reference.outputs(count, progress)
    upto = min(count, len(dense.read), len(mine.read))
    both = torch.nonzero(dense.read[:upto] & mine.read[:upto]).flatten()
    labels = evaluator.sampler.of_labels(evaluator.items.labels)[both.to(evaluator.items.labels.device)]
    mask = (labels != -100).cpu().reshape(len(both), math.prod(labels.shape[1:]))
    kl = torch.zeros(mask.shape, dtype=torch.float64)
    if len(both) and not same and dense.rows is not None and mine.rows is not None:
        with torch.no_grad(), streaming(evaluator.task.model), streaming(model):
            sides = [
                (rows, evaluator.head_of(side_model, rows))
                for rows, side_model in ((dense.rows, evaluator.task.model), (mine.rows, model))
            ]
            chunks = list(pieces(sides[0], sides[1], both, evaluator.sampler.classes, progress))
        kl = torch.cat(chunks).cpu().reshape(mask.shape)
    weight = mask.double().sum(1)
    each = Each(both, torch.where(mask, kl, 0.0).sum(1) / weight.clamp(min=1), weight).joined(earlier)
    if len(each.index) < 2:
        raise DataError(
            f"outputs of {len(each.index)} of {count} items are kept within {evaluator.sampler.budget:,}"
            " bytes: an interval needs at least 2"
        )
    estimate = Estimate(0.0, 0.0, 0.0) if same else mean(each.kl, each.answers, level).within(0.0)
    return Divergence(estimate, len(each.index), int(each.answers.sum()), each)


def pieces(
    dense: tuple[Tensor, nn.Module | None],
    mine: tuple[Tensor, nn.Module | None],
    index: Tensor,
    classes: int,
    progress: Progress,
) -> Iterator[Tensor]:
    """Iterate over the divergences of the answers of the items in `index`, in order: float64 [answers of some
    items].
    """
    rows = dense[0]
    each = math.prod(rows.shape[1:-1])
    step = max(1, (CUDA_CHUNK if rows.is_cuda else CHUNK) // (classes * each))
    for start in range(0, len(index), step):
        progress(WHAT, start, len(index))
        some = index[start : start + step].to(rows.device)
        before, after = (kept[some].flatten(0, -2) for kept, _ in (dense, mine))
        cut = max(1, (CUDA_CHUNK if rows.is_cuda else CHUNK) // classes)
        for old, new in zip(before.split(cut), after.split(cut), strict=True):
            yield kl_of_logits(
                old if dense[1] is None else dense[1](old), new if mine[1] is None else mine[1](new)
            )


def kl_of_logits(dense: Tensor, compressed: Tensor) -> Tensor:
    """Return KL(softmax(dense) || softmax(compressed)) of each row, both [n, classes]: float64 [n], inf where
    a model says nothing finite.

    Computed as the sum of p log(p / q) - p + q, whose terms are never negative: rounding of one does not
    swamp the others. In float32: right to about 1e-7 nats a row. Equal logits give exactly 0.
    """
    before, after = (logits.log_softmax(-1, dtype=torch.float32) for logits in (dense, compressed))
    p, q = before.exp(), after.exp()
    ratio = before.sub_(after)
    terms = torch.where(p > 0, p * ratio, 0.0).sub_(p).add_(q)
    total = terms.sum(-1, dtype=torch.float64)
    broken = ~torch.isfinite(total)
    return torch.where(broken, torch.inf, total.clamp(min=0))
