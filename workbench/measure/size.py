"""Three sizes, never mixed up: what papers count, what memory holds, what lies on disk."""

from __future__ import annotations

from dataclasses import dataclass

import safetensors.torch
from torch import nn

from workbench.compress.layers import Layer
from workbench.runtime.packed import Packed, pack_model


@dataclass(frozen=True)
class Sizes:
    """Bytes of one model.

    `theoretical_bytes`: non-zero weights at their width, no positions, no scales, as papers count. `packed_bytes`: every
    tensor of the packed form, in memory. `file_bytes`: the packed safetensors file, header included.
    """

    theoretical_bytes: int
    packed_bytes: int
    file_bytes: int


def file_content(packed: Packed) -> bytes:
    """Return the very bytes of the safetensors file that an export writes."""
    return safetensors.torch.save(packed.tensors, metadata={"format": "pt"})


def sizes(model: nn.Module, layers: tuple[Layer, ...] = ()) -> Sizes:
    """Return the three sizes of a model; `layers` carry the masks and grids of a compressed one."""
    packed = pack_model(model, layers)
    return Sizes(packed.theoretical_bytes, packed.packed_bytes, len(file_content(packed)))
