"""What long work says of itself where there is no terminal, and a report's sliders that end early."""

from __future__ import annotations

import re

import pytest
from tiny_tasks import tiny_task

import workbench as wb
from widgets.figures.tables import left_out_list
from workbench.errors import RecipeError
from workbench.report.report import Above, Job, job_from
from workbench.report.report_points import Moved, measured, moved
from workbench.search.sweep import around
from workbench.util import progress as module
from workbench.util.progress import Bar

RECIPE = wb.Recipe(wb.Quantize(weight_bits=4))


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    stopped = Time()
    monkeypatch.setattr(module, "time", stopped)
    return stopped


@pytest.fixture
def bench(tmp_path):
    return wb.Bench(tiny_task("vit"), device="cpu", ledger=tmp_path / "p.journal", progress="lines")


def test_a_line_every_ten_seconds(clock, capsys):
    with Bar("W4", shown="lines") as bar:
        for second in range(35):
            clock.now = 100.0 + second
            bar("evaluate" if second < 30 else "a plan", second, 2000 if second < 30 else 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["W4: evaluate 10 of 2,000", "W4: evaluate 20 of 2,000", "W4: a plan"]


def test_short_work_and_quiet_work_say_nothing(clock, capsys):
    for shown, seconds in (("lines", 9.0), (False, 99.0)):
        with Bar("W4", shown=shown) as bar:
            bar("evaluate", 0, 8)
            clock.now += seconds
            bar("evaluate", 4, 8)
    assert capsys.readouterr() == ("", "")


def test_a_report_says_which_point_and_what_was_found(bench, capsys):
    sweep = moved(bench, RECIPE, "weight_bits")
    recipes = around(RECIPE, "weight_bits")
    assert [point.recipe for point in sweep.points] == list(recipes)
    assert sweep.words() == ""
    out, err = capsys.readouterr()
    assert out == ""
    heads, results = (err.splitlines()[i::2] for i in (0, 1))
    assert heads == [
        f"weight_bits, {i + 1} of {len(recipes)}: {recipe.label()}" for i, recipe in enumerate(recipes)
    ]
    assert all(
        re.fullmatch(r"  accuracy \d+\.\d% to \d+\.\d% \(.* points, .*\); \d+\.\d s", line)
        for line in results
    )


def test_a_bench_that_shows_bars_or_nothing_writes_no_lines(tmp_path, capsys):
    quiet = wb.Bench(tiny_task("vit"), device="cpu", ledger=tmp_path / "p.journal", progress=False)
    measured(quiet, RECIPE, "this recipe")
    assert capsys.readouterr() == ("", "")


def test_a_slider_that_takes_too_long_ends_and_says_what_is_missing(bench, capsys):
    """The time is up at once: only what the ledger has is there."""
    first_point = bench.measure(RECIPE)
    capsys.readouterr()
    sweep = moved(bench, RECIPE, "weight_bits", minutes=1e-9)
    assert sweep.points == (first_point,)
    assert sweep.left_out == tuple(recipe for recipe in around(RECIPE, "weight_bits") if recipe != RECIPE)
    assert sweep.words() == "weight_bits: no time for 4 of 5 points within 1e-09 minutes: W2, W3, W6, W8"
    assert sweep.words() in capsys.readouterr().err
    assert left_out_list([sweep, Moved("sparsity", (), (), 5.0)]).startswith(
        f"<ul><li>{sweep.words()}</li></ul><p>"
    )
    assert left_out_list([Moved("sparsity", (), (), 5.0)]) == ""
    assert (
        moved(bench, RECIPE, "weight_bits", minutes=0).left_out == ()
    )  # 0 waits for all, and nothing that was stopped is broken


def test_lines_stand_whole(capsys):
    file = Above()
    file.write("one\ntw")
    assert capsys.readouterr().err == "one\n"
    file.write("o\n")
    assert capsys.readouterr().err == "two\n"


@pytest.mark.parametrize(("given", "minutes"), [(None, 5.0), ("0", 0.0), (2.5, 2.5)])
def test_minutes_of_a_slider(given, minutes):
    job = job_from({"model": "fashion-cnn", "weight_bits": 4, "slider_minutes": given, "progress": "lines"})
    assert (job.slider_minutes, job.settings["progress"]) == (minutes, "lines")
    assert Job.slider_minutes == 5.0


@pytest.mark.parametrize("given", [-1, "long", float("nan")])
def test_bad_minutes_of_a_slider(given):
    with pytest.raises(
        RecipeError,
        match=r"slider_minutes=.* is refused: give a number of at least 0, such as 5, or 0 to wait",
    ):
        job_from({"model": "fashion-cnn", "weight_bits": 4, "slider_minutes": given})
