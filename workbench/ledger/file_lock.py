"""The lock of a file that several processes append to, and who holds it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOENT
from pathlib import Path

from filelock import FileLock, Timeout

from workbench.errors import LedgerError

PATIENCE_SECONDS = 1.0  # a line is written in milliseconds


class AppendLock:
    """A lock beside a file. The system releases it when its holder dies."""

    def __init__(self, path: Path) -> None:
        """Take nothing yet; `path` is the file that is guarded."""
        self.path = Path(f"{path}.lock")
        self.lock = FileLock(self.path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock while the block runs.

        Raises:
            LedgerError: another process holds it for longer than a second; the message names it.
            OSError: it cannot be made here.

        """
        try:
            self.lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=0.02)
        except Timeout:
            if not self.path.exists():  # waited for a file that nobody can make here
                raise FileNotFoundError(ENOENT, "its lock cannot be made", str(self.path)) from None
            raise LedgerError(
                f"{holder(self.path)} holds its lock {str(self.path)!r}: wait for that process or end it, or"
                " give another ledger (ledger=..., --ledger)"
            ) from None
        try:
            yield
        finally:
            self.lock.release()


def holder(path: Path) -> str:
    """Return which process holds the lock of a file, as far as this system tells."""
    with suppress(OSError, ValueError):
        there = path.stat()
        place = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}:{there.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE 4711 08:01:1234 0 EOF
            if "->" not in fields and place in fields and int(fields[4]) > 0:
                return f"process {fields[4]}{command(int(fields[4]))}"
    return "another process"


def command(process: int) -> str:
    """Return a process' command line in brackets, "" where it is not told."""
    with suppress(OSError):
        arguments = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return f" ({' '.join(arguments).strip()[:80]})"
    return ""
