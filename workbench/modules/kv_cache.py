"""The cache of one attention layer, kept as bytes: transformers asks it for keys and values, and gets them
unpacked.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from workbench.formats.kv_cache import CacheFormat
from workbench.modules.input_quantizer import pass_through


@cache
def packed_layer() -> type[Any]:
    """Return the class `PackedLayer(form)`, a cache layer of transformers.

    Made on first use, since importing transformers takes seconds.
    """
    from transformers.cache_utils import DynamicLayer

    class PackedLayer(DynamicLayer):
        """`keys` and `values` are uint8 [batch, heads, tokens, bytes]: cropping, reordering and repeating
        work as on any cache.
        """

        def __init__(self, form: CacheFormat) -> None:
            """Start empty."""
            super().__init__()
            self.form = form

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Remember dtype and device, and start with no tokens."""
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = empty_rows(key_states, self.form), empty_rows(value_states, self.form)
            self.is_initialized = True

        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            *args: Any,  # noqa: ARG002
            **named: Any,  # noqa: ARG002
        ) -> tuple[Tensor, Tensor]:
            """Store new keys and values [batch, heads, tokens, head].

            Return all of them, rounded as they are stored.
            """
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys, keys = stored(self.keys, key_states, self.form)
            self.values, values = stored(self.values, value_states, self.form)
            return keys, values

    return PackedLayer


def empty_rows(states: Tensor, form: CacheFormat) -> Tensor:
    """Return the rows of no tokens, uint8 [batch, heads, 0, bytes]."""
    return states.new_empty((*states.shape[:2], 0, form.row_bytes(states.shape[-1])), dtype=torch.uint8)


def stored(before: Tensor | None, states: Tensor, form: CacheFormat) -> tuple[Tensor, Tensor]:
    """Return (all rows as bytes, uint8 [..., tokens, bytes]; all rows unpacked, [..., tokens, head], in the
    dtype of `states`); gradients pass to `states`.
    """
    fresh, head = form.encode(states), states.shape[-1]
    unpacked = pass_through(states, form.decode(fresh, head).to(states.dtype))
    if before is None or not before.shape[-2]:
        return fresh, unpacked
    return torch.cat([before, fresh], -2), torch.cat(
        [form.decode(before, head).to(states.dtype), unpacked], -2
    )
