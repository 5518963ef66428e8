"""Folders that are fetched and made once, whichever process needs them first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def made_once(target: Path, ready: Callable[[], bool], make: Callable[[Path], Path]) -> None:
    """Have `make` make a folder, unless another process has while this one waited for it.

    A crash leaves no half: `make(folder)` returns one in the temporary folder that it is given, beside the
    target, which is then renamed.

    Raises:
        OSError: it cannot be stored; and what `make` raises.

    """
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):
        if ready():
            return
        for left in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
        ) as folder:
            finished = make(Path(folder))
            shutil.rmtree(target, ignore_errors=True)
            finished.rename(target)
