"""The ledger: what was measured is found again, whatever happened to the process, the disk or the last
line."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from tiny_tasks import tiny_task

import workbench as wb
from workbench.bench import Bench
from workbench.errors import LedgerError
from workbench.ledger.ledger import Ledger, default_path
from workbench.measure.measurement import Measurement
from workbench.recipe import Recipe

RECIPE = Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Measurement:
    where = tmp_path_factory.mktemp("measured") / "points.journal"
    return Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False).measure(RECIPE)


def numbered(point: Measurement, number: int) -> Measurement:
    return dataclasses.replace(point, key=f"{number:016x}")


def keys(where: Path | str) -> list[int]:
    return [int(point.key, 16) for point in Ledger(where).rows()]


@pytest.fixture(params=["journal", "sqlite"])
def where(request, tmp_path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'points.db'}"
    return str(tmp_path / "deep" / "points.journal")


def test_a_point_comes_back_as_it_was(where, measured):
    ledger = Ledger(where)
    assert len(ledger) == 0
    ledger.add(measured)
    assert Ledger(where).rows() == [measured] == ledger.rows()
    assert Ledger(where).find(measured.key) == measured
    assert Ledger(where).find("0" * 16) is None
    assert isinstance(Ledger(where).rows()[0].recipe, Recipe)
    assert Measurement.from_json(measured.to_json()) == measured


def test_points_keep_their_order_and_a_repeated_one_its_place(where, measured):
    ledger = Ledger(where)
    for number in (3, 1, 2):
        ledger.add(numbered(measured, number))
    newer = dataclasses.replace(numbered(measured, 1), peak_memory_bytes=1)
    ledger.add(newer)
    for opened in (ledger, Ledger(where)):
        assert [int(point.key, 16) for point in opened.rows()] == [3, 1, 2]
        assert opened.find(newer.key).peak_memory_bytes == 1


def test_optuna_itself_reads_the_study(where, measured):
    Ledger(where).add(measured)
    storage = (
        where
        if "://" in where
        else optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(where))
    )
    study = optuna.load_study(study_name="workbench", storage=storage)
    assert study.directions == [
        optuna.study.StudyDirection.MAXIMIZE,
        *[optuna.study.StudyDirection.MINIMIZE] * 2,
    ]
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert trial.params == {"sparsity": 0.5, "weight_bits": 4.0}
    assert trial.values == pytest.approx(
        [-measured.primary.drop.value, measured.sizes.file_bytes, 1 / measured.latency.speedup.value]
    )
    assert trial.user_attrs["key"] == measured.key
    assert study.best_trials == [trial]


def test_a_point_that_was_measured_is_found_and_not_measured_again(where, monkeypatch):
    point = Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False).measure(RECIPE)
    monkeypatch.setattr("workbench.bench.compress", lambda *_: pytest.fail("measured again"))
    bench = Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False)
    assert bench.measure(RECIPE) == point
    assert list(bench.stream(RECIPE)) == [point]


def test_other_data_models_batches_and_levels_are_other_points(tmp_path):
    where = tmp_path / "points.journal"
    tasks = [tiny_task("vit"), tiny_task("resnet"), tiny_task("vit", evaluation=40)]
    point_keys = {
        Bench(task, device="cpu", ledger=where, progress=False).context.key(RECIPE) for task in tasks
    }
    point_keys |= {
        Bench(tasks[0], device="cpu", ledger=where, progress=False, latency_batch=4).context.key(RECIPE)
    }
    point_keys |= {
        Bench(tasks[0], device="cpu", ledger=where, progress=False, confidence=0.9).context.key(RECIPE)
    }
    assert len(point_keys) == 5


def test_infinite_and_missing_figures_survive(ledger, measured):
    odd = dataclasses.replace(
        measured,
        latency=None,
        peak_memory_bytes=None,
        missing={"latency": "no clock"},
        curve=((0, float("inf")),),
    )
    ledger.add(odd)
    again = Ledger(ledger.where).rows()[0]
    assert again == odd
    assert again.missing == {"latency": "no clock"}
    assert again.complete


# --- torn files


def test_whatever_is_torn_off_the_last_point_all_earlier_ones_come_back(tmp_path, measured):
    whole = tmp_path / "whole.journal"
    ledger = Ledger(whole)
    for number in (1, 2):
        ledger.add(numbered(measured, number))
    kept = whole.stat().st_size
    ledger.add(numbered(measured, 3))
    size = whole.stat().st_size
    offsets = sorted(
        {kept, kept + 1, size - 2, size - 1, size, *range(kept, size, max(1, (size - kept) // 50))}
    )
    assert len(offsets) >= 50
    for offset in offsets:
        torn = tmp_path / "torn.journal"
        shutil.copy(whole, torn)
        os.truncate(torn, offset)
        left = keys(torn)
        assert left in ([1, 2], [1, 2, 3])
        assert (left == [1, 2, 3]) == (offset >= size - 1), offset  # its line's end alone may be missing
        again = Ledger(torn)
        again.add(numbered(measured, 4))
        assert keys(torn) == [*left, 4]


def test_a_file_torn_within_its_first_line_starts_afresh(tmp_path, measured):
    where = tmp_path / "points.journal"
    Ledger(where)
    for size in (0, 1, 20):
        os.truncate(where, size)
        assert len(Ledger(where)) == 0
    Ledger(where).add(measured)
    assert len(Ledger(where)) == 1


ADD = """
import dataclasses, itertools, sys
from pathlib import Path
from workbench.ledger.ledger import Ledger
from workbench.measure.measurement import Measurement
where, source, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
point, ledger = Measurement.from_json(Path(source).read_text()), Ledger(where)
print("ready", flush=True)
for number in range(first, first + count):
    ledger.add(dataclasses.replace(point, key=f"{number:016x}"))
    print(number, flush=True)
"""


def adder(where: Path, source: Path, first: int, count: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", ADD, str(where), str(source), str(first), str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_process_killed_while_adding_loses_at_most_the_point_at_hand(tmp_path, measured):
    where, source = tmp_path / "points.journal", tmp_path / "point.json"
    source.write_text(measured.to_json())
    confirmed: list[int] = []
    for attempt, patience in enumerate((0.05, 0.2)):
        with adder(where, source, 1000 * attempt, 1000) as process:
            process.stdout.readline()
            time.sleep(patience)
            process.send_signal(signal.SIGKILL)
            confirmed += [int(line) for line in process.stdout.read().splitlines() if line]
        left = keys(where)
        assert [number for number in left if number in confirmed] == confirmed
        assert len(left) <= len(confirmed) + attempt + 1
    assert len(confirmed) > 10
    Ledger(where).add(numbered(measured, 9999))  # no lock was left behind
    assert 9999 in keys(where)


def test_two_processes_may_add_at_once(tmp_path, measured):
    where, source = tmp_path / "points.journal", tmp_path / "point.json"
    source.write_text(measured.to_json())
    with adder(where, source, 0, 30) as first, adder(where, source, 100, 30) as second:
        assert first.wait(60) == second.wait(60) == 0
    assert sorted(keys(where)) == [*range(30), *range(100, 130)]


# --- full and missing disks


def refuse(monkeypatch) -> None:
    """Let the disk be full when a line is to be made durable: half of it is there."""

    def full(descriptor: int) -> None:
        os.truncate(descriptor, os.fstat(descriptor).st_size - 50)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("workbench.ledger.journal.os.fsync", full)


def test_on_a_full_disk_the_point_stays_in_memory_and_is_written_later(tmp_path, measured, monkeypatch):
    where = tmp_path / "points.journal"
    ledger = Ledger(where)
    ledger.add(numbered(measured, 1))
    before = where.read_bytes()
    with monkeypatch.context() as patch:
        refuse(patch)
        with pytest.raises(
            LedgerError,
            match=r"1 measured points are not on disk yet: cannot write .*points\.journal'.*No space left",
        ):
            ledger.add(numbered(measured, 2))
        with pytest.raises(LedgerError, match="2 measured points are not on disk yet"):
            ledger.add(numbered(measured, 3))
        assert len(ledger) == 3
        assert where.read_bytes() == before  # Optuna's own backend would refuse half a line
        assert keys(where) == [1]
    ledger.add(numbered(measured, 4))
    assert keys(where) == [1, 2, 3, 4]
    assert ledger.unsaved == []


def test_bench_warns_of_a_full_disk_and_still_gives_the_point(tmp_path, monkeypatch):
    where = tmp_path / "points.journal"
    bench = Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False)
    with monkeypatch.context() as patch:
        refuse(patch)
        with pytest.warns(RuntimeWarning, match="1 measured points are not on disk yet"):
            point = bench.measure(RECIPE)
    assert point.complete
    assert bench.measure(RECIPE) is point
    bench.measure(Recipe(wb.Prune(sparsity=0.25)))
    assert len(Ledger(where)) == 2


def test_a_ledger_that_cannot_be_opened_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for where in (
        tmp_path / "file" / "points.journal",
        tmp_path,
        f"sqlite:///{tmp_path}/none/points.db",
        "nothing://x",
    ):
        with pytest.raises(LedgerError, match=r"^cannot open the ledger '") as caught:
            Ledger(where)
        assert "\n" not in str(caught.value), where


def test_a_file_that_is_no_ledger_is_refused_and_not_changed(tmp_path):
    for content in (b"my thesis\n", b'{"a": 1}\n', b"my thesis, the only copy"):
        where = tmp_path / "thesis.txt"
        where.write_bytes(content)
        with pytest.raises(LedgerError, match="cannot open the ledger"):
            Ledger(where)
        assert where.read_bytes() == content


def test_points_of_a_method_that_is_not_loaded_are_counted_and_kept(tmp_path, measured):
    where = tmp_path / "points.journal"
    ledger = Ledger(where)
    ledger.add(numbered(measured, 1))

    class Foreign:
        key, recipe, latency, primary, sizes = (
            "f" * 16,
            measured.recipe,
            measured.latency,
            measured.primary,
            measured.sizes,
        )

        def to_stored(self) -> dict[str, str]:
            stored = numbered(measured, 2).to_stored()
            foreign = stored["measurement"].replace('\\"step\\": \\"prune\\"', '\\"step\\": \\"shrink\\"')
            return stored | {"measurement": foreign}

    ledger.add(Foreign())
    again = Ledger(where)
    assert (len(again), again.unreadable) == (1, 1)
    again.add(numbered(measured, 3))
    assert keys(where) == [1, 3]


def test_the_default_place_is_the_users_state_and_a_plain_file_name(own_state):
    path = default_path("owner/model name")
    assert path.is_relative_to(own_state)
    assert path.name == "owner-model-name.journal"
    assert default_path("../../x").parent == path.parent


def test_reading_leaves_garbage_collection_as_it_was(tmp_path, measured):
    ledger = Ledger(tmp_path / "points.journal")
    ledger.add(measured)
    for collecting in (True, False):
        (gc.enable if collecting else gc.disable)()
        try:
            Ledger(ledger.where)
            with pytest.raises(LedgerError):
                Ledger(tmp_path)
            assert gc.isenabled() == collecting
        finally:
            gc.enable()
