"""A damaged line of a ledger costs that line; a ledger that may not be written is read; no point is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_tasks import tiny_task

import workbench as wb
from workbench.bench import Bench
from workbench.cli import workbench
from workbench.errors import LedgerError
from workbench.ledger import table
from workbench.ledger.ledger import Ledger
from workbench.measure.measurement import Measurement
from workbench.recipe import Recipe

NOBODY = 65534  # a user who owns nothing


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Measurement:
    where = tmp_path_factory.mktemp("measured") / "points.journal"
    return Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False).measure(
        Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4))
    )


def numbered(point: Measurement, number: int) -> Measurement:
    return dataclasses.replace(point, key=f"{number:016x}")


def keys(ledger: Ledger) -> list[int]:
    return [int(row.key, 16) for row in ledger.rows()]


@pytest.fixture
def where(tmp_path, measured) -> Path:
    """Six points, with a note and a pin among them: a study, six trials, two attributes in nine lines."""
    path = tmp_path / "points.journal"
    ledger = Ledger(path)
    for number in range(1, 4):
        ledger.add(numbered(measured, number))
    ledger.annotate(f"{1:016x}", note="kept", pinned=True)
    for number in range(4, 7):
        ledger.add(numbered(measured, number))
    return path


def changed(line: bytes, **changes) -> bytes:
    record = json.loads(line)
    for name, value in changes.items():
        if value is ...:
            record.pop(name)
        else:
            record[name] = value
    return json.dumps(record).encode()


def attribute(line: bytes, **changes) -> bytes:
    return changed(line, user_attrs={**json.loads(line)["user_attrs"], **changes})


def cut_measurement(line: bytes) -> bytes:
    return attribute(line, measurement=json.loads(line)["user_attrs"]["measurement"][:300])


def other_measurement(line: bytes, **changes) -> bytes:
    measurement = json.loads(json.loads(line)["user_attrs"]["measurement"]) | changes
    return attribute(line, measurement=json.dumps(measurement))


DAMAGE = {  # of a line that made a trial: every one costs the point of that line and no other
    "cut": lambda line: line[: len(line) // 2],
    "cut within its number": lambda line: line[:12],
    "trailing garbage": lambda line: line + b"}}garbage",
    "leading garbage": lambda line: b">>>>>>> theirs " + line,
    "not UTF-8": lambda line: line[:200] + b"\xff\xfe\x80" + line[203:],
    "NUL bytes": lambda line: b"\0" * len(line),
    "NUL bytes within": lambda line: line[:100] + b"\0" * 50 + line[150:],
    "UTF-16": lambda line: b"\xff\xfe" + line.decode().encode("utf-16-le").replace(b"\n", b""),
    "noise": lambda line: random.Random(1).randbytes(len(line)).replace(b"\n", b"?"),  # noqa: S311
    "a flipped bit": lambda line: line[:1] + bytes([line[1] ^ 0x40]) + line[2:],
    "a list": lambda line: b"[" + line + b"]",
    "a number": lambda line: b"7",
    "a text": lambda line: b'"op_code"',
    "null": lambda line: b"null",
    "an empty object": lambda line: b"{}",
    "nested without end": lambda line: b"[" * 100_000,
    "nested": lambda line: b'{"op_code":' * 5000 + b"1" + b"}" * 5000,
    "single quotes": lambda line: line.replace(b'"', b"'"),
    "an unknown operation": lambda line: changed(line, op_code=99),
    "a negative operation": lambda line: changed(line, op_code=-1),
    "an operation in words": lambda line: changed(line, op_code="4"),
    "an operation that is true": lambda line: changed(line, op_code=True),
    "an operation with a fraction": lambda line: changed(line, op_code=4.5),
    "no worker": lambda line: changed(line, worker_id=...),
    "a study that does not exist": lambda line: changed(line, study_id=7),
    "a study below 0": lambda line: changed(line, study_id=-1),
    "a study in words": lambda line: changed(line, study_id="0"),
    "no study": lambda line: changed(line, study_id=...),
    "a trial that does not exist": lambda line: changed(line, op_code=8, trial_id=400, user_attr={"a": 1}),
    "a trial in words": lambda line: changed(line, op_code=8, trial_id="one", user_attr={"a": 1}),
    "no attribute": lambda line: changed(line, op_code=2, user_attr={}),
    "attributes in a list": lambda line: changed(line, user_attrs=["measurement"]),
    "attributes in words": lambda line: changed(line, user_attrs="measurement"),
    "a state that does not exist": lambda line: changed(line, state=17),
    "a date that is none": lambda line: changed(line, datetime_start="yesterday"),
    "distributions in a list": lambda line: changed(line, distributions=[1]),
    "a distribution that is none": lambda line: changed(line, distributions={"sparsity": "Normal"}),
    "a parameter without distribution": lambda line: changed(line, params={"what": 1.0}),
    "two values in place of three": lambda line: changed(line, values=[0.0, 1.0]),
    "values in words": lambda line: changed(line, values=["a", "b", "c"]),
    "no measurement": lambda line: changed(line, user_attrs={}),
    "half a measurement": cut_measurement,
    "a measurement that is a number": lambda line: attribute(line, measurement=3),
    "a measurement without quality": lambda line: other_measurement(line, quality=[]),
    "a metric that is unknown": lambda line: other_measurement(
        line,
        quality=[json.loads(json.loads(line)["user_attrs"]["measurement"])["quality"][0] | {"metric": "?"}],
    ),
    "a file of no bytes": lambda line: other_measurement(
        line, sizes={"theoretical_bytes": 0, "packed_bytes": 0, "file_bytes": 0}
    ),
    "layers that are cut": lambda line: attribute(line, layers='[{"name": "a'),
    "layers that are a number": lambda line: attribute(line, layers=3),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_costs_that_line_is_counted_and_its_number_said(where, measured, kind):
    lines = where.read_bytes().splitlines()
    assert json.loads(lines[2])["op_code"] == 4  # the third line of the file made the second point
    lines[2] = DAMAGE[kind](lines[2])
    assert b"\n" not in lines[2]
    where.write_bytes(b"\n".join(lines) + b"\n")
    before = where.read_bytes()
    ledger = Ledger(where)
    assert keys(ledger) == [1, 3, 4, 5, 6]
    assert ledger.annotations()[f"{1:016x}"].note == "kept"
    assert [line for line, _ in ledger.left_out] == [3]
    assert ledger.unreadable == 1
    assert ledger.damage().startswith("1 points or lines of the ledger cannot be read here")
    assert "line 3: " in ledger.damage()
    assert where.read_bytes() == before
    ledger.add(numbered(measured, 7))  # and all goes on
    ledger.annotate(f"{7:016x}", note="new")
    again = Ledger(where)
    assert keys(again) == [1, 3, 4, 5, 6, 7] == keys(ledger)
    assert again.annotations()[f"{7:016x}"].note == "new"
    assert [line for line, _ in again.left_out] == [3]
    assert where.read_bytes().startswith(before)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_that_comes_while_the_ledger_is_open_costs_that_line_too(where, measured, kind):
    ledger, line = Ledger(where), where.read_bytes().splitlines()[2]
    with where.open("ab") as file:
        file.write(DAMAGE[kind](line) + b"\n")
    for _ in range(2):
        ledger.refresh()
        assert (keys(ledger), ledger.unreadable) == ([1, 2, 3, 4, 5, 6], 1)
    assert [number for number, _ in ledger.left_out] == [where.read_bytes().count(b"\n")]
    ledger.add(numbered(measured, 7))
    assert keys(Ledger(where)) == [1, 2, 3, 4, 5, 6, 7]


FIRST = {
    "cut": lambda line: line[:40],
    "gone": None,
    "garbage": lambda line: b"<<<<<<< HEAD",
    "a BOM before it": lambda line: b"\xef\xbb\xbf" + line,
    "no directions": lambda line: changed(line, directions=[]),
    "directions in words": lambda line: changed(line, directions="up"),
    "no name": lambda line: changed(line, study_name=...),
    "blank lines before it": lambda line: b"\n \n" + line,
}


@pytest.mark.parametrize("kind", FIRST)
def test_without_its_first_line_all_points_are_there(where, measured, kind):
    first, *rest = where.read_bytes().splitlines()
    lines = rest if FIRST[kind] is None else [FIRST[kind](first), *rest]
    where.write_bytes(b"\n".join(lines) + b"\n")
    ledger = Ledger(where)
    assert keys(ledger) == [1, 2, 3, 4, 5, 6]
    whole = kind in {"gone", "a BOM before it", "blank lines before it"}
    assert [line for line, _ in ledger.left_out] == ([] if whole else [1])
    ledger.add(numbered(measured, 7))
    again = Ledger(where)
    assert keys(again) == [1, 2, 3, 4, 5, 6, 7]
    assert again.annotations()[f"{1:016x}"].pinned


def test_lines_that_are_there_twice_are_points_that_are_there_once(where):
    lines = where.read_bytes().splitlines(keepends=True)
    where.write_bytes(b"".join(line * 3 for line in lines))
    ledger = Ledger(where)
    assert keys(ledger) == [1, 2, 3, 4, 5, 6]
    assert ledger.unreadable == 0
    assert ledger.annotations()[f"{1:016x}"].note == "kept"


def test_windows_line_ends_and_spaces_do_no_harm(where, measured):
    where.write_bytes(where.read_bytes().replace(b"\n", b"  \r\n"))
    Ledger(where).add(numbered(measured, 7))
    again = Ledger(where)
    assert (keys(again), again.unreadable) == ([1, 2, 3, 4, 5, 6, 7], 0)


def test_a_huge_line_is_passed_over_without_being_held(where, monkeypatch):
    monkeypatch.setattr("workbench.ledger.journal_lines.LONGEST", 100_000)
    monkeypatch.setattr("workbench.ledger.journal_lines.AT_ONCE", 1000)
    lines = where.read_bytes().splitlines(keepends=True)
    assert max(map(len, lines)) < 100_000
    for size in (100_000, 100_001, 777_777):
        where.write_bytes(b"".join([*lines[:4], b"x" * size + b"\n", *lines[4:]]))
        ledger = Ledger(where)
        assert (keys(ledger), [line for line, _ in ledger.left_out]) == ([1, 2, 3, 4, 5, 6], [5])


def test_hundreds_of_damaged_lines_take_no_time_of_their_own(where):
    lines = where.read_bytes().splitlines(keepends=True)
    bad = changed(lines[2], datetime_start="yesterday") + b"\n"  # Optuna itself finds this one
    where.write_bytes(b"".join([lines[0], *[bad] * 400, *lines[1:]]))
    begin = time.perf_counter()
    ledger = Ledger(where)
    assert (keys(ledger), ledger.unreadable) == ([1, 2, 3, 4, 5, 6], 400)
    assert time.perf_counter() - begin < 10
    assert "line 2: " in ledger.damage()
    assert "and 395 more" in ledger.damage()
    assert len(ledger.damage()) < 600


def test_a_last_line_that_was_torn_is_said_once(where):
    content = where.read_bytes()
    where.write_bytes(content[:-100])
    ledger = Ledger(where)
    assert keys(ledger) == [1, 2, 3, 4, 5]
    assert ledger.left_out == [(9, "it was not written to its end, and was cut off")]
    assert Ledger(where).unreadable == 0


def test_the_command_says_which_lines_it_leaves_out(where, measured, tmp_path):
    lines = where.read_bytes().splitlines()
    lines[2], lines[7] = b"garbage", changed(lines[7], study_id=9)
    where.write_bytes(b"\n".join(lines) + b"\n")
    name = measured.context.model_name
    for more in ([], ["--output", str(tmp_path / "out.csv")]):
        run = CliRunner().invoke(workbench, ["points", name, "--ledger", str(where), *more])
        assert run.exit_code == 0
        assert re.search(r"2 points or lines .*line 3: .*; line 8: there is no study 9", run.output)


# --- ledgers that may not be written


@contextlib.contextmanager
def as_nobody():
    """Be a user who owns nothing, so that permissions hold also where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(where, tmp_path):
    """A ledger in a folder that cannot be written."""
    for path in tmp_path.glob("*.lock"):
        path.unlink()
    for folder in tmp_path.parents:  # pytest's own folders are closed to others
        if os.geteuid() == 0 and len(folder.parts) > 2:
            folder.chmod(0o755)
    where.chmod(0o444)
    tmp_path.chmod(0o555)
    yield where
    tmp_path.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_ledger_that_may_not_be_written_is_read_and_a_write_says_where_the_point_is(
    read_only, measured, tmp_path_factory, monkeypatch
):
    state = tmp_path_factory.mktemp("nobody")
    state.chmod(0o777)
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    before = read_only.read_bytes()
    with as_nobody():
        ledger = Ledger(read_only)
        assert keys(ledger) == [1, 2, 3, 4, 5, 6]
        assert ledger.annotations()[f"{1:016x}"].note == "kept"
        with pytest.raises(
            LedgerError, match=r"cannot write .*Permission denied.*they are kept in '(.*)'"
        ) as caught:
            ledger.add(numbered(measured, 7))
        with pytest.raises(LedgerError, match="2 measured points are not on disk yet"):
            ledger.add(numbered(measured, 8))
        with pytest.raises(LedgerError, match=r"cannot write the note .*Permission denied.*copy it to where"):
            ledger.annotate(f"{1:016x}", note="new")
        assert len(ledger) == 8
        place = re.search(r"kept in '(.*?)'", str(caught.value))[1]
        assert keys(Ledger(place)) == [7, 8]
    assert read_only.read_bytes() == before
    assert list(read_only.parent.iterdir()) == [read_only]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_last_point_of_a_read_only_ledger_may_lack_the_end_of_its_line(read_only):
    read_only.write_bytes(read_only.read_bytes()[:-1])
    with as_nobody():
        assert keys(Ledger(read_only)) == [1, 2, 3, 4, 5, 6]


def test_points_that_were_kept_elsewhere_go_home_once_that_can_be(where, measured, monkeypatch):
    ledger = Ledger(where)
    with monkeypatch.context() as patch:
        append = type(ledger.journal).append_logs

        def refuse(journal, logs):
            if journal is ledger.journal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(journal, logs)

        patch.setattr(type(ledger.journal), "append_logs", refuse)
        with pytest.raises(LedgerError, match="No space left on device; they are kept in") as caught:
            ledger.add(numbered(measured, 7))
    place = Path(re.search(r"kept in '(.*?)'", str(caught.value))[1])
    assert keys(Ledger(place)) == [7]
    ledger.add(numbered(measured, 8))
    assert keys(Ledger(where)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not place.exists()
    assert not Path(f"{place}.lock").exists()


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="who holds a lock is told by Linux")
def test_a_lock_that_another_process_holds_is_said_after_a_second(where, measured):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, f"{where}.lock"], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            begin = time.monotonic()
            ledger = Ledger(where)
            assert keys(ledger) == [1, 2, 3, 4, 5, 6]  # reading needs no lock
            begin, opened = time.monotonic(), time.monotonic() - begin
            with pytest.raises(LedgerError, match=rf"process {holder.pid} \(.*-c.* holds its lock .*\.lock'"):
                ledger.add(numbered(measured, 7))
            assert 0.9 < time.monotonic() - begin < 4
            assert opened < 4
        finally:
            holder.kill()
    ledger.add(numbered(measured, 8))
    assert keys(Ledger(where)) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_bench_says_before_it_measures_that_its_ledger_can_only_be_read(read_only):
    task = tiny_task("vit")
    with as_nobody(), pytest.warns(RuntimeWarning, match=r"can only be read now .*Permission denied"):
        Bench(task, device="cpu", ledger=read_only, progress=False)


def test_the_panel_says_what_of_its_ledger_cannot_be_read(tmp_path):
    from widgets.session.model_choice import ModelChoice
    from widgets.session.session import Session

    where = tmp_path / "points.journal"
    Ledger(where)
    with where.open("ab") as file:
        file.write(b"<<<<<<< HEAD\n")
    session = Session(ledger=where, progress=False)
    session.loader.load_now(ModelChoice(tiny_task("vit"), device="cpu"))
    session.read_past()
    assert "1 points or lines of the ledger cannot be read here" in session.state.past.damage
    assert "line 2: no line of a journal" in session.state.past.damage
    session.close()


@pytest.mark.skipif(os.name != "posix", reason="a pipe with a name")
def test_what_is_no_file_is_refused_and_waits_for_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for where in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(LedgerError, match="it is no file"):
            Ledger(where)


# --- exported tables


def test_an_exported_table_is_whole_or_not_there(measured, tmp_path, monkeypatch):
    rows = [numbered(measured, 1)]
    for name in ("points.csv", "points.jsonl"):
        with monkeypatch.context() as patch:
            patch.setattr(table.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(LedgerError, match="cannot write"):
                table.save_points(rows, tmp_path / name)
        assert list(tmp_path.glob("*")) == list(tmp_path.glob(".*")) == []
    first = table.save_points(rows, tmp_path / "points.csv")
    second = table.save_points(rows, tmp_path / "points.csv")
    assert [first.name, second.name] == ["points.csv", "points-2.csv"]
    assert first.read_bytes() == second.read_bytes()
    monkeypatch.setattr(
        Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links"))
    )
    third = table.save_points(rows, tmp_path / "points.csv")
    assert third.name == "points-3.csv"
    assert third.read_bytes() == first.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["points-2.csv", "points-3.csv", "points.csv"]
