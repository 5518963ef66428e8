"""NormalFloat4 (Dettmers et al. 2023, appendix E): 16 levels at the quantiles of a normal distribution."""

from __future__ import annotations

from workbench.formats.number_format import FORMATS, NumberFormat
from workbench.util.about import About

# Scaled to [-1, 1], with an exact zero.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

NF4 = FORMATS.register(
    NumberFormat(
        name="nf4",
        label="NF4",
        bits=4,
        about=(
            About(
                "number_format=nf4",
                "Dettmers et al. 2023",
                "nothing",
                "24 passes at a new width",
                "4 bits only; no double quantization of scales",
            ),
        ),
        largest=1.0,
        zero_code=LEVELS.index(0.0),
        levels=LEVELS,
    )
)
