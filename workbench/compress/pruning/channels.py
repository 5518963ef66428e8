"""Channels of convolutions as units, followed through batch norm, residual sums and flattening.

Which tensors share their channels is found by Torch-Pruning's dependency graph (Fang et al., "DepGraph:
Towards Any Structural Pruning", CVPR 2023), read from one pass over one item. Only the graph is its work:
scoring, removing and checking are done here as for every other structure, on tensors that the dense model may
share.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.compress.pruning.prunable_units import FoundSpaces, Space, UnitPart
from workbench.compress.pruning.surgery import NORMS

if TYPE_CHECKING:
    from workbench.tasks.base import Items, Kind


def find_channels(model: nn.Module, kind: Kind, items: Items, head: str | None) -> FoundSpaces:
    """Return the channels of every convolution that may lose some.

    Channels that a sum ties together form one space. A space is skipped, with the reason, where a convolution
    in groups or a module without a rule here reads or makes its channels, or where the model's answer does.
    """
    from torch_pruning import DependencyGraph

    twin = (
        copy.deepcopy(model).float().cpu().eval()
    )  # the graph is read off autograd, and hooks are put on the modules
    names = {module: name for name, module in twin.named_modules()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it warns of parameters outside of modules: those groups are skipped below
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        graph = DependencyGraph().build_dependency(
            twin, example_inputs=items[:1].to("cpu"), forward_fn=kind.logits
        )
        groups = list(
            graph.get_all_groups(
                ignored_layers=[module for module, name in names.items() if name == head],
                root_module_types=[nn.Conv2d],
            )
        )
    spaces, skipped = [], dict[str, str]()
    for group in groups:
        space = space_of(group, names)
        if isinstance(space, Space):
            spaces.append(space)
        else:
            skipped.update(space)
    return FoundSpaces(tuple(spaces), skipped)


def space_of(group: Any, names: dict[nn.Module, str]) -> Space | dict[str, str]:
    """Return a group of the graph as a space, or for each of its modules why it cannot be one."""
    unit_parts: list[UnitPart] = []
    reason, touched = "", [names[item.dep.target.module] for item in group if item.dep.target.module in names]
    for item in group:
        module, handler = item.dep.target.module, item.dep.handler.__name__
        axis = "rows" if "_out_" in handler else "columns"
        if module not in names:
            if isinstance(
                module, nn.Parameter
            ):  # else one of the graph's own marks for sums, reshapes and the like
                reason = f"its channels meet a parameter {list(module.shape)} that belongs to no layer"
            continue
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            reason = f"its channels meet {names[module]}, a convolution in {module.groups} groups"
        elif isinstance(module, NORMS):
            axis = "rows"
        elif not isinstance(module, nn.Conv2d | nn.Linear):
            reason = f"its channels meet {names[module]}, a {type(module).__name__}, which has no rule here"
        unit_parts.append(UnitPart(names[module], axis, by_unit(item)))  # type: ignore[arg-type]
    units = len(unit_parts[0].index) if unit_parts else 0
    if not reason and any(len(part.index) != units for part in unit_parts):
        reason = "its channels are divided among the modules in a way that has no rule here"
    if reason:
        return dict.fromkeys(touched, reason)
    ordered = sorted(
        {(part.module, part.axis): part for part in unit_parts}.values(),
        key=lambda part: list(names.values()).index(part.module),
    )
    first = next(part.module for part in ordered if part.axis == "rows")
    return Space(first, "channels", units, tuple(ordered))


def by_unit(item: Any) -> Tensor:
    """Return which indices of a module's axis belong to each channel of the group's first module, int64
    [units, k].
    """
    owned: dict[int, list[int]] = {}
    for root, index in zip(item.root_idxs, item.idxs, strict=True):
        owned.setdefault(root, []).append(index)
    widths = {len(indices) for indices in owned.values()}
    return (
        torch.tensor([sorted(owned[root]) for root in sorted(owned)])
        if len(widths) == 1
        else torch.empty(0, 0, dtype=torch.int64)
    )
