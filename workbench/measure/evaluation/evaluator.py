"""Scores of evaluation items, as many as are asked for: what was read before is not read again, and what is
known is not computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workbench.kernels.losses import LOSSES, losses_failed
from workbench.measure.evaluation.chunked_head import Head, find_head
from workbench.measure.evaluation.cuda_graphs import Graphs, Read
from workbench.measure.evaluation.fused_blocks import FUSED, FusedBlocks, fused_blocks
from workbench.measure.evaluation.length_sorting import in_place, ordered, text_spans, trimmed, trims
from workbench.measure.evaluation.outputs import Outputs, Sampler, scored
from workbench.measure.evaluation.prefix_reuse import KeptPrefix, Prefix
from workbench.metrics.scores import Scores
from workbench.modules.offload import streaming, streams_to
from workbench.tasks import score
from workbench.tasks.base import Items, Task
from workbench.tasks.likelihood import tally
from workbench.util.device import free_fraction
from workbench.util.fast_path import Refusals
from workbench.util.progress import Progress, no_progress

HOST_BYTES = 256 * 2**20  # of hidden states kept in a CPU's memory
GPU_SHARE = 0.05  # of a GPU's memory, and of what is free of it, for the same
# Of the blocks known: from there on starting in the middle is quicker than a graph of the whole model
PREFERRED = 0.6
SORTED = 16  # batches sorted by length together


@dataclass
class Evaluator:
    """Scores models on a task's evaluation items, which lie on the model's device.

    Holds what does not depend on the model that is scored.

    Dense and compressed models take the same way: logits of a large vocabulary are reduced piece by piece,
    padded texts are read in batches of like length, and blocks that are the dense model's own start from its
    hidden states, of which at most `budget` bytes are kept (None: 256 MB on a CPU, a twentieth of a GPU's
    memory). On a GPU, models whose weights alone changed are replayed as one graph, unless `graphs` is False
    (see `workbench.measure.evaluation.cuda_graphs`). Where a model does not allow one of these, which is
    tried once, it is run as it is. There too, norms, gated products and rotary embeddings are one kernel
    each, unless `fused` is False (see `workbench.measure.evaluation.fused_blocks`).
    """

    task: Task
    items: Items
    budget: int | None = None
    heads: dict[type[nn.Module], Head | None] = field(
        default_factory=dict
    )  # by class of model, None where it cannot be taken off
    spans: list[Tensor | None] = field(
        default_factory=list
    )  # one entry, when known: where texts begin and end, None to read them padded
    prefix: Prefix | None = None
    graphs: Graphs | bool = True
    fused: FusedBlocks | bool = True
    # The model that was read last, and its unchanged blocks
    last: tuple[weakref.ref[nn.Module], int] | None = None
    kept: Sampler | None = None  # which answers are compared as distributions
    refusals: Refusals = field(default_factory=Refusals)  # fast paths that this model does not allow

    @property
    def sampler(self) -> Sampler:
        """Return which answers' distributions are compared: the same of every model."""
        if self.kept is None:
            self.kept = Sampler.of(self.items)
        return self.kept

    def slower(self) -> tuple[str, ...]:
        """Return a sentence for each fast path that was switched off while models were scored."""
        if isinstance(self.fused, FusedBlocks):
            self.refusals.note(FUSED, self.fused.reason)
        if self.task.kind.outputs == "distributions":
            dtype = next(
                (
                    parameter.dtype
                    for parameter in self.task.model.parameters()
                    if parameter.is_floating_point()
                ),
                None,
            )
            device = self.items.labels.device
            self.refusals.note(LOSSES, "" if dtype is None else losses_failed(device, dtype))
        return self.refusals.words()

    def outputs(self) -> Outputs | None:
        """Return an empty place for a model's outputs, None for kinds without a distribution."""
        return None if self.task.kind.distribution is None else Outputs(self.sampler)

    def scores(
        self,
        model: nn.Module,
        parts: list[Scores],
        count: int,
        progress: Progress = no_progress,
        outputs: Outputs | None = None,
        *,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Scores:
        """Extend `parts` (scores of consecutive items, changed in place) to at least `count` items.

        Return the first `count`.

        What the model says of the items that are read now is kept in `outputs`; see `workbench.measure.kl`.
        `meanwhile` is called where a GPU has been given all batches and would only be waited for; elsewhere
        it is not.
        """
        done = sum(map(len, parts))
        with streaming(self.task.model), streaming(model):
            blocks = None if done >= count else self.blocks(model, again=done > 0)
            with self.replayed(model, blocks, again=done > 0) as replay:
                run = model if blocks is None or replay is not None else self.fuse(model)
                while done < count:
                    together = SORTED if self.text_spans() is not None or replay is not None else 1
                    upto = min(count, done + self.task.batch_size * together)
                    parts.append(
                        self.read(run, done, upto, blocks or 0, progress, outputs=outputs)
                        if replay is None
                        else self.replay(replay, done, upto, progress, outputs, meanwhile=meanwhile)
                    )
                    done = upto
        joined = Scores.join(parts)
        parts[:] = [joined]
        return joined.first(count)

    def read(
        self,
        model: nn.Module,
        start: int,
        stop: int,
        blocks: int,
        progress: Progress,
        *,
        outputs: Outputs | None = None,
    ) -> Scores:
        """Return the scores of the items from `start` to `stop`.

        The first `blocks` blocks are known to be the dense model's.
        """
        spans, batch_scores = self.text_spans(), list[Scores]()
        order = None if spans is None else ordered(spans, start, stop)
        for batch, items in self.batches(start, stop, spans, order):
            done = sum(map(len, batch_scores))
            progress("evaluate", start + done, len(self.items))
            batch_scores.append(
                self.score(
                    model, items, blocks, batch, outputs=outputs, index=places(start, order, done, len(items))
                )
            )
        joined = Scores.join(batch_scores)
        return joined if order is None else in_place(joined, order - start)

    @contextmanager
    def replayed(self, model: nn.Module, blocks: int | None, *, again: bool) -> Iterator[Read | None]:
        """Give what replays batches of a model as a graph, None where it is run as it is.

        `blocks` are known, None if nothing is read.
        """
        block_count = 0 if self.prefix is None or self.prefix.chain is None else len(self.prefix.chain.blocks)
        if (
            blocks is None
            or self.graphs is False
            or self.items.labels.device.type != "cuda"
            or (blocks and blocks >= PREFERRED * block_count)
        ):
            yield None
            return
        if self.graphs is True:
            self.graphs = Graphs(
                self.task.kind,
                self.task.model,
                self.task.batch_size,
                self.prepared,
                sampler=None if self.task.kind.distribution is None else self.sampler,
                refusals=self.refusals,
            )
        with self.graphs.loaded(model, again=again) as replay:
            yield replay

    @torch.no_grad()
    def replay(
        self,
        replay: Read,
        start: int,
        stop: int,
        progress: Progress,
        outputs: Outputs | None = None,
        *,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Scores:
        """Return the scores of the items from `start` to `stop`.

        Waits for the device once, at the end, after `meanwhile`.
        """
        spans, replayed = self.text_spans(), list[tuple[Tensor, Tensor]]()
        order = None if spans is None else ordered(spans, start, stop)
        for done, (_, items) in enumerate(self.batches(start, stop, spans, order)):
            progress("evaluate", start + done * self.task.batch_size, len(self.items))
            replayed.append(replay(items))
            if outputs is not None and isinstance(self.graphs, Graphs) and self.graphs.sampled is not None:
                outputs.keep(
                    places(start, order, done * self.task.batch_size, len(items)), self.graphs.sampled
                )
        loss, answers = (torch.cat([pair[part] for pair in replayed]) for part in (0, 1))
        labels = (
            self.items.labels[start:stop]
            if order is None
            else self.items.labels[order.to(self.items.labels.device)]
        )
        meanwhile()
        scores = tally(loss, answers, labels)
        return scores if order is None else in_place(scores, order - start)

    def batches(
        self, start: int, stop: int, spans: Tensor | None, order: Tensor | None
    ) -> Iterator[tuple[Hashable, Items]]:
        """Iterate over batches with what names each: the same name, the same inputs."""
        for first in range(start, stop, self.task.batch_size):
            last = min(stop, first + self.task.batch_size)
            if spans is None or order is None:
                yield (first, last), self.items[first:last]
            else:
                index = order[first - start : last - start]
                yield (
                    (start, stop, first),
                    trimmed(self.items[index.to(self.items.labels.device)], spans[index]),
                )

    def score(
        self,
        model: nn.Module,
        items: Items,
        blocks: int,
        batch: Hashable,
        *,
        outputs: Outputs | None = None,
        index: Tensor | None = None,
    ) -> Scores:
        """Return the scores of a model on one batch, of the items `index` (int64 [N])."""
        if self.prefix is None:
            return self.run(model, items, outputs, index)
        return self.prefix.score(
            model, blocks, batch, lambda substituted: self.run(substituted, items, outputs, index)
        )

    def run(
        self, model: nn.Module, items: Items, outputs: Outputs | None = None, index: Tensor | None = None
    ) -> Scores:
        """Return the scores of a model on one batch, with the output head taken off where that gives the
        same.
        """
        if outputs is None or index is None:
            return score(self.task.kind, self.headless(model), items)
        return scored(self.task.kind, self.headless(model), items, outputs, index)

    def head_of(self, model: nn.Module, rows: Tensor) -> nn.Module | None:
        """Return the module that makes logits of a model's kept outputs [..., width], None if these are
        logits.
        """
        head = self.heads.get(type(model))
        return None if head is None or rows.shape[-1] == head.classes else model.get_submodule(head.name)

    def prepared(self, model: nn.Module) -> nn.Module:
        """Return the module that is called for a model: itself, or with fused blocks and without its output
        head where that gives the same.
        """
        return self.headless(self.fuse(model))

    def headless(self, model: nn.Module) -> nn.Module:
        """Return a model without its output head where that gives the same, else itself."""
        head = self.head(type(model))
        return model if head is None else head.off(model)

    def fuse(self, model: nn.Module) -> nn.Module:
        """Return a language model with fused blocks on a GPU, else itself.

        Models that are streamed there or spread over several are run as they are.
        """
        if self.fused is True:
            resident = streams_to(self.task.model) is None and not hasattr(
                self.task.model, "spread_over"
            )  # their blocks are moved about by hooks
            self.fused = (
                fused_blocks(self.items.labels.device) if resident and self.task.kind.fused_blocks else None
            ) or False
            if isinstance(self.fused, FusedBlocks):
                self.fused.of(self.task.model)  # classes are tried on modules that nobody compressed
        return self.fused.of(model) if isinstance(self.fused, FusedBlocks) else model

    def head(self, make: type[nn.Module]) -> Head | None:
        """Return the output head of language models of a class, None where they must make their logits
        themselves.
        """
        if make not in self.heads:
            tried = self.task.kind.chunked_head and make is type(self.task.model)
            self.heads[make] = find_head(self.task.model, self.items, self.refusals) if tried else None
        return self.heads[make]

    def blocks(self, model: nn.Module, *, again: bool) -> int:
        """Return `unchanged_blocks`, looked for once while a model is read on: `again` says that some of its
        scores are there.
        """
        if not again or self.last is None or self.last[0]() is not model:
            self.last = weakref.ref(model), self.unchanged_blocks(model)
        return self.last[1]

    def unchanged_blocks(self, model: nn.Module) -> int:
        """Return how many of a model's first blocks, and all before them, are the dense model's own."""
        if self.prefix is None:
            kept = KeptPrefix(self.room() if self.budget is None else self.budget)
            self.prefix = Prefix(self.task.model, kept, refusals=self.refusals)
        return self.prefix.unchanged(model, self.run, self.items[:1])

    def room(self) -> int:
        """Return how many bytes of hidden states may be kept."""
        device = self.items.labels.device
        if device.type != "cuda":
            return HOST_BYTES
        return int(
            GPU_SHARE
            * min(1.0, 2 * free_fraction(device))
            * torch.cuda.get_device_properties(device).total_memory
        )

    def text_spans(self) -> Tensor | None:
        """Return where the text of each item begins and ends (int64 [N, 2]), None where items are read as
        they are.
        """
        if not self.spans:
            spans, task = text_spans(self.items), self.task
            cut = spans is not None and trims(task.kind, task.model, self.items, spans, self.refusals)
            self.spans.append(spans if cut else None)
        return self.spans[0]


def places(start: int, order: Tensor | None, done: int, count: int) -> Tensor:
    """Return which evaluation items a batch holds, int64 [count]: `done` items after `start` were read before
    it, in `order` if there is one.
    """
    return torch.arange(start + done, start + done + count) if order is None else order[done : done + count]
