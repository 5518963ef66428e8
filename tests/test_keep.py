"""Keeping points: notes and pins in the ledger, tables in files, points side by side, the report's own
process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import optuna
import pandas as pd
import pytest
from tiny_tasks import tiny_task

import workbench as wb
from widgets.figures.compare_html import comparison_html
from widgets.panes.compare_view import CompareView
from widgets.panes.history_view import HistoryView, arranged, line_of
from widgets.panes.keep_bar import WAIT, KeepBar
from widgets.session.state import PanelState, Past
from workbench.errors import LedgerError, RecipeError
from workbench.ledger.annotation import Annotation
from workbench.ledger.ledger import Ledger
from workbench.ledger.table import points_frame, save_points
from workbench.measure.measurement import Measurement
from workbench.search.compare import Apart, choices_of, comparison, facts, paired_test

W4 = wb.Recipe(wb.Quantize(weight_bits=4))
BOTH = wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4))
TWICE = wb.Recipe(
    wb.Quantize(weight_bits=8, targets=("*q_proj",)), wb.Quantize(weight_bits=2, targets=("*fc1",))
)
NOTE = 'schön <b>\N{SLIGHTLY SMILING FACE}</b>, "quoted"\nsecond line, 中文'


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    opened = wb.Bench(
        tiny_task("vit"),
        device="cpu",
        ledger=tmp_path_factory.mktemp("points") / "points.journal",
        progress=False,
    )
    for recipe in (W4, BOTH, TWICE):
        opened.measure(recipe)
    return opened


@pytest.fixture
def rows(bench):
    return bench.ledger.rows()


@pytest.fixture(params=["journal", "sqlite"])
def kept(request, tmp_path, rows):
    ledger = Ledger(
        tmp_path / "points.journal" if request.param == "journal" else f"sqlite:///{tmp_path / 'points.db'}"
    )
    for row in rows:
        ledger.add(row)
    return ledger


# --- notes and pins


def test_notes_and_pins_come_back_and_the_newest_wins(kept, rows):
    key = rows[0].key
    assert kept.annotations() == {}
    assert kept.annotate(key, note=NOTE) == Annotation(NOTE)
    assert kept.annotate(key, pinned=True) == Annotation(NOTE, pinned=True)
    kept.annotate(rows[1].key, pinned=True)
    again = Ledger(kept.where)
    assert again.annotations() == {
        key: Annotation(NOTE, pinned=True),
        rows[1].key: Annotation("", pinned=True),
    }
    again.annotate(key, note="  newer  ")
    assert kept.annotations()[key] == Annotation("newer", pinned=True)  # the other one is still open
    kept.annotate(key, note="", pinned=False)
    assert again.annotations() == {rows[1].key: Annotation("", pinned=True)}
    assert [row.key for row in Ledger(kept.where).rows()] == [row.key for row in rows]


def test_what_is_no_note_is_refused_and_repeated(kept, rows):
    key = rows[0].key
    with pytest.raises(LedgerError, match=r"no point 'feedbeef' in the ledger .*points\..*; it has 3 points"):
        kept.annotate("feedbeef", pinned=True)
    with pytest.raises(
        LedgerError, match=r"the note 'x{40}\.\.\.' is refused: it has 501 characters, the most is 500"
    ):
        kept.annotate(key, note="x" * 501)
    for odd in ("\ud800", "a\x00b", "\x1b[31m"):
        with pytest.raises(LedgerError, match="is no text"):
            kept.annotate(key, note=odd)
    assert kept.annotations() == {}
    assert kept.annotate(key, note="x" * 500).note == "x" * 500


def test_optuna_still_reads_a_study_with_notes(kept, rows):
    kept.annotate(rows[0].key, note=NOTE, pinned=True)
    storage = (
        kept.where
        if "://" in kept.where
        else optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(kept.where))
    )
    study = optuna.load_study(study_name="workbench", storage=storage)
    assert len(study.trials) == 3
    assert study.user_attrs[f"note {rows[0].key}"] == NOTE


def test_whatever_is_torn_off_a_note_the_points_and_earlier_notes_come_back(tmp_path, rows):
    where = tmp_path / "whole.journal"
    ledger = Ledger(where)
    for row in rows:
        ledger.add(row)
    ledger.annotate(rows[0].key, note="first")
    before = where.stat().st_size
    ledger.annotate(rows[0].key, note="second")
    content = where.read_bytes()
    for size in range(before, len(content) + 1):
        torn = tmp_path / "torn.journal"
        torn.write_bytes(content[:size])
        reopened = Ledger(torn)
        assert len(reopened) == 3
        whole = size >= len(content) - 1  # the end of its line alone may be missing
        assert reopened.annotations()[rows[0].key].note == ("second" if whole else "first"), size
    reopened.annotate(rows[1].key, pinned=True)
    assert Ledger(torn).annotations()[rows[1].key].pinned


def test_a_torn_line_of_another_process_does_not_swallow_the_next_note(tmp_path, rows):
    where = tmp_path / "points.journal"
    ledger = Ledger(where)
    ledger.add(rows[0])
    with where.open("ab") as file:  # a writer that was killed half way, while we have the file open
        file.write(b'{"op_code": 2, "worker_id": "x", "study_id": 0, "user_attr": {"note ')
    ledger.annotate(rows[0].key, note="after the crash")
    ledger.add(rows[1])
    assert Ledger(where).annotations() == {rows[0].key: Annotation("after the crash")}
    assert len(Ledger(where)) == 2


WRITE = """
import itertools, sys
from workbench.ledger.ledger import Ledger
ledger, key, name = Ledger(sys.argv[1]), sys.argv[2], sys.argv[3]
print("ready", flush=True)
for number in itertools.count():
    ledger.annotate(key, note=f"{name} {number}", pinned=number % 2 == 0)
    print(number, flush=True)
"""


def test_two_processes_write_notes_and_one_is_killed(tmp_path, rows):
    where = tmp_path / "points.journal"
    ledger = Ledger(where)
    for row in rows:
        ledger.add(row)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(where), rows[i].key, f"writer{i}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    first = [
        [writer.stdout.readline() for _ in range(5)] for writer in writers
    ]  # both are at it, however slow the machine
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
    last = [
        int(("".join(read) + writer.communicate()[0]).split()[-1])
        for read, writer in zip(first, writers, strict=True)
    ]
    ledger.annotate(rows[2].key, note="mine")  # no lock was left behind
    notes = Ledger(where).annotations()
    for index, number in enumerate(last):
        name, _, seen = notes[rows[index].key].note.partition(" ")
        assert name == f"writer{index}"
        assert int(seen) in {number, number + 1}  # at most one more than was confirmed
    assert notes[rows[2].key].note == "mine"
    assert min(last) > 3


def test_a_point_of_another_process_is_found_without_opening_anew(tmp_path, rows):
    mine, theirs = Ledger(tmp_path / "points.journal"), Ledger(tmp_path / "points.journal")
    theirs.add(rows[0])
    assert len(mine) == 0
    assert mine.annotate(rows[0].key, pinned=True).pinned
    theirs.add(rows[1])
    mine.add(rows[2])
    mine.refresh()
    assert {row.key for row in mine.rows()} == {row.key for row in rows}


# --- tables


def test_a_table_comes_back_from_csv_as_it_was(tmp_path, bench, rows):
    said = {rows[0].key: Annotation(NOTE, pinned=True)}
    path = save_points(rows, tmp_path / "deep" / "points.csv", said)
    frame, again = points_frame(rows, said), pd.read_csv(path, dtype={"key": str})
    assert list(again.columns) == list(frame.columns)
    for column in frame.columns:
        if pd.api.types.is_float_dtype(frame[column]):
            assert again[column].tolist() == pytest.approx(frame[column].tolist(), rel=1e-15, abs=0), column
        else:
            assert [value if pd.notna(value) else "" for value in again[column]] == frame[column].tolist(), (
                column
            )
    for index, row in enumerate(rows):
        assert frame["accuracy_fraction"][index] == row.primary.compressed.value
        assert frame["accuracy_change_fraction_low"][index] == row.primary.change.low
        assert frame["speedup_ratio_high"][index] == row.latency.speedup.high
        assert frame["file_bytes"][index] == row.sizes.file_bytes
        assert wb.METHODS.from_json(again["recipe_json"][index]) == row.recipe
    assert again["note"][0] == NOTE
    assert again["key"].tolist() == [row.key for row in rows]
    assert bench.ledger.frame().shape == frame.shape


def test_what_was_not_measured_is_missing_in_the_table_and_infinity_stays(rows):
    quality = dataclasses.replace(
        rows[0].quality[1], compressed=dataclasses.replace(rows[0].quality[1].compressed, value=float("inf"))
    )
    odd = dataclasses.replace(
        rows[0], latency=None, missing={"latency": "no clock"}, quality=(rows[0].primary, quality)
    )
    frame = points_frame([odd])
    assert frame["latency_median_ms"].isna().all()
    assert frame["speedup_ratio_low"].isna().all()
    assert frame["missing"].tolist() == ["latency: no clock"]
    assert frame["loss_nats"].tolist() == [float("inf")]


def test_a_file_is_never_replaced_and_lines_of_json_hold_everything(tmp_path, rows):
    path = tmp_path / "points.jsonl"
    assert save_points(rows, path, {rows[1].key: Annotation("kept")}) == path
    assert save_points(rows[:1], path) == tmp_path / "points-2.jsonl"
    assert save_points(rows[:1], path) == tmp_path / "points-3.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [Measurement.from_json(json.dumps(line["measurement"])) for line in lines] == rows
    assert [line["note"] for line in lines] == ["", "kept", ""]


def test_a_place_that_cannot_be_written_is_refused_in_words(tmp_path, rows):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        LedgerError,
        match=r"cannot write '.*file/points\.csv': (Not a directory|File exists); give another folder",
    ):
        save_points(rows, tmp_path / "file" / "points.csv")
    with pytest.raises(
        LedgerError, match=r"cannot export points to 'points\.xls': the name must end in \.csv or \.jsonl"
    ):
        save_points(rows, "points.xls")
    with pytest.raises(LedgerError, match="nothing is measured yet"):
        save_points([], tmp_path / "points.csv")


# --- side by side


def test_only_what_differs_is_marked():
    choices = {(c.step, c.option): c for c in choices_of([W4, BOTH, wb.Recipe(wb.Quantize(weight_bits=3))])}
    assert choices["quantize", "weight_bits"].texts == ("4", "4", "3")
    assert choices["prune", "sparsity"].texts == ("", "0.5", "")
    assert {name for name, choice in choices.items() if choice.differs} == {
        ("quantize", "weight_bits"),
        *((step, option) for step, option in choices if step == "prune"),
    }
    twice = {c.step for c in choices_of([TWICE, W4])}
    assert twice == {"quantize", "quantize 2"}


def test_a_comparison_says_the_numbers_of_the_points(rows):
    record = comparison(rows)
    assert record.points == tuple(rows)
    for layer in record.layers:
        for point, error in zip(rows, layer.errors, strict=True):
            assert error == next(x.relative_error for x in point.layers if x.name == layer.name)
    assert [layer.worst for layer in record.layers] == sorted(
        (layer.worst for layer in record.layers), reverse=True
    )
    file = next(fact for fact in facts(record) if fact.name == "file size")
    largest = max(row.sizes.file_bytes for row in rows)
    assert file.lengths == pytest.approx([row.sizes.file_bytes / largest for row in rows])
    text = comparison_html(record, {rows[0].key: Annotation("<script>x</script>")})
    assert "&lt;script&gt;" in text
    assert "<script>" not in text
    for row in rows:
        speed = next(part for part in wb.verdict(row).split("; ") if "x as fast" in part)
        assert speed.split("x ")[0] in text


def shifted(row, low, high):
    change = dataclasses.replace(row.primary.change, value=(low + high) / 2, low=low, high=high)
    return dataclasses.replace(
        row, key=f"{low}", quality=(dataclasses.replace(row.primary, change=change), *row.quality[1:])
    )


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ((-0.3, -0.2), (-0.1, 0.0), False),
        ((-0.1, 0.0), (-0.3, -0.2), False),
        ((-0.3, -0.1), (-0.2, 0.0), True),
        ((-0.3, 0.0), (-0.2, -0.1), True),
        ((float("nan"), float("nan")), (0.0, 0.1), True),
    ],
)
def test_intervals_that_do_not_overlap_are_beyond_the_noise(rows, first, second, overlap):
    record = comparison([shifted(rows[0], *first), shifted(rows[0], *second)])
    assert record.apart == (Apart(0, 1, overlap),)
    assert ("Not told apart" if overlap else "Beyond the noise") in comparison_html(record, {})


def test_too_many_too_few_and_foreign_points_are_refused(rows):
    with pytest.raises(RecipeError, match="1 point chosen: pick 2 to 6"):
        comparison([rows[0], rows[0]])
    with pytest.raises(RecipeError, match="7 points chosen: pick 2 to 6"):
        comparison([dataclasses.replace(rows[0], key=str(i)) for i in range(7)])
    foreign = dataclasses.replace(
        rows[1], context=dataclasses.replace(rows[1].context, model_name="other", model_fingerprint="f")
    )
    with pytest.raises(
        RecipeError, match="points of other on noise and tiny-vit on noise cannot be compared"
    ):
        comparison([rows[0], foreign])


def test_a_paired_test_counts_the_items_by_hand(bench):
    (measured,) = paired_test(bench, W4, [TWICE])
    answers = [
        bench.compress(recipe).model(pixel_values=bench.evaluation.inputs["pixel_values"]).logits.argmax(-1)
        for recipe in (W4, TWICE)
    ]
    right = [(a == bench.evaluation.labels).double() for a in answers]
    assert measured.change.value == pytest.approx(float((right[1] - right[0]).mean()))
    assert measured.dense.value == pytest.approx(float(right[0].mean()))
    (same,) = paired_test(bench, W4, [W4])
    assert same.change.value == 0
    assert same.change.low < 0 < same.change.high
    wide, _ = paired_test(bench, W4, [TWICE, BOTH])
    assert (
        wide.change.high - wide.change.low > measured.change.high - measured.change.low
    )  # joint over two pairs
    with pytest.raises(wb.errors.Cancelled):
        paired_test(bench, W4, [TWICE], cancelled=lambda: True)


# --- the views


def state(rows, said=None):
    return PanelState(rows[0].recipe, past=Past(rows, said or {}))


def test_pinned_points_come_first_in_every_order(rows):
    said = {rows[0].key: Annotation("a\nnote", pinned=True)}
    for order in ("newest", "smallest", "best quality", "fastest"):
        assert arranged(Past(rows, said), order)[0] is rows[0]
    assert arranged(Past(rows)) == rows[::-1]
    assert [row.sizes.file_bytes for row in arranged(Past(rows), "smallest")] == sorted(
        row.sizes.file_bytes for row in rows
    )
    assert line_of(rows[0], Past(rows, said)).endswith("| a note")


def test_the_history_filters_and_exports_what_it_shows(rows):
    wrote = []
    view = HistoryView(
        lambda _key: None, lambda chosen, path: wrote.append((chosen, path)) or "there/points.csv"
    )
    view.show(state(rows, {rows[1].key: Annotation("<i>mine</i>", pinned=True)}))
    assert "&lt;i&gt;mine&lt;/i&gt;" in view.table.value
    view.pinned.value = True
    assert [value for _, value in view.list.options] == ["", rows[1].key]
    view.button.click()
    assert wrote == [([rows[1]], "points.csv")]
    assert "1 points are in <code>there/points.csv</code>" in view.wrote.value
    view.show(state(rows))
    assert "No point is pinned" in view.table.value


def test_what_is_chosen_stays_chosen_when_points_come(rows):
    view = CompareView(lambda _keys: None)
    view.show(state(rows[:2]))
    view.choose([rows[0].key, rows[1].key, "unknown"])
    assert set(view.chosen) == {rows[0].key, rows[1].key}
    assert "wb-compare" in view.body.value
    view.show(state(rows, {rows[0].key: Annotation("", pinned=True)}))
    assert view.chosen == (rows[0].key, rows[1].key)  # the pinned one first
    many = [dataclasses.replace(rows[0], key=f"k{i}") for i in range(300)]
    view.show(state([*many, rows[0]]))
    view.choose([f"k{i}" for i in range(7)])
    assert "7 points chosen: pick 2 to 6" in view.body.value
    assert view.button.disabled
    view.choose(["k0", "k1"])  # far beyond the hundred that are listed
    assert set(view.chosen) == {"k0", "k1"}
    view.clear.click()
    assert view.chosen == ()
    assert "Choose two or more" in view.body.value


def test_a_paired_test_is_shown_although_the_list_was_filled_anew_and_says_when_it_was_stopped(bench, rows):
    view = CompareView(lambda _keys: None)
    view.show(state(rows[:2]))
    view.choose([rows[0].key, rows[1].key])
    keys, qualities = view.chosen, paired_test(bench, W4, [TWICE])
    view.wait(keys)
    assert "testing item by item" in view.test.value
    view.list.observe(
        lambda _: view.show_test(keys, qualities), "options"
    )  # another thread's answer comes while nothing is chosen
    view.show(state(rows))
    view.list.unobserve_all("options")
    assert "Paired on the same" in view.test.value
    view.wait(keys)
    view.give_up(keys)
    assert "stopped" in view.test.value
    view.wait(keys)
    view.choose([])
    view.show_test(keys, qualities)  # of points that are no longer chosen
    view.give_up(keys)
    assert view.test.value == ""


def test_the_bar_is_off_with_the_reason_until_the_point_is_complete(rows):
    said = []
    bar = KeepBar(lambda *given: said.append(given), lambda: None)
    look = dataclasses.replace(rows[0], items=16, latency=None)
    kept = Past(rows, {rows[0].key: Annotation("kept", pinned=True)})
    for point in (None, look):
        bar.show(PanelState(rows[0].recipe, point=point, past=kept))
        assert bar.pin.disabled
        assert bar.note.disabled
        assert bar.report.disabled
        assert bar.note.placeholder == bar.pin.tooltip == WAIT
    bar.show(PanelState(rows[0].recipe, point=rows[0], past=kept))
    assert (bar.pin.value, bar.note.value, bar.report.disabled) == (True, "kept", False)
    assert said == []  # showing is no change
    bar.pin.value = False
    bar.note.value = "new"
    assert said == [(rows[0].key, None, False), (rows[0].key, "new", None)]


# --- by command


def test_the_commands_list_note_export_and_compare(tmp_path, bench, rows):
    where = tmp_path / "points.journal"
    ledger = Ledger(where)
    for row in rows:
        ledger.add(row)

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "workbench", *arguments, "--ledger", str(where)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "pinned; note: ship it" in run("annotate", "tiny-vit", rows[0].key, "--note", "ship it", "--pin")
    assert "ship it" in run("points", "tiny-vit")
    run("points", "tiny-vit", "--pinned", "--output", str(tmp_path / "p.csv"))
    assert pd.read_csv(tmp_path / "p.csv")["key"].tolist() == [rows[0].key]
    assert "prune sparsity" in run("compare", "tiny-vit", rows[0].key, rows[1].key)
    assert "no point 'nope' in the ledger" in run("compare", "tiny-vit", rows[0].key, "nope", code=1)
    assert "nothing to write" in run("annotate", "tiny-vit", rows[0].key, code=2)
    where = tmp_path / "none.journal"
    assert "nothing is measured on 'tiny-vit' yet" in run("points", "tiny-vit", code=1)
