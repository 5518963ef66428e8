"""Folders that are written beside their place and renamed; what a killed process left of them is cleaned."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from workbench.util.text import file_name

OLD = "-old"  # how the name of what was in the place before ends, while it is replaced


def beginning(place: Path) -> str:
    """Return how the names of folders beside a place begin that this machine makes."""
    return f".{place.name}.workbench-{file_name(socket.gethostname())}-"


def side_folder(place: Path) -> Path:
    """Make a new hidden folder beside a place, which says whose it is.

    Raises:
        OSError: it cannot be made.

    """
    return Path(tempfile.mkdtemp(prefix=f"{beginning(place)}{os.getpid()}-", dir=place.parent))


def clean_side_folders(place: Path) -> None:
    """Delete the hidden folders beside a place that processes of this machine left which are dead.

    What was in the place before goes back there, where nothing has taken it.
    """
    folders = place.parent.glob(f"{glob.escape(beginning(place))}*")
    for path in sorted(folders, key=lambda folder: not folder.name.endswith(OLD)):
        told = re.match(r"(\d+)-\w+(-old)?$", path.name.removeprefix(beginning(place)), re.ASCII)
        if told is None or path.is_symlink() or not path.is_dir() or is_alive(int(told[1])):
            continue
        with contextlib.suppress(OSError):  # another process was faster
            if told[2] and not place.exists():
                path.rename(place)
            else:
                shutil.rmtree(path)


def is_alive(process: int) -> bool:
    """Return whether a process of this number may be running."""
    if os.name != "posix":
        return True  # there a look would be a signal
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
