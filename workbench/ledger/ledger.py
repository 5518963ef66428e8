"""Every point ever measured, in an Optuna study, so that its tools (dashboard, samplers, JupyterLab
extension) read it.

The default is an append-only journal file: a process killed at any moment loses at most the point being
measured. A torn last line (power cut, full disk) is cut off when the file is next opened; nothing before it
is touched.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from workbench.errors import LedgerError
from workbench.ledger.annotation import Annotation
from workbench.ledger.journal import Journal
from workbench.ledger.journal_lines import CREATE_STUDY
from workbench.measure.measurement import Measurement
from workbench.measure.stored_layers import StoredLayers
from workbench.metrics.metrics import metric_named
from workbench.util.folders import state_folder
from workbench.util.garbage import import_apart, uncollected
from workbench.util.text import file_name, one_line

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from optuna.storages.journal import BaseJournalBackend

    from workbench.ledger.pareto import Cost, TradeoffPoint

DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = (
    "maximize",
    "minimize",
    "minimize",
)  # minus the quality drop, file bytes, latency relative to dense
WORST = 1e9  # stands for an infinite drop, which Optuna's samplers do not take
FIRST = {"op_code": CREATE_STUDY, "worker_id": "", "directions": [2, 1, 1]}  # Optuna's numbers of DIRECTIONS
LONGEST_NOTE = 500  # characters
MOST_SAID = 5  # damaged lines that are named one by one
OPTUNA = ("optuna", "optuna.distributions", "optuna.samplers", "optuna.storages", "optuna.trial")


def default_path(name: str) -> Path:
    """Return where a model's points are kept unless the user says otherwise."""
    return state_folder("ledger") / f"{file_name(name)}.journal"


class Ledger:
    """The points of one study. Writing one is durable before `add` returns."""

    def __init__(self, where: str | Path, study: str = "workbench") -> None:
        """Open or create a ledger.

        Args:
            where: a file path (journal), or any Optuna storage URL such as `sqlite:///points.db`.
            study: the name of the study in it.

        Raises:
            LedgerError: the place cannot be read or written.

        """
        self.where, self.name = str(where), study
        self.refused: dict[int, str] = {}  # why a trial of the study is no point here, by its number in it
        self.unsaved: list[Measurement] = []
        self.rescue: Ledger | None = None  # where points lie that could not be written here
        self.points: dict[str, Measurement] = {}
        self.read = 0  # trials of the study
        with uncollected():
            try:
                first = {**FIRST, "study_name": study}
                self.journal = None if "://" in self.where else Journal(Path(self.where), first)
                self.study = open_study(self.journal or self.where, study)
                self.refresh()
            except Exception as error:  # noqa: BLE001  any storage driver may raise its own kind
                raise LedgerError(
                    f"cannot open the ledger {self.where!r}: {' '.join(str(error).split())}"
                ) from None

    def refresh(self) -> None:
        """Take over what other processes have added since the last time."""
        self.catch_up()
        trials = self.study.get_trials(deepcopy=False)
        with uncollected():
            for trial in trials[self.read :]:
                self.take(trial.number, trial.user_attrs)
        self.read = len(trials)

    def catch_up(self) -> None:
        """Pass over lines that Optuna refuses, before it is asked for anything."""
        if self.journal is not None:
            self.journal.catch_up()

    def take(self, number: int, stored: dict[str, Any]) -> None:
        """Keep one stored point; one that this version cannot read is counted, not lost."""
        try:
            point = Measurement.from_json(str(stored.get("measurement", "")), stored.get("layers"))
            readable(point)
        except Exception as error:  # noqa: BLE001  a damaged text may break any step of reading it
            self.refused[number] = "it holds no point" if "measurement" not in stored else one_line(error)
        else:
            self.points[point.key] = point

    @property
    def unreadable(self) -> int:
        """Return how many points and lines this version cannot read (a plugin that is not loaded, a line that
        something else wrote); they stay where they are.
        """
        return len(self.left_out)

    @property
    def left_out(self) -> list[tuple[int | None, str]]:
        """Return the records that cannot be read here: (number of the line, None in other storages; why)."""
        if self.journal is None:
            return [(None, why) for why in self.refused.values()]
        lines = self.journal.lines_of(self.name)
        unread = list(self.journal.broken.items())
        unread += [(lines[number], why) for number, why in self.refused.items() if number < len(lines)]
        unread += [(line, "it was not written to its end, and was cut off") for line in self.journal.cut]
        return [*sorted(unread)]

    @property
    def only_read(self) -> str:
        """Return why the ledger could only be read when it was opened, in words; "" if it can be written."""
        why = "" if self.journal is None else self.journal.unwritable
        return why and (
            f"the ledger {self.where!r} can only be read now ({why}): points that cannot be written to it are"
            " kept in another, which is then named"
        )

    def damage(self) -> str:
        """Return in one line what cannot be read here and where, "" if all is read."""
        unread = self.left_out
        if not unread:
            return ""
        said = [f"line {line}: {why}" if line is not None else why for line, why in unread[:MOST_SAID]]
        more = f"; and {len(unread) - MOST_SAID} more" if len(unread) > MOST_SAID else ""
        return (
            f"{len(unread)} points or lines of the ledger cannot be read here (by a plugin that is not"
            f" loaded, or damaged) and are left out; they stay in it: {'; '.join(said)}{more}"
        )

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.points)

    def rows(self) -> list[Measurement]:
        """Return every point, in the order in which they were first measured."""
        return list(self.points.values())

    def pareto(self, cost: Cost = "file_bytes") -> tuple[TradeoffPoint, ...]:
        """Return the points that no other beats in both quality and cost, cheapest first (see
        `workbench.ledger.pareto`).
        """
        from workbench.ledger.pareto import pareto

        return pareto(self.rows(), cost) if self.points else ()

    def find(self, key: str) -> Measurement | None:
        """Return the point with this key, or None."""
        return self.points.get(key)

    def annotate(self, key: str, *, note: str | None = None, pinned: bool | None = None) -> Annotation:
        """Write a note on a point, or pin it, and return all that is now said about it.

        What is None stays as it is.

        Notes and pins lie in the same study, as its attributes; the newest one holds, whichever process wrote
        it.

        Args:
            key: of a point of this ledger.
            note: any text of at most 500 characters; "" removes it.
            pinned: whether the point is to stand first in lists and be marked on plots.

        Raises:
            LedgerError: no such point, a note that is too long or no text, or the storage refused it.
        """
        if key not in self.points:
            self.refresh()
        if key not in self.points:
            raise LedgerError(
                f"no point {key!r} in the ledger {self.where!r}; it has {len(self.points)} points, see"
                " `rows()`"
            )
        given = {
            f"note {key}": None if note is None else plain_text(note),
            f"pinned {key}": None if pinned is None else bool(pinned),
        }
        for name, value in given.items():
            if value is not None:
                try:
                    self.catch_up()
                    self.study.set_user_attr(name, value)
                except Exception as error:  # noqa: BLE001  any storage driver may raise its own kind
                    raise LedgerError(
                        f"cannot write the {name.split()[0]} on {key!r} to {self.where!r}:"
                        f" {' '.join(str(error).split())}; copy it to where you may write, and give that with"
                        " ledger=... (--ledger)"
                    ) from None
        return self.annotations().get(key, Annotation())

    def annotations(self) -> dict[str, Annotation]:
        """Return the notes and pins of points, by key; points neither pinned nor noted are left out."""
        self.catch_up()
        attributes = self.study.user_attrs
        keys = dict.fromkeys(
            name.partition(" ")[2] for name in attributes if name.startswith(("note ", "pinned "))
        )
        said = {
            key: Annotation(
                str(attributes.get(f"note {key}", "")), bool(attributes.get(f"pinned {key}", False))
            )
            for key in keys
        }
        return {key: annotation for key, annotation in said.items() if annotation != Annotation()}

    def frame(self) -> pd.DataFrame:
        """Return every point as a row of a pandas table, with notes and pins (see
        `workbench.ledger.table`).
        """
        from workbench.ledger.table import points_frame

        return points_frame(self.rows(), self.annotations())

    def add(self, point: Measurement) -> None:
        """Write a complete point.

        If the storage fails, the point stays in memory and goes with the next one that succeeds. Meanwhile it
        lies in a ledger of its own, which the error names: a process that ends now loses nothing.

        Raises:
            LedgerError: the storage refused it (a full disk, say); the point is still in `rows()`.
        """
        self.points[point.key] = point
        self.unsaved.append(point)
        while self.unsaved:
            try:
                self.catch_up()
                self.study.add_trial(as_trial(self.unsaved[0]))
            except Exception as error:  # noqa: BLE001  any storage driver may raise its own kind
                raise LedgerError(
                    f"{len(self.unsaved)} measured points are not on disk yet: cannot write {self.where!r}:"
                    f" {' '.join(str(error).split())}{self.rescued()}"
                ) from None
            self.unsaved.pop(0)
        self.drop_rescue()

    def rescued(self) -> str:
        """Keep what is not saved in another ledger; return where it is, in words."""
        name = (
            f"{file_name(Path(self.where.rpartition('://')[2]).stem)}-{os.getpid()}-{time.time_ns()}.journal"
        )
        for folder in (state_folder("ledger") / "unsaved", Path(tempfile.gettempdir())):
            try:
                self.rescue = self.rescue or Ledger(folder / name, self.name)
                for point in self.unsaved:
                    if point.key not in self.rescue.points:
                        self.rescue.write(point)
            except LedgerError:
                if self.rescue is None or not self.rescue.points:
                    self.rescue = None
                    remove(folder / name)
            else:
                return f"; they are kept in {self.rescue.where!r}: go on with ledger=... (--ledger) of that"
        return "; give another place with ledger=... (--ledger)"

    def write(self, point: Measurement) -> None:
        """Write a point or raise `LedgerError`, and keep nothing for later."""
        try:
            self.study.add_trial(as_trial(point))
        except Exception as error:  # noqa: BLE001  any storage driver may raise its own kind
            raise LedgerError(one_line(error)) from None
        self.points[point.key] = point

    def drop_rescue(self) -> None:
        """Delete the other ledger, once what lies in it is written here."""
        rescue, self.rescue = self.rescue, None
        if rescue is not None:
            remove(Path(rescue.where))


def remove(journal: Path) -> None:
    """Delete a journal and its lock, as far as that can be done."""
    for path in (journal, Path(f"{journal}.lock")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def readable(point: Measurement) -> None:
    """Raise an exception of any kind unless everything that lists and plots ask of a point is in it."""
    metric_named(point.primary.metric)
    if not point.sizes.file_bytes > 0 < point.dense_sizes.file_bytes:
        raise ValueError("its sizes are no sizes")
    if isinstance(point.layers, StoredLayers):
        text = point.layers.text.strip()
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError("its layers are no list")


def plain_text(note: str) -> str:
    """Return a note as it is stored.

    Raises:
        LedgerError: too long, or characters that are no text.

    """
    text = note.replace("\r\n", "\n").strip()
    odd = next((c for c in text if unicodedata.category(c) in {"Cc", "Cs"} and c not in "\n\t"), None)
    if odd is not None:
        raise LedgerError(f"the note {text[:40]!r} is refused: the character {odd!r} is no text")
    if len(text) > LONGEST_NOTE:
        raise LedgerError(
            f"the note {text[:40] + '...'!r} is refused: it has {len(text):,} characters, the most is"
            f" {LONGEST_NOTE}"
        )
    return text


def as_trial(point: Measurement) -> optuna.trial.FrozenTrial:
    """Return the point as a finished trial: sliders as parameters, everything else as one attribute."""
    import optuna

    params: dict[str, Any] = {}
    for step in point.recipe:
        value = getattr(step, step.slider)
        if isinstance(value, int | float) and step.slider not in params:
            params[step.slider] = float(value)
    distributions: dict[str, Any] = {
        name: optuna.distributions.FloatDistribution(0.0, 1e6) for name in params
    }
    relative = 1 / point.latency.speedup.value if point.latency else float("nan")
    values = [
        max(-point.primary.drop.value, -WORST),
        float(point.sizes.file_bytes),
        relative if relative == relative else WORST,  # noqa: PLR0124
    ]
    attributes = {"key": point.key, "recipe": repr(point.recipe), **point.to_stored()}
    return optuna.create_trial(
        params=params, distributions=distributions, values=values, user_attrs=attributes
    )


def open_study(where: str | Journal, study: str) -> optuna.Study:
    """Open or create an Optuna study in a journal or at a storage URL."""
    import_apart(*OPTUNA)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(where, str):
        return load_or_create(optuna.storages.get_storage(where), study)
    where.silent = True  # the storage reads when it is made, and would refuse the whole file for one line
    where.storage = optuna.storages.JournalStorage(cast("BaseJournalBackend", where))  # see Journal
    where.silent = False
    where.catch_up()
    return load_or_create(where.storage, study)


def load_or_create(storage: optuna.storages.BaseStorage, study: str) -> optuna.Study:
    """Load a study, or create it; loading writes nothing, so that a full disk can still be read."""
    import optuna

    try:
        return optuna.load_study(storage=storage, study_name=study)
    except KeyError:
        return optuna.create_study(
            storage=storage, study_name=study, directions=list(DIRECTIONS), load_if_exists=True
        )
