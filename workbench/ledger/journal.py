"""A journal file of Optuna, one JSON object a line, that survives what happens to a laptop.

Optuna's own file backend (`JournalFileBackend`) reads and writes the same files. This one differs in five
ways. Its lock is released by the system when its holder dies, while Optuna's stays behind after kill -9. What
was not written to its end is cut off before anyone appends. A line that says nothing, or that does not fit
those before it, costs that line: it is left out with its number, while Optuna refuses the whole file. A file
that may not be written can be read. And lines are read in half the time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from workbench.errors import LedgerError
from workbench.ledger.file_lock import AppendLock
from workbench.ledger.journal_lines import OF_A_STUDY, Made, lines_of, misfit, parsed
from workbench.util.fast_path import FastPath
from workbench.util.text import kind_and_words, one_line

MAGIC = b'{"op_code":'  # how a journal begins
READ = 2**20  # bytes at once: a line may have tens of thousands
LOOKED_AT = 1000  # lines, until a file is taken for no journal


class Place(NamedTuple):
    """Where the line of a number begins, and what the lines before it made."""

    offset: int  # bytes
    line: int  # of the file, from 1, blank and broken ones counted
    made: Made


class Journal:
    """The lines of one file; any number of processes read and append at once.

    Has the two methods of Optuna's `BaseJournalBackend`, but does not inherit it, so that importing this
    stays free of Optuna.
    """

    def __init__(self, path: Path, first: dict[str, Any] | None = None) -> None:
        """Open or create a file; a torn last line is cut off, if the file may be written.

        Args:
            path: of the file.
            first: what stands for the line that makes the first study, where that line is damaged.

        Raises:
            LedgerError: the file is there and is no journal; nothing in it is touched.
            OSError: it cannot be read, or not be made.

        """
        path.parent.mkdir(parents=True, exist_ok=True)
        check(path)
        self.path, self.first = path, first
        self.lock = AppendLock(path)
        self.places = [Place(0, 1, Made())]  # of the line of each number
        self.trial_lines: list[tuple[int, int]] = []  # (study, line) of each trial
        self.broken: dict[int, str] = {}  # why a line is left out, by its number in the file
        self.own: set[int] = set()  # where lines begin that were written here
        self.handed: int | None = None  # the number of a line that may not have been applied
        self.storage: Any = None  # of Optuna, on this journal
        self.silent = False  # nothing is read, so that a storage that reads on its own can be made
        self.cut: set[int] = set()  # the numbers of last lines that were not written to their end
        self.unwritable = ""  # why the file could only be read when it was opened
        try:
            with self.lock.held():
                path.open("ab").close()
                self.repair()
        except (OSError, LedgerError) as error:
            if not path.is_file():
                raise
            self.unwritable = one_line(error)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield what the lines say, from a number on; one that is being written is left for the next time.

        Numbers count no blank and no broken lines. Whoever comes back for the next line has applied the one
        before; one that was not applied is broken.
        """
        if self.silent:
            return
        self.settle(log_number_from)
        del self.places[log_number_from + 1 :]
        offset, number, made = self.places[log_number_from]
        del self.trial_lines[made.trials :]
        for line, length in self.lines(offset):
            log = self.read(number, line, made)
            if log is not None and self.lacks_study(log, made):
                made = made.after(self.first or {})
                self.places.append(Place(offset, number, made))
                yield dict(self.first or {})
                log = self.read(number, line, made)
            if log is not None:
                self.places[-1] = Place(offset, number, made)
                before, made = made, made.after(log)
                if made.trials > before.trials:
                    self.trial_lines.append((log["study_id"], number))
            offset, number = offset + length, number + 1
            if log is not None:
                self.places.append(Place(offset, number, made))
                self.handed = len(self.places) - 2
                yield log
                self.handed = None
            else:
                self.places[-1] = Place(offset, number, made)

    def read(self, number: int, line: bytes | None, made: Made) -> dict[str, Any] | None:
        """Return a line's record, None if it is left out; `broken` then says why, unless it is blank."""
        if line is not None and not line.strip():
            return None
        if number in self.broken:
            return None
        log = None if line is None else parsed(line)
        if log is not None and self.lacks_study(log, made):
            return log
        why = ("too long" if line is None else "no line of a journal") if log is None else misfit(log, made)
        if why:
            self.broken[number] = why
            return None
        return log

    def lacks_study(self, log: dict[str, Any], made: Made) -> bool:
        """Return whether the first study is spoken of, and the line that made it is damaged."""
        about = log["op_code"] in OF_A_STUDY and log.get("study_id") == 0
        return about and not made.studies and self.first is not None

    def settle(self, number: int, why: str = "Optuna cannot apply it") -> None:
        """Note that the line before this number could not be applied, where that is so.

        Not of a line that was written here: whoever wrote it has been told.
        """
        handed, self.handed = self.handed, None
        if handed is None or handed + 1 != number or self.places[handed].offset in self.own:
            return
        failed = self.places[handed]
        self.broken[failed.line] = why
        self.places[number] = self.places[number]._replace(made=failed.made)

    def catch_up(self) -> None:
        """Let the Optuna storage on this journal, if there is one, apply all lines, over those that it
        refuses.
        """
        while self.storage is not None:
            try:
                self.storage.get_study_id_from_name("")  # reads what is new
            except Exception as error:  # noqa: BLE001  Optuna raises what it likes, also for no such name
                if self.handed is not None:
                    self.settle(self.handed + 1, f"Optuna cannot apply it ({kind_and_words(error)[:80]})")
                    continue
            return

    def repair(self) -> None:
        """Cut off a last line that was not written to its end, and remember its number."""
        if repair(self.path):
            with self.path.open("rb") as file:
                self.cut.add(1 + sum(piece.count(b"\n") for piece in iter(lambda: file.read(READ), b"")))

    def lines_of(self, study: str) -> list[int]:
        """Return the number in the file of the line that made each trial of a study."""
        names = [made.name for made in self.places[-1].made.studies]
        wanted = names.index(study) if study in names else None
        return [line for of, line in self.trial_lines if of == wanted]

    def lines(self, start: int) -> Iterator[tuple[bytes | None, int]]:
        """Yield the lines that were written to their end from a place in the file on, with their lengths.

        Of a file that nobody here may repair also a last one that lacks its end alone.
        """
        with self.path.open("rb", buffering=READ) as file:
            file.seek(start)
            yield from lines_of(file, lambda line: bool(self.unwritable) and parsed(line) is not None)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines so that they are on the disk when this returns.

        If that fails, the file is as it was before.

        Raises:
            LedgerError: another process holds the lock.
            OSError: the file cannot be written.

        """
        lines = [f"{json.dumps(log, separators=(',', ':'))}\n".encode() for log in logs]
        with self.lock.held():
            self.repair()
            size = self.path.stat().st_size
            try:
                with self.path.open("ab") as file:
                    for line in lines:
                        self.own.add(file.tell())
                        file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                os.truncate(self.path, size)
                raise
        self.unwritable = ""


def check(path: Path) -> None:
    """Refuse a file that is no journal before anything in it is touched.

    Raises:
        LedgerError: it is no file, or no line of it is one of a journal, whole or torn.

    """
    if not path.exists():
        return
    if not path.is_file():
        raise LedgerError("it is no file: give the path of a file")
    with path.open("rb") as file:
        seen = b""
        for (line, _), _number in zip(lines_of(file, lambda _line: True), range(LOOKED_AT), strict=False):
            if line is not None and (parsed(line) is not None or MAGIC.startswith(line[: len(MAGIC)])):
                return
            seen += b"" if line is None else line.strip()
    if seen:
        raise LedgerError("the file is there already and is no ledger: give another path")


def repair(path: Path) -> bool:
    """Cut off a last line that was not written to its end; end one that lacks its end alone.

    Return whether one was cut off.
    """
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        tail = b""
        while end > 0 and b"\n" not in tail:
            step = min(end, 1 << 16)
            end -= step
            file.seek(end)
            tail = file.read(step) + tail
        last = tail[tail.rfind(b"\n") + 1 :]
        if last and parsed(last) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
            return False
        if last:
            file.truncate(end + len(tail) - len(last))
        return bool(last)


def tried(device: torch.device) -> str:  # noqa: ARG001  the form of a trial
    """Return the fault where Optuna writes a study through this journal and reads it with its own, "" if
    there is none.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        ours = Journal(Path(folder) / "trial.journal")
        storage = optuna.storages.JournalStorage(ours)  # type: ignore[arg-type]
        optuna.create_study(storage=storage, study_name="trial")
        theirs = JournalFileBackend(str(ours.path))
        alike = list(ours.read_logs(0)) == list(theirs.read_logs(0)) != []
        check(ours.path)
    return "" if alike else "Optuna reads other lines in it"


JOURNAL = FastPath(
    "our own journal file",
    "ledgers of many points: lines are read in half the time of Optuna's own",
    lambda _device: "",
    tried,
)
