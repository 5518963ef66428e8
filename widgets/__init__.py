"""What people look at: the live panel, figures and tables. Imports `workbench`; never the other way round.

    from widgets import Explorer
    Explorer("fashion-vit")

Importing loads nothing: each name is fetched on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widgets.explorer import Explorer

__all__ = ["Explorer"]


def __getattr__(name: str) -> Any:
    """Fetch a public name on first use."""
    if name in __all__:
        return getattr(importlib.import_module(f"widgets.{name.lower()}"), name)
    raise AttributeError(f"module 'widgets' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
