"""What a model says, kept while it is scored, for the comparison in `workbench.measure.kl`: logits of a
classifier, and of a language model what its output head is given, from which logits are made piece by piece.
[items, L, vocabulary] never stands in memory.

Of a language model the answers are tokens, and many. Where all would make more than `LOGITS` logits, so many
positions are taken of each window, spread evenly over it, that every window still counts: windows differ more
than tokens of one do. What does not fit the stated bytes even so is left out from the end; items are in
random order, so the rest is a fair sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workbench.metrics.scores import Scores
from workbench.modules.offload import streaming
from workbench.tasks.base import Items, Kind
from workbench.tasks.likelihood import Unprojected, likelihoods
from workbench.util.device import free_fraction

HOST_BYTES = 256 * 2**20  # of outputs kept in a CPU's memory, of each of the two models
GPU_SHARE = 0.02  # of a GPU's memory, and of what is free of it, for the same
LOGITS = 2**26  # of one model of long labels, on a CPU: 1,365 tokens of a vocabulary of 49,152, some seconds
CUDA_LOGITS = 2**30  # the same on a GPU: 21,845 tokens, some tens of milliseconds


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
        """Return the rows to keep of a batch's logits or of what makes them: [N, width], or [N, P, width] for
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
        item = kept[:1]
        by_logits = self.items if kept.ndim == 2 else self.logits // (item.shape[1] * self.classes)
        return max(0, min(self.items, by_logits, self.budget // (item.numel() * item.element_size())))

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the labels of the answers that are kept: [N, P] of [N, L]."""
        return labels if self.places is None else labels.index_select(1, self.places.to(labels.device))


def spread(length: int, count: int) -> Tensor:
    """Return `count` of `length` positions, int64 [count], evenly spread: middles of as many equal parts."""
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
        """Keep a sampler's rows of some items, [items, ...], those that fit. index: of the items, int64
        [items] on the CPU.
        """
        if self.rows is None:
            count = self.sampler.room(kept)
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


def scored(kind: Kind, model: nn.Module, items: Items, outputs: Outputs, index: Tensor) -> Scores:
    """Return the scores of a batch, as `Choosing.score` gives them, from the forward pass of which the
    outputs are kept.

    The kind has a distribution; `index` int64 says which evaluation items these are.
    """
    with torch.no_grad(), streaming(model):
        logits: Tensor | Unprojected = kind.logits(model, items)
        outputs.keep(index, outputs.sampler(logits))
        return likelihoods(logits, items.labels)
