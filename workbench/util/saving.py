"""Files of `torch.save` that are there whole or not at all, whenever a process ends."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PART = ".part"  # how the name of a file ends that is being written
HOUR = 3600  # seconds: what is older was left by a process that ended while it wrote


def save_whole(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write a value under another name and rename it: whoever reads finds all of it or the file of before.

    With `durable` also after a power cut, for which the disk is waited for.

    Raises:
        OSError: the folder cannot be written; `RuntimeError` of torch's for a full disk.

    """
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=PART, delete=False) as file:
            temporary = Path(file.name)
            torch.save(value, file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def remove_left(folder: Path) -> None:
    """Delete under a folder what processes left that ended while they wrote."""
    for left in folder.rglob(f"*{PART}"):
        with contextlib.suppress(OSError):  # another process was faster
            if left.stat().st_mtime < time.time() - HOUR:
                left.unlink()
