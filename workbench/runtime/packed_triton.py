"""Our own kernels for weights of 2 to 8 bits on a GPU, as an engine for layers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.formats.affine import Grid
from workbench.runtime.packed_linear import PackedLinear, packed_weight, why_not

if TYPE_CHECKING:
    from workbench.modules.layer import Layer


@dataclass(frozen=True)
class PackedTriton:
    """Linear and Conv1D layers with affine integer weights: stored in their bits and no more, unpacked in
    registers.

    Quick for one token and a few, where reading weights is what takes time; many tokens are multiplied by
    weights that are unpacked first, which costs a pass over them and gains nothing.
    """

    name: str = "packed weights (Triton)"
    takes: str = (
        "Linear, Conv1D with 2 to 8 bits, one scale per row or per group of a multiple of 32 inputs; a GPU"
        " with Triton"
    )
    uses: tuple[str, ...] = ("weights",)

    def here(self, device: str) -> str:
        """Return why it cannot run on this device, "" if it can."""
        if not device.startswith("cuda") or not torch.cuda.is_available():
            return "Triton kernels need a CUDA GPU"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; torch for CUDA on Linux brings it"
        major, minor = torch.cuda.get_device_capability(device)
        return (
            ""
            if major >= 8
            else f"compute capability {major}.{minor}: 8.0 or later has the matrix units for bfloat16"
        )

    def serves(self, layer: Layer, device: str) -> str:  # noqa: ARG002  the protocol's
        """Return why it does not take this layer, "" if it does."""
        if type(layer.module) is not nn.Linear and type(layer.module).__name__ != "Conv1D":
            return f"a {type(layer.module).__name__} is more than one product with its weight"
        if layer.others:
            return f"its weight is shared with {', '.join(layer.others)}, which reads it unpacked"
        if not isinstance(layer.grid, Grid):
            return "its weights are no integers with scales"
        return why_not(layer.grid)

    def build(self, layer: Layer) -> nn.Module:
        """Return the layer with its weight packed."""
        assert isinstance(layer.grid, Grid)  # noqa: S101  `serves` has said so
        bias = layer.module.bias
        return PackedLinear(
            packed_weight(layer.grid),
            bias.detach() if isinstance(bias, Tensor) else None,
            layer.parameter.dtype,
        )
