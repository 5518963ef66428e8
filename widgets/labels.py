"""Names and values of the panel's parts for screen readers, which ipywidgets leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import anywidget
import traitlets

GROUPS = {
    ".wb-panel": "compression explorer",
    ".wb-left": "recipe",
    ".wb-plot": "trade-off plot; every point is also in the tab history",
    ".wb-buttons": "moves and presets",
}


class Labels(anywidget.AnyWidget):
    """Shows nothing.

    Stands inside a `wb-panel` names its groups and slider handles, keeps what the handles say exact, and
    keeps keys pressed here from JupyterLab.
    """

    _esm: ClassVar[Path] = Path(__file__).parent / "labels.js"
    groups = traitlets.Dict(GROUPS).tag(sync=True)

    def __init__(self) -> None:
        """Take no room."""
        super().__init__(layout={"display": "none"})
