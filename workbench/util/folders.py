"""Where files of the user's lie that the workbench keeps."""

from __future__ import annotations

from pathlib import Path

APPLICATION = "compression-workbench"


def cache_folder(name: str) -> Path:
    """Return a folder of the user's cache directory: what is in it can be made again."""
    import platformdirs

    return Path(platformdirs.user_cache_dir(APPLICATION)) / name


def state_folder(name: str) -> Path:
    """Return a folder of the user's state directory: what is in it cannot be made again."""
    import platformdirs

    return Path(platformdirs.user_state_dir(APPLICATION)) / name
