"""Layers that exist only to ask engines about them, or to time them."""

from __future__ import annotations

import torch
from torch import nn

from workbench.formats.affine import Grid
from workbench.modules.input_quantizer import InputFormat, quantized_like
from workbench.modules.layer import Layer

SIDE = 1024  # inputs and outputs of a layer that is asked about
TIMED = (2048, 2048)  # (outputs, inputs) of a layer that is timed


def probe(
    bits: int, group_size: int = 0, inputs: InputFormat | None = None, shape: tuple[int, int] = (SIDE, SIDE)
) -> Layer:
    """Return a Linear of shapes only (meta tensors), on an asymmetric grid of `bits` (0: dense), with rounded
    inputs if given.
    """
    outputs, width = shape
    with torch.device("meta"):
        module: nn.Module = nn.Linear(width, outputs, bias=False)
        grid = None
        if bits:
            groups = width // (group_size or width) if width % (group_size or width) == 0 else 1
            grid = Grid(
                torch.empty(outputs, width, dtype=torch.uint8),
                torch.empty(outputs, groups, dtype=torch.float16),
                torch.empty(outputs, groups, dtype=torch.uint8),
                bits,
            )
        if inputs is not None:
            fixed = (None, None) if inputs.dynamic else (torch.empty(()), torch.empty((), dtype=torch.int32))
            module = quantized_like(module, inputs, None, *fixed)
    return Layer("probe", "probe", module, grid=grid)


def real_probe(
    bits: int, group_size: int, inputs: InputFormat | None, device: str, dtype: torch.dtype
) -> tuple[Layer, nn.Module]:
    """Return a Linear with random weights on a grid, on `device`, and the same one dense."""
    outputs, width = TIMED
    generator = torch.Generator().manual_seed(0)
    groups = width // (group_size or width)
    codes = torch.randint(0, 1 << bits, (outputs, width), generator=generator, dtype=torch.uint8)
    zero = torch.full((outputs, groups), 1 << (bits - 1), dtype=torch.uint8)
    grid = Grid(
        codes.to(device),
        torch.full((outputs, groups), 0.05, device=device, dtype=torch.float16),
        zero.to(device),
        bits,
    )
    dense = nn.Linear(width, outputs, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layer = Layer("probe", "probe", dense if inputs is None else quantized_like(dense, inputs), grid=grid)
    layer.write(grid.dequantize())
    return layer, dense
