"""Float4 (e2m1, as in the Open Compute Project's microscaling formats, MX 1.0, 2023): a sign, 2 bits of
exponent and one of mantissa, so the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
"""

from __future__ import annotations

from workbench.formats.number_format import FORMATS, NumberFormat
from workbench.util.about import About

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))  # by code; -0 is code 8, which is not used

FLOAT4 = FORMATS.register(
    NumberFormat(
        name="float4",
        label="FP4",
        bits=4,
        about=(
            About(
                "number_format=float4",
                "e2m1 of OCP MX 1.0, Rouhani et al. 2023",
                "nothing",
                "24 passes at a new width",
                "4 bits only; scales are float16 numbers, not the powers of two of MX or the float8 of NVFP4",
            ),
        ),
        largest=6.0,
        zero_code=0,
        levels=LEVELS,
        even=True,
    )
)
