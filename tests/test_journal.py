"""Points that are read late, and a journal that Optuna and the ledger read alike."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages.journal import JournalFileBackend
from pydantic import ValidationError
from tiny_tasks import tiny_task

import workbench as wb
from workbench.bench import Bench
from workbench.errors import LedgerError
from workbench.ledger.journal import Journal
from workbench.ledger.ledger import Ledger
from workbench.ledger.stored_points import point_in
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
    """Read a point at once, as `from_json` did before it left the layers for later."""
    return ADAPTER().validate_json(point.to_json())


def test_the_layers_of_a_stored_point_are_read_late_and_are_the_same(tmp_path, measured):
    where = tmp_path / "points.journal"
    Ledger(where).add(measured)
    (row,) = Ledger(where).rows()
    assert isinstance(row.layers, StoredLayers)
    assert row.to_json() == measured.to_json()
    assert row.layers.unread
    assert row.layers == measured.layers == everything(measured).layers
    assert not row.layers.unread
    assert len(row.layers) > 1
    assert row.layers[0] == measured.layers[0]
    assert list(row.layers[1:]) == list(measured.layers)[1:]


def test_a_stored_point_is_as_frozen_as_any_other_and_reading_it_changes_no_field(measured):
    row = Measurement.from_json(measured.to_json())
    before = {field.name: id(getattr(row, field.name)) for field in dataclasses.fields(row)}
    assert row.layers == measured.layers
    assert row.figures == measured.figures
    assert {field.name: id(getattr(row, field.name)) for field in dataclasses.fields(row)} == before
    for name in ("layers", "items", "stored"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(row, name, ())


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
        assert dataclasses.replace(same, recipe=Recipe()) == dataclasses.replace(measured, recipe=Recipe())
    assert json.loads(dataclasses.replace(Measurement.from_json(measured.to_json()), items=7).to_json()) == {
        **json.loads(measured.to_json()),
        "items": 7,
    }


TRICKS = (
    '"layers":[',
    '],"provenance":{',
    '{"layers":[],"provenance":{}}',
    "\\",
    'a "quoted" \\" end',
    "\u00e9\u4e2d\U0001f600",
    "\n",
)


@given(st.lists(st.sampled_from(TRICKS) | st.text(max_size=12), min_size=3, max_size=3))
def test_no_text_in_a_point_is_taken_for_the_marks_around_its_layers(measured, texts):
    name, outcome, why = (text.encode("utf-8", "ignore").decode() for text in texts)
    context, layer = (
        dataclasses.replace(measured.context, model_name=name),
        dataclasses.replace(measured.layers[0], outcome=outcome),
    )
    point = dataclasses.replace(
        measured,
        context=context,
        layers=(layer, *measured.layers[1:]),
        missing={"latency": why},
        warnings=(name, outcome),
    )
    back = Measurement.from_json(point.to_json())
    assert back == point == everything(point)
    assert back.layers[0].outcome == outcome
    line = (
        json.dumps(
            {
                "op_code": 4,
                "study_id": 0,
                "user_attrs": {"recipe": name, "measurement": point.to_json(), "why": why},
                "system_attrs": {outcome: why},
            },
            separators=(",", ":"),
        ).encode()
        + b"\n"
    )
    late = point_in(line, 0)
    assert late == point
    assert late.to_json() == point.to_json()
    assert point_in(line, 1) is None


def test_figures_are_what_the_point_says_also_of_a_changed_copy(measured):
    late = Measurement.from_json(measured.to_json())
    for row in (
        measured,
        late,
        dataclasses.replace(late, items=late.items - 1),
        pickle.loads(pickle.dumps(late)),  # noqa: S301
    ):
        change = row.primary.change
        assert row.figures == (
            row.complete,
            (row.context.model_fingerprint, row.context.data_fingerprint),
            row.primary.metric,
            (change.value, change.low, change.high),
            row.sizes.file_bytes,
        )
    assert not dataclasses.replace(late, items=late.items - 1).figures.complete


def test_points_stored_otherwise_are_read_at_once(measured):
    spaced = json.dumps(json.loads(measured.to_json()), indent=1)
    assert Measurement.from_json(spaced) == measured
    none = dataclasses.replace(measured, layers=())
    assert Measurement.from_json(none.to_json()) == none
    for text in ("", "{}", '{"layers":[],"provenance":{', measured.to_json()[:-9]):
        with pytest.raises(ValidationError):
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


def test_optuna_is_shown_the_studies_and_what_this_process_wrote_alone(tmp_path, measured):
    where = tmp_path / "points.journal"
    first = Ledger(where)
    for number in (1, 2):
        first.add(numbered(measured, number))
    other = optuna.create_study(
        storage=optuna.storages.JournalStorage(Journal(where)), study_name="another", directions=["minimize"]
    )
    other.tell(other.ask(), 1.0)
    mine = Ledger(where)
    assert [len(mine.book.trials), len(mine.study.trials)] == [0, 2]
    first.add(numbered(measured, 3))
    mine.add(numbered(measured, 4))
    mine.annotate(f"{1:016x}", note="kept")
    for _ in range(2):
        mine.refresh()
    assert [len(mine.book.trials), len(mine.study.trials)] == [1, 4]
    assert sorted(int(row.key, 16) for row in mine.rows()) == [1, 2, 3, 4]
    assert mine.unreadable == 0  # the other study's trial is not ours
    assert Ledger(where).annotations() == mine.annotations() != {}
    assert [trial.user_attrs["key"] for trial in mine.study.trials] == [
        f"{number:016x}" for number in (1, 2, 3, 4)
    ]


def test_a_broken_line_that_another_process_wrote_is_named_each_time_and_hides_nothing_before_it(
    tmp_path, measured
):
    where = tmp_path / "points.journal"
    ledger, other = Ledger(where), Ledger(where)
    other.add(numbered(measured, 1))
    with where.open("ab") as file:
        file.write(b'{"op_code":4,"study_id"~0}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="JSON|delimiter|expected"):
            ledger.refresh()
        assert [int(row.key, 16) for row in ledger.rows()] == [1]


def test_what_another_process_added_is_taken_over_once(tmp_path, measured):
    where = tmp_path / "points.journal"
    one, other = Ledger(where), Ledger(where)
    for number in range(1, 4):
        one.add(numbered(measured, number))
        other.refresh()
        other.refresh()
        assert [int(row.key, 16) for row in other.rows()] == list(range(1, number + 1))
    other.add(numbered(measured, 4))
    one.refresh()
    assert one.rows() == other.rows() == Ledger(where).rows()
    assert one.find(f"{4:016x}") == numbered(measured, 4)


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


def test_a_broken_line_in_the_middle_is_refused_and_not_changed(tmp_path, measured):
    where = tmp_path / "points.journal"
    ledger = Ledger(where)
    for number in (1, 2):
        ledger.add(numbered(measured, number))
    content = where.read_bytes().replace(b'"op_code":4', b'"op_code"~4', 1)
    where.write_bytes(content)
    with pytest.raises(LedgerError, match="cannot open the ledger"):
        Ledger(where)
    assert where.read_bytes() == content
