"""Casts to 16-bit numbers, without scales."""

from __future__ import annotations

import torch

from workbench.formats.number_format import FORMATS, NumberFormat
from workbench.util.about import About

FLOAT16 = FORMATS.register(
    NumberFormat(
        name="float16",
        label="FP16",
        bits=16,
        about=(About("number_format=float16, bfloat16", "casts", "nothing", "one pass", "16 bits only"),),
        cast=torch.float16,
    )
)
BFLOAT16 = FORMATS.register(NumberFormat(name="bfloat16", label="BF16", bits=16, cast=torch.bfloat16))
