"""KL divergence of a compressed model's answers from the dense model's: how far the distributions moved, also
where no answer flipped.

KL(dense || compressed) = sum over classes of p log(p / q), in nats, for every scored answer; the mean over
items weighted by answers. Equal accuracy hides changes that this shows ("Accuracy is not all you need", Dutta
et al. 2024). Both models' outputs are kept while items are scored, so that nothing is run twice: logits of a
classifier, and of a language model what its output head is given, from which logits are made piece by piece
at the end. [items, L, vocabulary] never stands in memory.

Of a language model the answers are tokens, and many. Where all would make more than `LOGITS` logits, so many
positions are taken of each window, spread evenly over it, that every window still counts: windows differ more
than tokens of one do. What does not fit the stated bytes even so is left out from the end; items are in
random order, so the rest is a fair sample. A point says how many items and answers its value is of. Of a
point that stopped early the divergences of its items are kept, a number each, so that one that goes on is of
all items as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.errors import DataError
from workbench.metrics.estimate import Estimate
from workbench.metrics.intervals import mean
from workbench.metrics.scores import Scores
from workbench.modules.layer import Progress, no_progress
from workbench.modules.offload import streaming
from workbench.tasks.base import Items, Kind
from workbench.tasks.likelihood import Choosing, Unprojected, likelihoods
from workbench.util.device import free_fraction

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics
    from workbench.measure.evaluator import Evaluator

WHAT = "KL to the dense model"  # as `missing` and progress name it
HOST_BYTES = 256 * 2**20  # of outputs kept in a CPU's memory, of each of the two models
GPU_SHARE = 0.02  # of a GPU's memory, and of what is free of it, for the same
LOGITS = 2**26  # of one model of long labels, on a CPU: 1,365 tokens of a vocabulary of 49,152, some seconds
CUDA_LOGITS = 2**30  # the same on a GPU: 21,845 tokens, some tens of milliseconds
CHUNK = 2**22  # logits compared at a time
CUDA_CHUNK = 2**26


@dataclass
class Sampler:
    """Which answers of each item are kept: positions, spread evenly, fixed by what it is given first.

    Mutable.

    `items` is how many items there are, `budget` the bytes of outputs that may be kept of one model, `logits`
    how many of them may be made.
    """

    items: int
    budget: int
    logits: int
    places: Tensor | None = None  # int64 [P], None until they are known, and for one answer an item
    classes: int = 0

    @staticmethod
    def of(items: Items) -> Sampler:
        """Return the one for evaluation items, which lie on the model's device."""
        device = items.labels.device
        if device.type != "cuda":
            return Sampler(len(items), HOST_BYTES, LOGITS)
        room = (
            GPU_SHARE
            * min(1.0, 2 * free_fraction(device))
            * torch.cuda.get_device_properties(device).total_memory
        )
        return Sampler(len(items), int(room), CUDA_LOGITS)

    def __call__(self, logits: Tensor | Unprojected) -> Tensor:
        """Return what is kept of a batch's logits or of what makes them: [N, width], or [N, P, width] for
        labels [N, L].
        """
        states = logits.states if isinstance(logits, Unprojected) else logits
        self.classes = logits.classes if isinstance(logits, Unprojected) else logits.shape[-1]
        if states.ndim == 2:
            return states
        if self.places is None:
            self.places = spread(states.shape[1], self.most(states)).to(states.device)
        return states if len(self.places) == states.shape[1] else states.index_select(1, self.places)

    def most(self, states: Tensor) -> int:
        """Return how many answers of each item are taken, states [N, L, width]."""
        held = self.budget // (self.items * states.shape[-1] * states.element_size())
        return max(1, min(states.shape[1], self.logits // (self.items * self.classes), held))

    def room(self, kept: Tensor) -> int:
        """Return of how many items what is kept fits."""
        one = kept[:1]
        made = self.items if kept.ndim == 2 else self.logits // (one.shape[1] * self.classes)
        return max(0, min(self.items, made, self.budget // (one.numel() * one.element_size())))

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the labels of the answers that are kept: [N, P] of [N, L]."""
        return labels if self.places is None else labels.index_select(1, self.places.to(labels.device))


def spread(length: int, count: int) -> Tensor:
    """Return `count` of `length` positions, evenly spread: the middles of as many equal parts."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * length / count).long()


@dataclass
class Outputs:
    """What one model says of the first evaluation items, kept while they are scored; mutable.

    `rows` [items, (P,) width].
    """

    sampler: Sampler
    rows: Tensor | None = None
    read: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.bool)
    )  # of which items, on the CPU

    def keep(self, index: Tensor, kept: Tensor) -> None:
        """Keep what a sampler made of some items (int64, on the CPU), those that fit."""
        if self.rows is None:
            count = self.sampler.room(kept)
            with torch.inference_mode(mode=False):  # what is kept may be moved to and fro outside
                self.rows = torch.empty((count, *kept.shape[1:]), dtype=kept.dtype, device=kept.device)
            self.read = torch.zeros(count, dtype=torch.bool)
        fits = torch.nonzero(index < len(self.rows)).flatten()
        if not len(fits):
            return
        places, first = index[fits], int(index[0])
        if torch.equal(places, torch.arange(first, first + len(fits))):  # no index need go to the device
            self.rows[first : first + len(fits)] = kept[: len(fits)]
        else:
            self.rows[places.to(kept.device)] = kept[fits.to(kept.device)]
        self.read[places] = True

    def covers(self, count: int) -> bool:
        """Return whether all of the first `count` items are here that can be."""
        return self.rows is not None and bool(self.read[:count].all())


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
        parts: list[Scores] = self.statistics.once("dense scores", list)
        return self.evaluator.scores(self.evaluator.task.model, parts, count, progress, self.reading())

    def all_scores(self) -> Scores | None:
        """Return the dense model's scores on all evaluation items, if they have been read.

        Nothing is computed.
        """
        parts: list[Scores] = self.statistics.once("dense scores", list)
        return parts[0] if parts and len(parts[0]) == len(self.evaluator.items) else None

    def reading(self) -> Outputs | None:
        """Return where its outputs are put while it is scored.

        None where nobody needs them, or they are known.
        """
        if self.live is None and not self.handed:
            self.live = self.evaluator.outputs()
        return self.live

    def outputs(self, count: int, progress: Progress) -> Outputs:
        """Return what it says of the first `count` evaluation items."""
        live, whole = self.reading(), len(self.evaluator.items)
        if live is not None and count < whole and not live.covers(whole):
            return live if live.covers(count) else self.again(count, progress)
        made = self.statistics.once("dense outputs", lambda: self.hand_over(progress))
        return Outputs(self.evaluator.sampler, *made)

    def hand_over(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Return rows and which were read, of all items, no longer held here."""
        whole = len(self.evaluator.items)
        found = (
            self.live if self.live is not None and self.live.covers(whole) else self.again(whole, progress)
        )
        self.live, self.handed = None, True
        assert found.rows is not None  # noqa: S101  for the type checker: it covers all items
        return found.rows, found.read

    def again(self, count: int, progress: Progress) -> Outputs:
        """Return its outputs of the first `count` items, read now."""
        found = Outputs(self.evaluator.sampler)
        self.evaluator.scores(self.evaluator.task.model, [], count, progress, found)
        return found


def has_distribution(kind: Kind) -> bool:
    """Return whether every answer of a kind is one of the model's classes or tokens, with a probability for
    each.
    """
    return isinstance(kind, Choosing) and type(kind).score is Choosing.score


def scored(kind: Kind, model: nn.Module, items: Items, outputs: Outputs, index: Tensor) -> Scores:
    """Return the scores of a batch, as `Choosing.score` gives them, from the forward pass of which the
    outputs are kept.

    The kind has a distribution; `index` int64 says which evaluation items these are.
    """
    with torch.inference_mode(), streaming(model):
        logits: Tensor | Unprojected = kind.logits(model, items)
        outputs.keep(index, outputs.sampler(logits))
        return likelihoods(logits, items.labels)


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
        with torch.inference_mode(), streaming(evaluator.task.model), streaming(model):
            sides = [
                (rows, evaluator.head_of(other, rows))
                for rows, other in ((dense.rows, evaluator.task.model), (mine.rows, model))
            ]
            parts = list(pieces(sides[0], sides[1], both, evaluator.sampler.classes, progress))
        kl = torch.cat(parts).cpu().reshape(mask.shape)
    weight = mask.double().sum(1)
    each = Each(both, torch.where(mask, kl, 0.0).sum(1) / weight.clamp(min=1), weight).joined(earlier)
    if len(each.index) < 2:
        raise DataError(
            f"outputs of {len(each.index)} of {count} items are kept within {evaluator.sampler.budget:,}"
            " bytes: an interval needs at least 2"
        )
    found = Estimate(0.0, 0.0, 0.0) if same else mean(each.kl, each.answers, level).within(0.0)
    return Divergence(found, len(each.index), int(each.answers.sum()), each)


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


def kl_of_logits(dense: Tensor, other: Tensor) -> Tensor:
    """Return KL(softmax(dense) || softmax(other)) of each row, both [n, classes]: float64 [n], inf where a
    model says nothing finite.

    Computed as the sum of p log(p / q) - p + q, whose terms are never negative: rounding of one does not
    swamp the others. In float32: right to about 1e-7 nats a row. Equal logits give exactly 0.
    """
    before, after = (logits.log_softmax(-1, dtype=torch.float32) for logits in (dense, other))
    p, q = before.exp(), after.exp()
    ratio = before.sub_(after)
    terms = torch.where(p > 0, p * ratio, 0.0).sub_(p).add_(q)
    total = terms.sum(-1, dtype=torch.float64)
    broken = ~torch.isfinite(total)
    return torch.where(broken, torch.inf, total.clamp(min=0))
