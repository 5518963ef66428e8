"""Experts in files: what is stored as it is goes under the names that transformers gives fused experts, so
that it opens such a file; what is packed has names of its own.

Blocks are given by name, with whether the fused ones store their matrices as [inputs, outputs].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from workbench.modules.experts import FIRST, LAST, expert_of, experts_in
from workbench.modules.weight_shapes import StoredTensor

LAYERS = (*FIRST, LAST)
FUSED = {f"{layer}.weight": layer for layer in LAYERS} | {
    f"{layer}.bias": f"{layer}_bias" for layer in LAYERS
}
FUSED |= {"weight": "weight"}  # of experts that are one product each
SEPARATE = {fused: part for part, fused in FUSED.items()}


def blocks_of_experts(model: nn.Module) -> dict[str, bool]:
    """Return a model's blocks of separate experts, and whether fused ones are stored the other way round."""
    return {name: block.turned for name, block in experts_in(model).items()}


def fusible(about: Mapping[str, object], blocks: Mapping[str, bool]) -> dict[str, list[str]]:
    """Return the names of the tensors that go into one, in order, by the name of that: where every expert of
    a block has one, stored as it is, and all are alike. `about` says by name what has to be alike.
    """
    groups: dict[tuple[str, str], dict[int, str]] = {}
    places: dict[str, set[int]] = {}
    for name in about if blocks else ():
        block, _, rest = expert_of(name, blocks)
        place, _, part = rest.partition(".")
        if place.isdigit():
            places.setdefault(block, set()).add(int(place))
            groups.setdefault((block, part), {})[int(place)] = name
    return {
        f"{block}.{FUSED[part]}": [members[place] for place in sorted(members)]
        for (block, part), members in groups.items()
        if part in FUSED
        and members.keys() == places[block]
        and len({about[name] for name in members.values()}) == 1
    }


def turns(name: str, blocks: Mapping[str, bool]) -> bool:
    """Return whether a fused tensor of this name holds matrices as [inputs, outputs]."""
    return not name.endswith("_bias") and blocks[name.rpartition(".")[0]]


def fused_tensors(tensors: Mapping[str, Tensor], blocks: Mapping[str, bool]) -> dict[str, Tensor]:
    """Return tensors to store, those of experts that are stored as they are in one for each layer."""
    alike = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    groups = fusible(alike, blocks)
    made = {
        name: torch.stack([tensors[one].t() if turns(name, blocks) else tensors[one] for one in members])
        for name, members in groups.items()
    }
    gone = {one for members in groups.values() for one in members}
    return {name: tensor for name, tensor in tensors.items() if name not in gone} | made


def fused_entries(entries: Iterable[StoredTensor], blocks: Mapping[str, bool]) -> list[StoredTensor]:
    """Return what `fused_tensors` does, of tensors that are known by their shapes."""
    known = {entry.name: entry for entry in entries}
    groups = fusible({name: (entry.dtype, entry.shape) for name, entry in known.items()}, blocks)
    made = []
    for name, members in groups.items():
        first = known[members[0]]
        shape = first.shape[::-1] if turns(name, blocks) else first.shape
        made.append(
            dataclasses.replace(
                first, name=name, shape=(len(members), *shape), bytes=first.bytes * len(members)
            )
        )
    gone = {one for members in groups.values() for one in members}
    return [entry for name, entry in known.items() if name not in gone] + made


def separate_tensors(tensors: Mapping[str, Tensor], blocks: Mapping[str, bool]) -> dict[str, Tensor]:
    """Return stored tensors with one for each expert's layer, where experts share one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, _, rest = expert_of(name, blocks) if blocks else ("", "", "")
        if not block or rest not in SEPARATE:
            found[name] = tensor
            continue
        for place, part in enumerate(tensor):
            matrix = part.t() if turns(name, blocks) else part
            found[f"{block}.{place}.{SEPARATE[rest]}"] = matrix.contiguous()
    return found
