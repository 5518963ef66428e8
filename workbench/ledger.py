"""Every point ever measured, in an Optuna study, so that its tools (dashboard, samplers, JupyterLab extension) read it.

The default is an append-only journal file: a process killed at any moment loses at most the point being measured. A torn
last line (power cut, full disk) is cut off when the file is next opened; nothing before it is touched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from workbench.errors import LedgerError, RecipeError
from workbench.measure.measurement import Measurement

if TYPE_CHECKING:
    import optuna
    from optuna.storages.journal._file import BaseJournalFileLock

    from workbench.tradeoff import Cost, TradeoffPoint

DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = ("maximize", "minimize", "minimize")  # minus the quality drop, file bytes, latency relative to dense
MAGIC = b'{"op_code":'  # how a journal begins
WORST = 1e9  # stands for an infinite drop, which Optuna's samplers do not take


def default_path(name: str) -> Path:
    """Return where a model's points are kept unless the user says otherwise."""
    import platformdirs

    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return Path(platformdirs.user_state_dir("compression-workbench")) / "ledger" / f"{safe}.journal"


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
        self.where = str(where)
        self.unreadable = 0
        self.unsaved: list[Measurement] = []
        try:
            self.study = open_study(self.where, study)
        except Exception as error:  # noqa: BLE001  any storage driver may raise its own kind
            raise LedgerError(f"cannot open the ledger {self.where!r}: {' '.join(str(error).split())}") from None
        self.points: dict[str, Measurement] = {}
        for trial in self.study.get_trials(deepcopy=False):
            self.take(trial.user_attrs.get("measurement"))

    def take(self, text: str | None) -> None:
        """Keep one stored point; one that this version cannot read (a plugin that is not loaded) is counted, not lost."""
        try:
            point = Measurement.from_json(text or "")
        except (ValidationError, RecipeError):
            self.unreadable += 1
            return
        self.points[point.key] = point

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.points)

    def rows(self) -> list[Measurement]:
        """Return every point, in the order in which they were first measured."""
        return list(self.points.values())

    def pareto(self, cost: Cost = "file_bytes") -> tuple[TradeoffPoint, ...]:
        """Return the points that no other beats in both quality and cost, cheapest first (see `workbench.tradeoff`)."""
        from workbench.tradeoff import pareto

        return pareto(self.rows(), cost) if self.points else ()

    def find(self, key: str) -> Measurement | None:
        """Return the point with this key, or None."""
        return self.points.get(key)

    def add(self, point: Measurement) -> None:
        """Write a complete point. If the storage fails, the point stays in memory and goes with the next one that succeeds.

        Raises:
            LedgerError: the storage refused it (a full disk, say); the point is still in `rows()`.

        """
        self.points[point.key] = point
        self.unsaved.append(point)
        while self.unsaved:
            try:
                self.study.add_trial(as_trial(self.unsaved[0]))
            except Exception as error:  # noqa: BLE001  any storage driver may raise its own kind
                repair(Path(self.where))
                raise LedgerError(f"{len(self.unsaved)} measured points are not on disk yet: cannot write {self.where!r}: {' '.join(str(error).split())}") from None
            self.unsaved.pop(0)


def as_trial(point: Measurement) -> optuna.trial.FrozenTrial:
    """Return the point as a finished trial: sliders as parameters, everything else as one attribute."""
    import optuna

    params: dict[str, Any] = {}
    for step in point.recipe:
        value = getattr(step, step.slider)
        if isinstance(value, int | float) and step.slider not in params:
            params[step.slider] = float(value)
    distributions: dict[str, Any] = {name: optuna.distributions.FloatDistribution(0.0, 1e6) for name in params}
    relative = 1 / point.latency.speedup.value if point.latency else float("nan")
    values = [max(-point.primary.drop.value, -WORST), float(point.sizes.file_bytes), relative if relative == relative else WORST]  # noqa: PLR0124
    attributes = {"key": point.key, "recipe": repr(point.recipe), "measurement": point.to_json()}
    return optuna.create_trial(params=params, distributions=distributions, values=values, user_attrs=attributes)


def open_study(where: str, study: str) -> optuna.Study:
    """Open or create an Optuna study in a journal file or at a storage URL."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in where:
        return load_or_create(optuna.storages.get_storage(where), study)
    path = Path(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_journal(path)
    lock = kernel_lock(path)
    lock.acquire()
    try:
        repair(path)
    finally:
        lock.release()
    storage = optuna.storages.JournalStorage(JournalFileBackend(where, lock_obj=lock))
    return load_or_create(storage, study)


def load_or_create(storage: optuna.storages.BaseStorage, study: str) -> optuna.Study:
    """Load a study, or create it; loading writes nothing, so that a full disk can still be read."""
    import optuna

    try:
        return optuna.load_study(storage=storage, study_name=study)
    except KeyError:
        return optuna.create_study(storage=storage, study_name=study, directions=list(DIRECTIONS), load_if_exists=True)


def check_journal(path: Path) -> None:
    """Refuse a file that is no journal before anything in it is touched.

    Raises:
        LedgerError: its first bytes are not those of a journal.

    """
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        if not MAGIC.startswith(start):
            raise LedgerError("the file is there already and is no ledger: give another path")


def kernel_lock(path: Path) -> BaseJournalFileLock:
    """Return a lock that the system releases when its holder dies: Optuna's own stays behind after kill -9."""
    from filelock import FileLock
    from optuna.storages.journal._file import BaseJournalFileLock

    class KernelLock(BaseJournalFileLock):
        def __init__(self) -> None:
            self.lock = FileLock(f"{path}.lock")

        def acquire(self) -> bool:
            self.lock.acquire()
            return True

        def release(self) -> None:
            self.lock.release()

    return KernelLock()


def repair(path: Path) -> None:
    """Cut off a last line that was not written to its end; Optuna would refuse the whole file."""
    if not path.is_file() or path.stat().st_size == 0:
        return
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
