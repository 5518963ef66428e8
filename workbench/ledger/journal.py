"""A journal file of Optuna, one JSON object a line, that survives what happens to a laptop.

Optuna's own file backend (`JournalFileBackend`) reads and writes the same files. This one differs in three
ways. Its lock is released by the system when its holder dies, while Optuna's stays behind after kill -9. What
was not written to its end is cut off before anyone appends, while Optuna refuses the whole file. And lines
are read in a third of the time.

A ledger needs neither Optuna's objects of its points nor what most of a line says: `Sifted` shows Optuna the
studies alone.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic_core import from_json

from workbench.errors import LedgerError

MAGIC = b'{"op_code":'  # how a journal begins
OPERATION = re.compile(rb'\{"op_code":\s*(\d+)')
READ = 2**20  # bytes at once: a line may have tens of thousands
CREATE_TRIAL = 4  # Optuna's operations from here on are on trials, those before on studies


class Journal:
    """The lines of one file; any number of processes read and append at once.

    Has the two methods of Optuna's `BaseJournalBackend`, but does not inherit it, so that importing this
    stays free of Optuna.
    """

    def __init__(self, path: Path) -> None:
        """Open or create a file; a torn last line is cut off.

        Raises:
            LedgerError: the file is there and is no journal; nothing in it is touched.
            OSError: it cannot be read or written.

        """
        path.parent.mkdir(parents=True, exist_ok=True)
        check(path)
        self.path = path
        self.lock = FileLock(f"{path}.lock")
        self.ends = [0]  # byte offsets: where the line of each number begins
        with self.lock:
            path.open("ab").close()
            repair(path)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the lines from a number on; one that is being written is left for the next time."""
        del self.ends[log_number_from + 1 :]
        for line in self.lines(self.ends[log_number_from]):
            self.ends.append(self.ends[-1] + len(line))
            yield parsed(line)

    def lines(self, start: int) -> Iterator[bytes]:
        """Yield the lines that were written to their end, from a place in the file on."""
        with self.path.open("rb", buffering=READ) as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield line

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines so that they are on the disk when this returns.

        If that fails, the file is as it was before.
        """
        self.append(logs)

    def append(self, logs: list[dict[str, Any]]) -> int:
        """Write lines as `append_logs` does; return where in the file the first one begins."""
        lines = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs)
        with self.lock:
            repair(self.path)
            size = self.path.stat().st_size
            try:
                with self.path.open("ab") as file:
                    file.write(lines.encode())
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                os.truncate(self.path, size)
                raise
        return size


class Sifted(Journal):
    """A journal of which Optuna reads the studies and what this process writes.

    The lines of all other trials wait in `aside`.

    A study that Optuna loads from it has no trials but those that were added to it, and their numbers count
    these alone: to write points and to keep attributes, not to be read as a study. With a hundred thousand
    points that takes a third of the time.
    """

    def __init__(self, path: Path) -> None:
        """Open or create a file; raises as `Journal`."""
        super().__init__(path)
        self.aside: deque[bytes] = deque()
        self.own: set[int] = set()  # where lines begin that this process wrote
        self.sifted = 0  # up to where trials were set aside

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield what is not set aside, from a number on: numbers do not count the rest."""
        del self.ends[log_number_from + 1 :]
        start = self.ends[-1]
        for line in self.lines(start):
            end = start + len(line)
            shown = start in self.own or operation(line) < CREATE_TRIAL
            if not shown and start >= self.sifted:
                self.aside.append(line)
            self.sifted = max(self.sifted, end)
            if shown:
                self.ends.append(end)
                yield parsed(line)
            else:
                self.ends[-1] = end
            start = end

    def append(self, logs: list[dict[str, Any]]) -> int:
        """Write lines as `append_logs` does, and remember where."""
        start = super().append(logs)
        self.own.add(start)
        return start


def operation(line: bytes) -> int:
    """Return which of Optuna's operations a line holds."""
    found = OPERATION.match(line)
    return int(parsed(line)["op_code"] if found is None else found[1])


def parsed(line: bytes) -> dict[str, Any]:
    """Return a line as Optuna reads it.

    Half of a surrogate pair, which other tools may write, only the slower parser takes.
    """
    try:
        found = from_json(line)
    except ValueError:
        found = json.loads(line)
    return dict(found)


def check(path: Path) -> None:
    """Refuse a file that is no journal before anything in it is touched.

    Raises:
        LedgerError: its first bytes are not those of a journal.

    """
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        if not MAGIC.startswith(start):
            raise LedgerError("the file is there already and is no ledger: give another path")


def repair(path: Path) -> None:
    """Cut off a last line that was not written to its end."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        tail = b""
        while end > 0 and b"\n" not in tail:
            step = min(end, 1 << 16)
            end -= step
            file.seek(end)
            tail = file.read(step) + tail
        if not tail.endswith(b"\n"):
            file.truncate(end + tail.rfind(b"\n") + 1)
