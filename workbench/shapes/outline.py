"""A model as shapes: what its file holds and what it computes, without a weight being read.

Exact for dense weights, pruning and low rank. With a grid the size is an upper bound: codes that round to
zero can make the form with a mask smaller than what shapes alone promise. It assumes scales that fit float16,
as those of ordinary weights do. For an average of widths it is close: which layer gets which width depends on
values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from workbench.modules.checkpoint_types import checkpoint_types, narrower
from workbench.modules.expert_files import blocks_of_experts, fused_entries
from workbench.modules.input_quantizer import InputFormat
from workbench.modules.layer import Layer, find_layers, output_head
from workbench.modules.vocabulary import Vocabulary, vocabulary_of
from workbench.modules.weight_shapes import DTYPES, StoredTensor, Weight, file_length
from workbench.recipe import Step


@dataclass(frozen=True)
class Anatomy:
    """Where the dense model has units that may be taken out, and its lists of blocks.

    spaces: of a step, the places that it may cut, as the family of pruning describes them.
    blocks: the places of blocks that may go, by the name of their list.
    experts: of a sparsity, (mixture, how many of its experts stay) by the name of each block of experts, as
        the family of pruning describes them.
    """

    spaces: Callable[[Any], Any]
    blocks: Callable[[], dict[str, list[int]]]
    experts: Callable[[float], dict[str, tuple[Any, int]]] = lambda _: {}


@dataclass(frozen=True)
class Outline:
    """A model as shapes: the weights that methods can take, everything else, and the name of the output head.

    `positions` says how often each weight is applied to one item (tokens, or pixels of a convolution's
    output). `slack` are bytes that the header may take beyond what is known from shapes. `inputs` is how the
    inputs of products are rounded, None where they are not.
    """

    weights: tuple[Weight, ...]
    rest: tuple[StoredTensor, ...]
    head: str | None
    positions: dict[str, int] = dataclasses.field(default_factory=dict)
    slack: int = 0
    anatomy: Anatomy | None = None  # without it, what a structured step leaves is unknown
    inputs: InputFormat | None = None
    experts: dict[str, bool] = dataclasses.field(default_factory=dict)  # see `modules.expert_files`
    vocabulary: Vocabulary = dataclasses.field(default_factory=dict)  # layers whose rows are tokens

    @classmethod
    def of(
        cls,
        model: nn.Module,
        positions: dict[str, int] | None = None,
        anatomy: Anatomy | None = None,
        known: Iterable[Layer] | None = None,
    ) -> Outline:
        """Read the shapes of a model; `known` are its layers, where they have been found before."""
        layers = {
            name: layer
            for layer in (find_layers(model)[0].values() if known is None else known)
            for name in (layer.name, *layer.others)
        }
        weights, rest, types = [], [], checkpoint_types(model)
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for key, value in model.state_dict().items():
            mark = (value.data_ptr(), tuple(value.shape))
            if value.numel() and mark in seen:
                continue  # shares its storage with an earlier one: stored once
            seen.add(mark)
            layer = layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
            stored = narrower(value.dtype, types.get(key))
            if layer is None:
                size = value.numel() * stored.itemsize
                rest.append(StoredTensor(key, DTYPES[stored], tuple(value.shape), size))
            else:
                name, others = (
                    key.removesuffix(".weight"),
                    (layer.name, *layer.others) if layer.others else (),
                )
                weights.append(
                    Weight(
                        name,
                        layer.name,
                        tuple(value.shape),
                        *layer.shape,
                        value.dtype,
                        reserved=bool(layer.reserved),
                        table=layer.table,
                        others=others,
                        file_dtype=stored,
                    )
                )
        return cls(
            tuple(weights),
            tuple(rest),
            output_head(model),
            positions or {},
            anatomy=anatomy,
            experts=blocks_of_experts(model),
            vocabulary=vocabulary_of(model, layers.values()),
        )

    def takes(self, weight: Weight, step: Step) -> bool:
        """Return whether a step works on a weight (the output head stays dense unless it is named)."""
        return step.takes(
            weight.name, weight.origin, *weight.others, head=weight.origin == self.head or weight.reserved
        )

    def each(self, step: Step, change: Callable[[Weight, Any], list[Weight]]) -> Outline:
        """Return the outline in which each weight that a step works on is what `change` makes of it."""
        weights = (
            part
            for weight in self.weights
            for part in (change(weight, step) if self.takes(weight, step) else [weight])
        )
        return dataclasses.replace(self, weights=tuple(weights))

    def settled(self) -> Outline:
        """Return the outline in which what stood beside a weight, a bias or what rounds its inputs, has the
        name that it has once the layer is several modules: that of the last.
        """
        moved = {
            weight.origin: weight.name
            for weight in self.weights
            if weight.name != weight.origin and not weight.others
        }
        return dataclasses.replace(self, rest=tuple(moved_bias(entry, moved) for entry in self.rest))

    @property
    def group_size(self) -> int:
        """Return how many inputs share a scale in the first weight on a grid; 0 for one scale a row, or no
        grid.
        """
        gridded = next((weight for weight in self.weights if weight.groups > 1), None)
        return 0 if gridded is None else gridded.columns // gridded.groups

    def entries(self) -> list[StoredTensor]:
        """Return the tensors that are stored."""
        found = [*self.rest, *(entry for weight in self.weights for entry in weight.encoded())]
        return fused_entries(found, self.experts) if self.experts else found

    def file_bytes(self) -> int:
        """Return the bytes of the safetensors file."""
        return file_length(self.entries()) + self.slack

    def exact(self) -> bool:
        """Return whether `file_bytes` is exact.

        Else it is an upper bound (a close estimate where a budget is divided over the layers by their
        values).
        """
        return not self.slack and not any(weight.bits or weight.estimated for weight in self.weights)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of all weights for one item, zeros included, as every kernel of this
        version does.

        A table costs none. Factors in front of a stride are counted as if they came after it: a lower bound
        for those.
        """
        return sum(
            weight.count * self.positions.get(weight.origin, 1) for weight in self.weights if not weight.table
        )


BESIDE = ("bias", "smooth", "input_scale", "input_zero")  # what may stand beside a weight in its module


def moved_bias(entry: StoredTensor, moved: dict[str, str]) -> StoredTensor:
    """Return an entry beside a weight under the name of the module that holds it now."""
    owner, _, last = entry.name.rpartition(".")
    return (
        dataclasses.replace(entry, name=f"{moved[owner]}.{last}")
        if last in BESIDE and owner in moved
        else entry
    )
