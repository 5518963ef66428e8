"""After units left: the numbers that attentions and the configuration keep are brought in line with the
tensors.

A configuration says what an ordinary one can say, so that other tools load the model: heads where it knows
their size apart from the width, neurons, blocks, the widths of a ResNet, each only if all blocks have it in
common. The rest is written into an export beside it (`surgery.differences`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from workbench.compress.pruning.prunable_units import MLPS, Attention, find_attentions, members, outputs
from workbench.compress.pruning.surgery import count, count_heads, own_config

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune

WIDTHS = (
    "intermediate_size",
    "n_inner",
    "hidden_dim",
    "ffn_dim",
)  # what configurations call the neurons of an MLP


def settle_numbers(step: Prune, work: Work) -> None:
    """Bring every number in line after `step` has taken units of its pattern out of the work's model."""
    config = own_config(work)
    if step.pattern == "heads":
        before = {attention.name: attention for attention in find_attentions(work.task.model)[0]}
        tell_heads(config, find_narrowed(work, before), before)
    elif step.pattern == "neurons":
        tell_neurons(config, work.model)
    elif config is not None and step.pattern == "channels" and getattr(config, "model_type", "") == "resnet":
        tell_channels(config, work.model)


def find_narrowed(work: Work, before: dict[str, Attention]) -> list[tuple[int, int, int]]:
    """Return (heads, heads of keys and values, size) of every attention, its own numbers settled."""
    narrowed = []
    for attention in before.values():
        name = work.place(attention.name)
        if name:
            narrowed.append((*count_heads(work.model, attention.moved(name)), attention.size))
    return narrowed


def tell_heads(config: Any, narrowed: list[tuple[int, int, int]], before: dict[str, Attention]) -> None:
    """Write the heads into a configuration that knows their size apart from the width, if all blocks have the
    same.
    """
    dense = {(attention.heads, attention.shared) for attention in before.values()}
    if config is None or len(set(narrowed)) != 1 or len(dense) != 1:
        return
    heads, shared, size = narrowed[0]
    width = getattr(config, "hidden_size", 0)
    apart = hasattr(config, "head_dim") or getattr(config, "model_type", "") == "vit"
    if apart and width and width % heads == 0:  # configurations refuse a width that the heads do not divide
        config.head_dim = size
        config.num_attention_heads = heads
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = shared


def tell_neurons(config: Any, model: nn.Module) -> None:
    """Write the neurons into every MLP that keeps their number, and into the configuration if all have the
    same.
    """
    modules, widths = dict(model.named_modules()), set[int]()
    for name, module in modules.items():
        for makers, reader in MLPS:
            products = members(modules, name, (*makers, reader))
            if products:
                widths.add(outputs(modules[products[0]]))
                count(module, ("intermediate_size",), outputs(modules[products[0]]))
    name_here = next((name for name in WIDTHS if hasattr(config, name)), None)
    if name_here is not None and len(widths) == 1:
        setattr(config, name_here, widths.pop())


def tell_channels(config: Any, model: nn.Module) -> None:
    """Write the widths of a ResNet's stem and stages, unless that would make it leave out, or add, a
    shortcut.
    """
    modules = dict(model.named_modules())
    stem = next(
        (
            outputs(module)
            for name, module in modules.items()
            if name.endswith("embedder.embedder.convolution")
        ),
        0,
    )
    last = [
        [
            outputs(m)
            for name, m in modules.items()
            if f"encoder.stages.{i}." in name and isinstance(m, nn.Conv2d)
        ][-1]
        for i in range(len(config.depths))
    ]
    old, new = [config.embedding_size, *config.hidden_sizes], [stem, *last]
    if stem and all((a == b) == (c == d) for a, b, c, d in zip(old, old[1:], new, new[1:], strict=False)):
        config.embedding_size, config.hidden_sizes = stem, last
