"""Whether anybody is looking: papermill, nbval and scripts have no browser."""

from __future__ import annotations

import os


def without_browser() -> bool:
    """Return whether no Jupyter session started this process: jupyter_server gives the kernels of its sessions their name."""
    return "JPY_SESSION_NAME" not in os.environ
