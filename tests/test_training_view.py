"""The training curve in the panel: what it shows, and stopping that keeps what has been reached."""

from __future__ import annotations

import re
import threading

import pytest
import tiny_tasks

import workbench as wb
from widgets.figures.figures import curve_figure
from widgets.panes.training_view import HEIGHT, WIDTH, TrainingView, curve_html, curve_svg
from widgets.panes.verdict_strip import badge
from widgets.session.session import Session
from widgets.session.state import PanelState
from workbench.errors import RecipeError
from workbench.report.temperature_lesson import softened
from workbench.util.progress import Look

LONG = wb.Recipe(wb.Prune(sparsity=0.6), wb.Distill(temperature=2, steps=100_000, distill_batch=8))


def points_of(svg):
    return [tuple(map(float, pair.split(","))) for pair in re.search(r"points='([^']*)'", svg)[1].split()]


def test_the_curve_starts_left_and_ends_where_the_training_is():
    places = points_of(curve_svg([(0, 3.0), (1, 2.0), (2, 1.0)], 5))
    assert places[0] == (0.0, 3.0)  # the largest loss stands at the top
    assert places[-1] == (WIDTH / 2, HEIGHT - 3)
    assert [x for x, _ in places] == sorted(x for x, _ in places)


def test_a_long_curve_is_thinned_and_a_wide_one_is_logarithmic():
    places = points_of(curve_svg([(i, 1.0) for i in range(10_000)], 10_000))
    assert len(places) <= WIDTH + 30
    middle = points_of(curve_svg([(0, 100.0), (1, 1.0), (2, 0.01)], 3))[1]
    assert middle[1] == pytest.approx(HEIGHT / 2, abs=0.1)


def test_a_single_step_and_a_loss_of_zero_have_a_curve():
    assert points_of(curve_svg([(0, 0.0)], 1))
    assert "step 1 of 1: loss 0" in curve_html([(0, 0.0)], 1, running=False)


def test_the_words_say_whether_it_runs_ended_or_was_stopped():
    assert "training, step 2 of 4: loss 2 \N{RIGHTWARDS ARROW} 1" in curve_html(
        [(0, 2.0), (1, 1.0)], 4, running=True
    )
    assert "training stopped, step 2 of 4" in curve_html([(0, 2.0), (1, 1.0)], 4, running=False)
    assert ">trained, step 2 of 2" in curve_html([(0, 2.0), (1, 1.0)], 2, running=False)


def test_the_newest_look_stands_in_the_words_and_the_best_one():
    looks = [
        Look(step, loss, "accuracy", 0.9, value, value - 0.1, value + 0.1, 64, 0.95)
        for step, loss, value in ((0, 2.0, 0.5), (5, 0.5, 0.8), (10, 0.7, 0.75))
    ]
    assert "held-out accuracy 80.0% [70.0%, 90.0%] after step 5 on 64 items, dense 90.0%<" in curve_html(
        [(0, 1.0)], 9, running=True, looks=looks[:2]
    )
    assert (
        "held-out accuracy 75.0% [65.0%, 85.0%] after step 10 on 64 items, dense 90.0%; best after step 5:"
        " 80.0%" in curve_html([(0, 1.0)], 9, running=True, looks=looks)
    )


def look(step, value, low, high, dense=0.9):
    return Look(step, 1.0, "accuracy", dense, value, low, high, 64, 0.95)


def test_looks_stand_on_the_curve_with_their_intervals():
    svg = curve_svg([(i, 1.0) for i in range(11)], 11, [look(0, 0.5, 0.4, 0.6), look(10, 0.8, 0.7, 0.9)])
    bars = [
        tuple(map(float, ends))
        for ends in re.findall(
            r"<line class='wb-look' x1='([\d.]+)' x2='[\d.]+' y1='([\d.]+)' y2='([\d.]+)'/>", svg
        )
    ]
    span = HEIGHT - 6  # 0.4 lies at the bottom and 0.9, the dense model, at the top
    assert bars == [
        (0, HEIGHT - 3, pytest.approx(3 + span * 0.6, abs=0.1)),
        (WIDTH, pytest.approx(3 + span * 0.4, abs=0.1), 3),
    ]
    assert re.search(r"class='wb-look' points='0.0,([\d.]+) 360.0,([\d.]+)'", svg).groups() == (
        f"{3 + span * 0.8:.1f}",
        f"{3 + span * 0.2:.1f}",
    )
    assert "class='wb-dense' x1='0' x2='360' y1='3.0' y2='3.0'" in svg


def test_a_look_that_is_not_finite_is_left_out_of_the_picture():
    assert "wb-look" not in curve_svg([(0, 1.0)], 5, [look(0, float("inf"), 1.0, float("inf"))])


def test_looks_reach_the_panel_and_stay_with_the_point(session):
    recipe = wb.Recipe(
        wb.Prune(sparsity=0.6), wb.Distill(temperature=2, steps=4, look_every=2, distill_batch=8)
    )
    point = session.run(recipe)
    assert [at_step.step for at_step in session.state.looks] == [0, 2, 4]
    assert point.held_out == session.state.looks
    session.state = PanelState(recipe)
    assert session.run(recipe) == point  # from the ledger
    assert session.state.looks == point.held_out


def test_one_softened_answer_stands_under_the_curve_where_it_is_asked_for(session):
    session.run(wb.Recipe(wb.Prune(sparsity=0.6), wb.Distill(temperature=4, steps=4, distill_batch=8)))
    expected = softened(session.bench.task, 0, (1, 4))
    assert (session.state.softened.answers, session.state.softened.truth) == (
        expected.answers,
        expected.truth,
    )
    for row, wanted in zip(session.state.softened.probabilities, expected.probabilities, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)  # another thread may add up in another order
    view = TrainingView(lambda: None)
    view.show(session.state)
    assert "wb-softened" not in view.picture.value
    view.lesson.value = True
    first = session.state.softened
    assert all(f"{line[0]:.1%}" in view.picture.value for line in first.probabilities)
    assert f"T = 4, {first.entropy[1]:.2f} nats" in view.picture.value
    view.lesson.value = False
    assert "wb-softened" not in view.picture.value


def test_answers_that_are_vectors_have_no_lesson():
    view = TrainingView(lambda: None)
    view.show(PanelState(LONG, phase="measured", curve=((0, 1.0),), curve_steps=9))
    assert view.lesson.layout.display == "none"


def test_the_figure_of_a_point_shows_quality_at_each_look(session):
    point = session.run(
        wb.Recipe(wb.Prune(sparsity=0.6), wb.Distill(temperature=2, steps=4, look_every=2, distill_batch=8))
    )
    loss, quality, dense = curve_figure(point).data
    assert list(loss.y) == [value for _, value in point.curve]
    assert list(quality.x) == [0, 2, 4]
    assert list(quality.y) == [100 * at_step.value for at_step in point.held_out]  # in percent, as everywhere
    assert [y + up for y, up in zip(quality.y, quality.error_y.array, strict=True)] == pytest.approx(
        [100 * at_step.high for at_step in point.held_out]
    )
    assert [y - down for y, down in zip(quality.y, quality.error_y.arrayminus, strict=True)] == pytest.approx(
        [100 * at_step.low for at_step in point.held_out]
    )
    assert set(dense.y) == {100 * point.held_out[0].dense}


def test_it_is_hidden_without_training_and_its_button_while_nothing_runs():
    view = TrainingView(lambda: None)
    view.show(PanelState(LONG))
    assert view.layout.display == "none"
    view.show(PanelState(LONG, phase="training", curve=((0, 1.0),), curve_steps=9))
    assert (view.layout.display, view.button.layout.visibility) == (None, "visible")
    view.show(PanelState(LONG, phase="measured", curve=((0, 1.0),), curve_steps=9))
    assert (view.layout.display, view.button.layout.visibility) == (None, "hidden")


@pytest.fixture
def session(tmp_path):
    bench = wb.Bench(
        tiny_tasks.tiny_task("vit"), ledger=tmp_path / "points.journal", progress=False, device="cpu"
    )
    errors = []
    opened = Session()
    opened.on_error.subscribe(errors.append)
    opened.bench, opened.predictor = bench, bench.predictor()
    yield opened
    opened.close()
    assert errors == []


def test_stopping_keeps_and_measures_what_has_been_reached(session):
    training, followed = threading.Event(), []
    session.on_state.subscribe(lambda: training.set() if session.state.phase == "training" else None)
    session.on_recipe.subscribe(followed.append)
    session.start(LONG)
    assert training.wait(30)
    session.stop_training()
    job = session.measurer.running or session.measurer.waiting
    assert job.done.wait(60)
    point = session.state.point
    assert point.complete
    stopped = point.recipe.get("distill").stop_at
    assert 1 <= stopped < 100_000
    assert len(point.curve) == stopped
    assert session.state.recipe == point.recipe
    assert followed == [point.recipe]
    assert session.state.curve == point.curve
    assert session.state.curve_steps == 100_000
    assert [row.recipe for row in session.rows()] == [point.recipe]


@pytest.mark.parametrize(
    "step",
    [
        wb.Transfer(transfer_steps=3, transfer_batch=8),
        wb.QAT(qat_steps=3, qat_batch=8),
        wb.Distill(steps=3, distill_batch=8),
    ],
    ids=lambda step: step.kind(),
)
def test_steps_of_every_training_are_counted_also_of_a_point_from_the_ledger(session, step):
    recipe = wb.Recipe(
        *([] if step.kind() == "qat" else [wb.Prune(sparsity=0.3)]),
        *([wb.Quantize(weight_bits=4)] if step.kind() == "qat" else []),
        step,
    )
    for _ in range(2):  # trained, then found
        assert session.run(recipe).complete
        assert session.state.curve_steps == len(session.state.curve) == 3


def test_what_is_being_computed_is_said_until_there_is_a_look(session, monkeypatch):
    said = []
    monkeypatch.setattr("widgets.session.measuring_job.DOING_SECONDS", 0.0)

    def note():
        if session.state.point is None:
            said.append((session.state.doing, badge(session.state)))

    session.on_state.subscribe(note)
    session.run(wb.Recipe(wb.Prune(sparsity=0.4, criterion="wanda")))
    lines = [doing for doing, _ in said if doing]
    assert any(word.startswith("calibration, ") for word in lines)
    assert all(f"predicted: {doing}</div>" in html for doing, html in said if doing)
    assert session.state.doing == ""
    assert "predicted" not in badge(session.state)


def test_moving_on_while_it_trains_leaves_nothing_of_it(session):
    training = threading.Event()
    session.on_state.subscribe(lambda: training.set() if session.state.phase == "training" else None)
    session.start(LONG)
    assert training.wait(30)
    session.start(wb.Recipe(wb.Prune(sparsity=0.3)))
    job = session.measurer.running if session.measurer.waiting is None else session.measurer.waiting
    assert job.done.wait(60)
    assert session.state.recipe == wb.Recipe(wb.Prune(sparsity=0.3))
    assert session.state.curve == ()
    assert len(session.rows()) == 1


def test_there_is_nothing_to_stop_while_nothing_trains(session):
    with pytest.raises(RecipeError, match="nothing is being trained"):
        session.stop_training()
