"""The bytes that a language model keeps of earlier tokens: measured on the cache itself, after one window of
text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.tasks.base import Items


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of all keys and values of one sequence of `context` tokens, scales and zero points included."""

    context: int
    dense: int
    compressed: int


def cache_bytes(model: nn.Module, items: Items) -> int:
    """Return the bytes of the cache that a model fills with the first window.

    RuntimeError if it keeps none.
    """
    try:
        with torch.no_grad():
            cache: Any = model(**items[:1].inputs, use_cache=True).past_key_values
    except (TypeError, AttributeError) as error:
        raise RuntimeError(f"{type(model).__name__} takes no use_cache ({error})") from None
    layers = [
        layer
        for layer in getattr(cache, "layers", ())
        if isinstance(getattr(layer, "keys", None), torch.Tensor)
    ]
    if not layers:
        raise RuntimeError(f"{type(model).__name__} keeps no keys and values")
    return sum(states.nbytes for layer in layers for states in (layer.keys, layer.values))


def context_of(items: Items) -> int:
    """Return the tokens of a window."""
    return items.inputs["input_ids"].shape[1]
