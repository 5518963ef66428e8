"""Points that are read late, and a journal that Optuna and the ledger read alike."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages.journal import JournalFileBackend
from tiny_tasks import tiny_task

import workbench as wb
from workbench.bench import Bench
from workbench.cli import workbench
from workbench.ledger.journal import Journal
from workbench.ledger.ledger import Annotation, Ledger
from workbench.measure.measurement import ADAPTER, Measurement
from workbench.measure.stored_layers import StoredLayers
from workbench.recipe import Recipe


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Measurement:
    where = tmp_path_factory.mktemp("measured") / "points.journal"
    return Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False).measure(
        Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4))
    )


def numbered(point: Measurement, number: int) -> Measurement:
    return dataclasses.replace(point, key=f"{number:016x}")


def everything(point: Measurement) -> Measurement:
    """Read a point at once, as `from_json` does not: it leaves the layers for later."""
    return ADAPTER().validate_json(point.to_json())


def test_the_layers_of_a_stored_point_are_read_late_and_are_the_same(tmp_path, measured):
    where = tmp_path / "points.journal"
    Ledger(where).add(measured)
    (row,) = Ledger(where).rows()
    assert isinstance(row.layers, StoredLayers)
    assert row.layers.unread
    assert row.to_stored() == measured.to_stored()
    assert row.layers.unread
    assert row.layers == measured.layers == everything(measured).layers
    assert measured.layers == row.layers
    assert row.layers != measured.layers[1:]
    assert len(row.layers) == len(measured.layers) > 1
    assert (row.layers[0], row.layers[1:]) == (measured.layers[0], measured.layers[1:])
    assert row.to_json() == measured.to_json()


def test_a_measurement_is_frozen_and_has_its_fields_alone(measured):
    for row in (measured, Measurement.from_json(measured.to_json())):
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.items = 1
        with pytest.raises(AttributeError, match="has no attribute 'layer'"):
            row.layer  # noqa: B018  asking is the test
        assert list(vars(row)) == [field.name for field in dataclasses.fields(row)]


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda row: pickle.loads(pickle.dumps(row)),  # noqa: S301
        lambda row: dataclasses.replace(row, items=row.items),
    ],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
def test_a_point_read_late_is_like_any_other(measured, again):
    assert measured == everything(measured)
    for same in (again(Measurement.from_json(measured.to_json())), Measurement.from_json(measured.to_json())):
        assert same == measured
        assert measured == same
        assert repr(same) == repr(measured)
        assert hash(same.layers) == hash(measured.layers)
    assert json.loads(dataclasses.replace(Measurement.from_json(measured.to_json()), items=7).to_json()) == {
        **json.loads(measured.to_json()),
        "items": 7,
    }


@given(st.lists(st.text(max_size=12), min_size=3, max_size=3))
def test_any_text_in_a_point_comes_back(measured, texts):
    name, outcome, why = (text.encode("utf-8", "ignore").decode() for text in texts)
    point = dataclasses.replace(
        measured,
        context=dataclasses.replace(measured.context, model_name=name),
        layers=(dataclasses.replace(measured.layers[0], outcome=outcome), *measured.layers[1:]),
        missing={"latency": why},
        warnings=(name, outcome),
    )
    stored = json.loads(json.dumps(point.to_stored()))
    assert Measurement.from_json(point.to_json()) == point == everything(point)
    assert Measurement.from_json(stored["measurement"], stored["layers"]) == point


def test_points_written_otherwise_are_read_too(measured):
    spaced = json.dumps(json.loads(measured.to_json()), indent=1)
    assert Measurement.from_json(spaced) == measured
    none = dataclasses.replace(measured, layers=())
    assert Measurement.from_json(none.to_json()) == none
    for text in ("", "{}", "[]", "7", '{"layers":[],"provenance":{', measured.to_json()[:-9]):
        with pytest.raises(ValueError, match="validation error|EOF|no measurement"):
            Measurement.from_json(text)


def test_the_journal_reads_what_optuna_reads_and_the_other_way_round(tmp_path, measured):
    where = tmp_path / "points.journal"
    theirs = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(where))),
        study_name="workbench",
        directions=["maximize", "minimize", "minimize"],
    )
    mine = Ledger(where)
    mine.add(numbered(measured, 1))
    trial = theirs.ask({"sparsity": optuna.distributions.FloatDistribution(0, 1)})
    trial.set_user_attr("who", "another tool: \u00e9 \ud800")  # half of a pair: json reads it
    theirs.tell(trial, [-math.inf, math.inf, 1e-300])
    mine.add(numbered(measured, 2))
    mine.annotate(f"{2:016x}", note="kept", pinned=True)
    mine.refresh()
    assert [int(row.key, 16) for row in mine.rows()] == [1, 2]
    assert mine.unreadable == 1  # the other tool's
    fresh = [
        optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="workbench")
        for backend in (JournalFileBackend(str(where)), Journal(where))
    ]
    assert fresh[0].trials == fresh[1].trials == mine.study.trials == theirs.trials
    assert len(fresh[0].trials) == 3
    assert fresh[0].user_attrs == fresh[1].user_attrs == theirs.user_attrs != {}


def test_points_of_another_study_in_the_same_file_are_not_ours(tmp_path, measured):
    where = tmp_path / "points.journal"
    first = Ledger(where)
    first.add(numbered(measured, 1))
    second_study = optuna.create_study(
        storage=optuna.storages.JournalStorage(Journal(where)), study_name="another", directions=["minimize"]
    )
    second_study.tell(second_study.ask(), 1.0)
    mine = Ledger(where)
    first.add(numbered(measured, 2))
    mine.add(numbered(measured, 3))
    mine.annotate(f"{1:016x}", note="kept")
    for _ in range(2):
        mine.refresh()
    assert sorted(int(row.key, 16) for row in mine.rows()) == [1, 2, 3]
    assert mine.unreadable == 0
    assert Ledger(where).annotations() == mine.annotations() != {}
    assert [trial.user_attrs["key"] for trial in mine.study.trials] == [
        f"{number:016x}" for number in (1, 2, 3)
    ]


def test_what_another_process_added_is_taken_over_once(tmp_path, measured):
    where = tmp_path / "points.journal"
    mine, theirs = Ledger(where), Ledger(where)
    for number in range(1, 4):
        mine.add(numbered(measured, number))
        theirs.refresh()
        theirs.refresh()
        assert [int(row.key, 16) for row in theirs.rows()] == list(range(1, number + 1))
    theirs.add(numbered(measured, 4))
    mine.refresh()
    assert mine.rows() == theirs.rows() == Ledger(where).rows()
    assert mine.find(f"{4:016x}") == numbered(measured, 4)


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path, measured):
    where = tmp_path / "points.journal"
    ledger = Ledger(where)
    ledger.add(numbered(measured, 1))
    before = where.stat().st_size
    ledger.add(numbered(measured, 2))
    line = where.read_bytes()[before:]
    os.truncate(where, before)
    reader = Ledger(where)
    for part in (line[:100], line[100:-1]):
        with where.open("ab") as file:
            file.write(part)
        reader.refresh()
        assert len(reader) == 1
    with where.open("ab") as file:
        file.write(line[-1:])
    reader.refresh()
    assert [int(row.key, 16) for row in reader.rows()] == [1, 2]


BROKEN = {
    "garbage": b'{"op_code":4,"study_id"~0}',
    "a merge": b"<<<<<<< HEAD",
    "no object": b"[1]",
    "no operation": b'{"key":1}',
    "half a line": b'{"op_code":4,"study_id":0,"user_attrs":{"measurement":"{',
    "not UTF-8": b'{"op_code":4,"name":"\xff"}',
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_hides_no_other_is_counted_and_not_changed(tmp_path, measured, line):
    where = tmp_path / "points.journal"
    ledger = Ledger(where)
    ledger.add(numbered(measured, 1))
    with where.open("ab") as file:
        file.write(line + b"\n")
    for reader in (ledger, Ledger(where)):
        reader.add(numbered(measured, 2))
        for _ in range(2):
            reader.refresh()
            assert [int(row.key, 16) for row in reader.rows()] == [1, 2]
            assert reader.unreadable == 1
    fresh = Ledger(where)
    assert len(fresh.study.trials) == 3  # the second was written twice
    assert (len(fresh), fresh.unreadable) == (2, 1)
    assert line + b"\n" in where.read_bytes()


def test_the_command_says_what_it_cannot_read(tmp_path, measured):
    where = tmp_path / "points.journal"
    Ledger(where).add(measured)
    message = "cannot be read here"
    command = ["points", measured.context.model_name, "--ledger", str(where)]
    assert message not in CliRunner().invoke(workbench, command).output
    with where.open("ab") as file:
        file.write(b"<<<<<<< HEAD\n")
    run = CliRunner().invoke(workbench, command)
    assert (run.exit_code, f"1 points or lines of the ledger {message}" in run.output) == (0, True)


def test_blank_lines_are_no_lines(tmp_path, measured):
    where = tmp_path / "points.journal"
    Ledger(where).add(numbered(measured, 1))
    with where.open("ab") as file:
        file.write(b"\n  \n")
    Ledger(where).add(numbered(measured, 2))
    again = Ledger(where)
    assert [int(row.key, 16) for row in again.rows()] == [1, 2]
    assert again.unreadable == 0


def test_a_file_whose_first_line_is_broken_keeps_its_points(tmp_path, measured):
    where = tmp_path / "points.journal"
    Ledger(where).add(measured)
    content = where.read_bytes().replace(b'"op_code":0', b'"op_code":~', 1)
    where.write_bytes(content)
    ledger = Ledger(where)
    assert (len(ledger), [line for line, _ in ledger.left_out]) == (1, [1])
    assert where.read_bytes() == content


def test_what_only_lacks_the_end_of_its_last_line_is_whole(tmp_path, measured):
    where = tmp_path / "points.journal"
    Ledger(where).add(numbered(measured, 1))
    os.truncate(where, where.stat().st_size - 1)  # as some editors leave a file
    Ledger(where).add(numbered(measured, 2))
    assert [int(row.key, 16) for row in Ledger(where).rows()] == [1, 2]


OLD = Path(__file__).parent / "ledgers" / "written-by-fd6f1cb.journal"  # points with their layers in one text


def holds(now, before) -> bool:
    """Return whether all that was written is there as it was; a later version may add facts."""
    if isinstance(before, str) and before.startswith("[{"):  # a recipe
        return holds(json.loads(now), json.loads(before))
    if isinstance(before, dict):
        return all(name in now and holds(now[name], value) for name, value in before.items())
    if isinstance(before, list):
        return len(now) == len(before) and all(map(holds, now, before))
    return now == before or (now != now and before != before)  # noqa: PLR0124  NaN


def test_a_ledger_that_an_earlier_version_wrote_opens_and_takes_new_points(tmp_path, measured):
    where = tmp_path / "points.journal"
    shutil.copy(OLD, where)
    ledger = Ledger(where)
    added = numbered(measured, 9)
    ledger.add(added)
    written = [
        json.loads(line)["user_attrs"]["measurement"]
        for line in OLD.read_text().splitlines()
        if '"op_code":4' in line
    ]
    for again in (ledger, Ledger(where)):
        assert again.unreadable == 0
        *old, new = again.rows()
        assert new == added
        for row, text in zip(old, written, strict=True):
            assert holds(json.loads(row.to_json()), json.loads(text))
        assert [len(row.layers) for row in old] == [len(json.loads(text)["layers"]) for text in written]
        assert again.annotations() == {old[0].key: Annotation("the one to ship \u00e9", pinned=True)}
        assert again.find(old[1].key) is old[1]
        assert isinstance(old[0].recipe, Recipe)
        assert math.isinf(old[2].curve[0][1])
    assert where.read_bytes().startswith(OLD.read_bytes())
