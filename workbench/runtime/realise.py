"""Which kernel runs a compressed model on this device, or why none does.

This version has no packed kernels: the realised model is the compressed model itself, in which low-rank layers really are
two smaller products and everything else is multiplied as before. The reasons below say so before anyone waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from workbench.compress import Compressed


@dataclass(frozen=True)
class Realised:
    """What is run and timed. `no_kernel` holds one sentence for each part of the recipe that no kernel speeds up."""

    model: nn.Module
    no_kernel: tuple[str, ...]


def realise(compressed: Compressed, device: str) -> Realised:
    """Return the form of the compressed model that runs on `device` ("cpu" or "cuda")."""
    return Realised(compressed.model, tuple(reasons(compressed, device)))


def reasons(compressed: Compressed, device: str) -> list[str]:
    """Return why masks and grids do not make this model faster on this device."""
    step = next((step for step in compressed.recipe if step.kind() == "prune" and not getattr(step, "structured", False)), None)
    masked = step is not None and any(layer.mask is not None for layer in compressed.layers)
    widths = sorted({layer.grid.bits for layer in compressed.layers if layer.grid is not None})
    return reasons_for(getattr(step, "pattern", "unstructured") if masked else None, widths, device)


def reasons_for(pattern: str | None, widths: list[int], device: str) -> list[str]:
    """Return why zeros of this pattern (None: no mask) and grids of these widths make nothing faster on this device."""
    where = "this GPU" if device.startswith("cuda") else "this CPU"
    found = []
    if pattern == "2:4" and device.startswith("cuda"):
        found.append(f"no 2:4 kernel is used on {where} in this version: zeros are multiplied like any other number")
    elif pattern is not None:
        found.append(f"no kernel for {pattern} zeros on {where}: they are multiplied like any other number")
    if widths:
        found.append(f"no {'/'.join(map(str, widths))}-bit kernel is used on {where} in this version: weights are unpacked before the product")
    return found
