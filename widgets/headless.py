"""Whether anybody is looking: papermill, nbval and scripts have no browser."""

from __future__ import annotations

import os

# jupyter_server gives the kernels of its sessions their name; Voila gives its kernels its address
SIGNS = ("JPY_SESSION_NAME", "VOILA_BASE_URL")


def without_browser() -> bool:
    """Return whether neither a Jupyter session nor Voila started this process."""
    return not any(sign in os.environ for sign in SIGNS)
