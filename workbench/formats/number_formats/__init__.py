"""The number formats that come with the workbench, one file each: importing this package registers them."""

from __future__ import annotations

from workbench.formats.number_format import FORMATS
from workbench.util.registry import import_members

__all__ = ["FORMATS"]

import_members(__name__, __path__)
