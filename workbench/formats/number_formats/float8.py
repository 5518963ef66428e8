"""Float8 (e4m3fn, Micikevicius et al. 2022): 4 bits of exponent, 3 of mantissa, no infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.formats.number_format import FORMATS, NumberFormat
from workbench.util.about import About

MOST = 448.0  # the largest number


def encode(values: Tensor) -> Tensor:
    """Return the nearest codes, uint8, of float32 values over their scale; beyond the largest it is that."""
    return values.clamp(-MOST, MOST).to(torch.float8_e4m3fn).view(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Return the numbers that codes stand for, float32."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


FLOAT8 = FORMATS.register(
    NumberFormat(
        name="float8",
        label="FP8",
        bits=8,
        about=(
            About("number_format=float8", "Micikevicius et al. 2022", "nothing", "one pass", "8 bits only"),
        ),
        encode=encode,
        decode=decode,
        largest=MOST,
        zero_code=0,
        scale_dtype=torch.float32,
        searches=False,  # its precision is the same at every scale
    )
)
