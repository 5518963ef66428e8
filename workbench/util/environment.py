"""What a result depends on: versions, the revision of the work tree, the time."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
import subprocess


def versions() -> dict[str, str]:
    """Return the versions that a result depends on; torch's own word names its build, such as +cu130."""
    import torch

    packages = {name: importlib.metadata.version(name) for name in ("compression-workbench", "transformers")}
    return {**packages, "torch": str(torch.__version__), "python": platform.python_version()}


def git_revision() -> str | None:
    """Return the revision of the git work tree that the process runs in, with a + if it has changes.

    None outside one.
    """
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
