"""Layers before the first changed one are not computed again: hidden states of the dense model, kept for
evaluation items.

Which blocks may be left out: `workbench.measure.evaluation.block_chain`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor, nn

from workbench.measure.evaluation.block_chain import Chain, Score, find_chain
from workbench.metrics.scores import Scores
from workbench.modules.substitution import Keeps, with_stand_ins
from workbench.tasks.base import Items
from workbench.util.fast_path import Refusals


@dataclass
class KeptPrefix:
    """Hidden states after some blocks for batches of evaluation items, at most `budget` bytes; mutable.

    What another block returned gives way to what is kept now; the states of one block never push out each
    other.
    """

    budget: int
    states: dict[tuple[Hashable, int], Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(tensor.nbytes for tensor in list(self.states.values()))

    def nearest(self, batch: Hashable, count: int) -> tuple[int, Tensor | None]:
        """Return the largest number of blocks, at most `count`, whose states for this batch are held, and
        these; 0 and None if none are.
        """
        held = [
            (blocks, states)
            for (kept, blocks), states in list(self.states.items())
            if kept == batch and blocks <= count
        ]
        return max(held, key=lambda entry: entry[0], default=(0, None))

    def put(self, batch: Hashable, count: int, states: Tensor) -> None:
        """Keep states if there is room, or room can be made."""
        held = self.nbytes
        for key, kept_states in list(self.states.items()):
            if held + states.nbytes <= self.budget:
                break
            if key[1] != count and self.states.pop(key, None) is not None:
                held -= kept_states.nbytes
        if held + states.nbytes <= self.budget:
            self.states[batch, count] = states


@dataclass
class Prefix:
    """Runs models from their first changed block on, for one dense model.

    Finds its blocks when they are first needed; mutable.
    """

    dense: nn.Module
    kept: KeptPrefix
    chain: Chain | None = None
    looked: bool = False
    refusals: Refusals = field(default_factory=Refusals)

    def unchanged(self, model: nn.Module, score: Score, items: Items) -> int:
        """Return how many of a model's first blocks are the dense model's own.

        0 if nothing can be left out.
        """
        if model is self.dense or (not self.looked and not may_share(self.dense, model)):
            return 0
        if not self.looked:
            self.chain, self.looked = find_chain(self.dense, score, items, self.refusals), True
        return 0 if self.chain is None else self.chain.unchanged(self.dense, model)

    def score(
        self, model: nn.Module, count: int, batch: Hashable, score: Callable[[nn.Module], Scores]
    ) -> Scores:
        """Return `score(model)` for a batch, computed from what is held of its first `count` blocks.

        Keep the states after them.
        """
        if not count or self.chain is None:
            return score(model)
        start, states = self.kept.nearest(batch, count)
        places = {} if states is None else self.chain.upto(model, start, states)
        last = self.chain.blocks[count - 1]
        keeps = Keeps(model.get_submodule(last)) if start < count else None
        if keeps is not None:
            places[last] = keeps
        scores = score(with_stand_ins(model, places))
        if keeps is not None and keeps.states is not None:
            self.kept.put(batch, count, keeps.states)
        return scores


def may_share(dense: nn.Module, model: nn.Module) -> bool:
    """Return whether the first of some list's members has the dense model's own parameters: else there is no
    prefix to look for.
    """
    others = dict(model.named_modules())
    for name, module in dense.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            first, counterpart = next(iter(module)), others.get(f"{name}.0".removeprefix("."))
            pairs = zip(
                first.parameters(), () if counterpart is None else counterpart.parameters(), strict=False
            )
            if counterpart is not None and all(own is theirs for own, theirs in pairs):
                return True
    return False
