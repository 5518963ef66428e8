"""Taking rows, columns and whole blocks out of modules: what is left are smaller modules of the same
kinds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.compress.pruning.prunable_units import Attention, inputs, outputs
from workbench.modules.factored import Factors, Repaired
from workbench.modules.input_quantizer import QuantizesInputs
from workbench.modules.layer import can_hold, replace_module

if TYPE_CHECKING:
    from workbench.compress.core.context import Work

OUTPUTS = (
    "out_features",
    "out_channels",
    "nf",
    "num_features",
)  # numbers that modules keep beside their tensors
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
INPUTS = ("in_features", "in_channels", "nx")


def narrow(module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep only the given rows (outputs) and columns (input channels) of a Linear, Conv1D, Conv2d or batch
    norm.

    Its tensors are replaced, never changed: the dense model may hold the same ones.
    """
    transposed = type(module).__name__ == "Conv1D"
    if columns is not None:
        keep(module, "weight", 0 if transposed else 1, columns)
        count(module, INPUTS, len(columns))
    if rows is not None:
        keep(module, "weight", 1 if transposed else 0, rows)
        for name in ("bias", "running_mean", "running_var"):
            keep(module, name, 0, rows)
        count(module, OUTPUTS, len(rows))


def keep(module: nn.Module, name: str, dimension: int, index: Tensor) -> None:
    """Replace a parameter or buffer by some of its entries along one dimension, if there is one."""
    tensor = getattr(module, name, None)
    if isinstance(tensor, nn.Parameter):
        setattr(
            module,
            name,
            nn.Parameter(
                tensor.detach().index_select(dimension, index.to(tensor.device)), requires_grad=False
            ),
        )
    elif isinstance(tensor, Tensor):
        setattr(module, name, tensor.index_select(dimension, index.to(tensor.device)))


def count(module: nn.Module, names: Iterable[str], number: int) -> None:
    """Store a number where the module keeps it."""
    for name in names:
        if hasattr(module, name):
            setattr(module, name, number)


def count_heads(model: nn.Module, attention: Attention) -> tuple[int, int]:
    """Bring the numbers that an attention keeps in line with its products.

    Return (heads, heads of keys and values).
    """
    owner, width = (
        model.get_submodule(attention.owner),
        outputs(model.get_submodule(attention.query)) // (3 if attention.fused else 1),
    )
    heads, shared = (
        width // attention.size,
        (width if attention.fused else outputs(model.get_submodule(attention.key))) // attention.size,
    )
    count(owner, ("num_heads", "num_attention_heads", "n_heads"), heads)
    count(owner, ("num_key_value_heads",), shared)
    count(owner, ("num_key_value_groups",), heads // shared)
    count(owner, ("all_head_size", "split_size"), width)
    return heads, shared


def drop_blocks(model: nn.Module, name: str, kept: list[int]) -> None:
    """Keep some of a list of blocks, numbered anew from 0, also where a cache of keys and values looks for
    its place.
    """
    listed = model.get_submodule(name)
    children = list(listed.children())
    left = [children[index] for index in kept]
    replace_module(
        model, name, nn.ModuleList(left) if isinstance(listed, nn.ModuleList) else nn.Sequential(*left)
    )
    for place, index in enumerate(kept):
        for module in children[index].modules():
            if getattr(module, "layer_idx", None) == index:
                module.layer_idx = place  # type: ignore[assignment]


def own_config(work: Work) -> Any:
    """Give the model a configuration of its own, the first time it is asked for, and return it (None: it has
    none).
    """
    shared = getattr(work.task.model, "config", None)
    config = getattr(work.model, "config", None)
    if shared is None or config is not shared:
        return config
    config = copy.deepcopy(shared)
    for module in work.model.modules():
        if vars(module).get("config") is shared:
            module.config = config  # type: ignore[assignment]
    return config


def differences(model: nn.Module, plain: nn.Module) -> dict[str, dict[str, Any]]:
    """Return how `model` differs from what its configuration alone builds: sizes and numbers by module.

    {module: {"rows": outputs, "columns": inputs, "numbers": {attribute: value}}}, each only where it differs.
    """
    by_module: dict[str, dict[str, Any]] = {}
    modules = dict(model.named_modules())
    for name, blank in plain.named_modules():
        module = modules.get(name)
        if module is None or not (
            type(module) is type(blank) or isinstance(module, Factors | Repaired | QuantizesInputs)
        ):
            continue
        about: dict[str, Any] = {}
        if can_hold(blank) or isinstance(blank, NORMS):
            built, wanted = sizes_of(blank), sizes_of(module)
            about |= {side: wanted[side] for side in wanted if wanted[side] != built[side]}
        else:
            numbers = {
                key: value
                for key, value in vars(module).items()
                if type(value) in {int, float} and not key.startswith("_") and vars(blank).get(key) != value
            }
            about |= {"numbers": numbers} if numbers else {}
        if about:
            by_module[name] = about
    return by_module


def sizes_of(module: nn.Module) -> dict[str, int]:
    """Return the outputs and inputs of a product, whole or in factors, or the features of a batch norm as its
    rows.
    """
    if isinstance(module, Factors):
        return {"rows": outputs(module[-1]), "columns": inputs(module[0])}
    if isinstance(module, Repaired):
        return sizes_of(module.base)
    if not can_hold(module):
        return {"rows": int(module.num_features)}  # type: ignore[arg-type]
    return {"rows": outputs(module), "columns": inputs(module)}


def apply_differences(model: nn.Module, structure: dict[str, dict[str, Any]]) -> None:
    """Give a freshly built model the sizes and numbers that `differences` found.

    New tensors are on the device "meta".
    """
    for name, about in structure.items():
        module = model.get_submodule(name)
        for key, value in about.get("numbers", {}).items():
            setattr(module, key, value)
        sides = {
            side: torch.arange(int(about[side]), device="meta")
            for side in ("rows", "columns")
            if side in about
        }
        if sides:
            module.to("meta")
            narrow(module, **sides)
