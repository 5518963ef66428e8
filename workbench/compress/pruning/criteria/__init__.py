"""The criteria that come with the workbench, one file each: importing this package registers them."""

from __future__ import annotations

from workbench.compress.pruning.criterion import CRITERIA
from workbench.util.registry import import_members

__all__ = ["CRITERIA"]

import_members(__name__, __path__)
