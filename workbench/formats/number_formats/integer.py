"""Integers of any whole width from 2 to 8 bits on an affine grid: with or without zero points."""

from __future__ import annotations

from workbench.formats.number_format import FORMATS, NumberFormat

INTEGER = FORMATS.register(NumberFormat(name="integer", label="W", bits=None))
