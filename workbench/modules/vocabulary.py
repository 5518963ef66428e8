"""The weights whose rows are tokens: the table that inputs are looked up in, and a language model's head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from workbench.modules.layer import Layer

Vocabulary = dict[str, tuple[str, ...]]  # layers by name, with every name that targets know them by


def vocabulary_of(model: nn.Module, layers: Iterable[Layer]) -> Vocabulary:
    """Return which of a model's layers have a row for every token: embeddings of tokens (not of positions)
    and the head of a language model. A classifier's head, a row for every class, is none of them.
    """
    modules = {id(module) for module in (token_table(model), token_head(model)) if module is not None}
    sizes = vocabulary_sizes(getattr(model, "config", None))
    return {
        layer.name: layer.names
        for layer in layers
        if any(
            id(module) in modules or is_further_table(name, module, sizes)
            for name, module in {layer.name: layer.module, **layer.others}.items()
        )
    }


def token_table(model: nn.Module) -> nn.Embedding | None:
    """Return the table that tokens are looked up in, None where a model reads something else."""
    found = asked(model, "get_input_embeddings")
    return found if isinstance(found, nn.Embedding) else None


def token_head(model: nn.Module) -> nn.Module | None:
    """Return what scores every token, None without."""
    found = asked(model, "get_output_embeddings")
    return found if isinstance(found, nn.Module) else None


def asked(model: nn.Module, name: str) -> Any:
    """Return what a transformers model answers to one of its questions, None if it has no answer."""
    get = getattr(model, name, None)
    try:
        return get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None


def vocabulary_sizes(config: Any) -> set[int]:
    """Return the numbers of tokens that a configuration of transformers names: further tables have others."""
    get = getattr(config, "get_text_config", None)
    values = vars(get() if callable(get) else config) if config is not None else {}
    return {
        value for name, value in values.items() if name.startswith("vocab_size") and isinstance(value, int)
    }


def is_further_table(name: str, module: nn.Module, sizes: set[int]) -> bool:
    """Return whether a module is a table of tokens beside the one of the inputs."""
    positions = "position" in name or name.endswith("wpe")
    return isinstance(module, nn.Embedding) and module.num_embeddings in sizes and not positions
