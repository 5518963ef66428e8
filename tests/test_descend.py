"""The short guided search, and the button that starts it."""

from __future__ import annotations

import dataclasses
import time

import pytest
import tiny_tasks
import torch

import workbench as wb
from widgets.explorer import Explorer
from widgets.form.controls import scale as slider_scale
from widgets.form.controls import side, tick_marks
from workbench.compress.registry import METHODS
from workbench.errors import Cancelled, RecipeError
from workbench.ledger.pareto import smallest_within
from workbench.metrics.quality import Estimate
from workbench.modules.input_quantizer import InputFormat
from workbench.predict.predictor import Prediction
from workbench.runtime.plan import reasons_for
from workbench.runtime.schemes import KernelTick, kernels_for
from workbench.search.local_search import descend, rank


@pytest.fixture
def bench(tmp_path):
    return wb.Bench(
        tiny_tasks.tiny_task("vit"), ledger=tmp_path / "points.journal", progress=False, device="cpu"
    )


def test_every_trial_is_measured_kept_and_never_worse(bench):
    trials = list(descend(bench, 0.5, trials=6))
    assert 1 <= len(trials) <= 6
    assert [trial.tried for trial in trials] == sorted({trial.tried for trial in trials})
    sizes = [trial.best.sizes.file_bytes for trial in trials if trial.best]
    assert sizes == sorted(sizes, reverse=True)
    best = trials[-1].best
    assert best.primary.drop.high <= 0.5
    assert best.key == smallest_within(bench.ledger.rows(), 0.5).key
    assert {trial.point.key for trial in trials} <= set(bench.ledger.points)
    assert len({trial.point.key for trial in trials}) == len(trials)
    assert not any(step.kind() == "distill" for trial in trials for step in trial.point.recipe)
    more = list(descend(bench, 0.5, trials=3))  # goes on where it ended
    assert not {trial.point.key for trial in more} & {trial.point.key for trial in trials}


def test_a_search_is_cancelled_and_refuses_nonsense(bench):
    bench.measure(wb.Recipe())
    with pytest.raises(Cancelled):
        list(descend(bench, 0.1, cancelled=lambda: True))
    with pytest.raises(RecipeError, match="drop is a fraction such as 0.01"):
        list(descend(bench, 1.5))


def test_what_is_predicted_within_comes_first_then_the_smallest_loss():
    def guess(accuracy, size):
        return Prediction(
            wb.Recipe(), "accuracy", Estimate(accuracy, 0, 1), 9, False, size, True, Estimate(1, 1, 1), (), ()
        )

    guesses = [guess(0.5, 10), guess(0.895, 50), guess(0.7, 5), guess(0.893, 20)]
    # of these nothing is known: their value, the middle of the range, says nothing, wherever it lies
    unknown = [
        dataclasses.replace(guess(accuracy, size), unknown=("Clip",))
        for accuracy, size in ((0.5, 3), (0.899, 40), (0.95, 4))
    ]
    order = sorted([*unknown, *guesses], key=lambda g: rank(g, 0.9, 0.01))
    assert [g.file_bytes for g in order] == [20, 50, 5, 10, 40, 4, 3]


def test_the_search_button_ends_on_the_best_point(tmp_path):
    panel = Explorer(
        "fashion-cnn", ledger=tmp_path / "points.journal", evaluation_items=256, offline=True, device="cpu"
    )
    panel.run(wb.Recipe())
    panel.presets.within.value = 0.05
    panel.presets.search.click()
    end = time.monotonic() + 90
    while "ended" not in panel.errors.value and time.monotonic() < end:
        time.sleep(0.05)
    rows = panel.session.rows()
    assert len(rows) > 3
    assert panel.form.recipe == smallest_within(rows, 0.05).recipe
    panel.close()


def test_ticks_never_claim_a_kernel_that_is_not_used():
    for kind in METHODS.steps():
        for device in ("cpu", "cuda"):
            for tick in kernels_for(kind, device):
                assert kind.options()[kind.slider]
                reasons = reasons_for(
                    "2:4" if tick.label == "2:4" else None,
                    [] if tick.label == "2:4" else [int(tick.value)],
                    device,
                    inputs=InputFormat() if tick.label == "W8A8" else None,
                )
                assert not (tick.runs and reasons)
                assert tick.runs or all(reason in tick.reason for reason in reasons)
    assert [tick.label for tick in kernels_for(wb.Quantize, "cpu")] == ["W4A16", "W8A8"]
    if not torch.cuda.is_available():  # Triton may be installed without one
        assert not any(tick.runs for tick in kernels_for(wb.Quantize, "cuda"))


def test_marks_are_hollow_with_the_reason_and_filled_where_a_kernel_runs():
    ticks = (
        KernelTick(4, "W4A16", runs=True, reason=""),
        KernelTick(7, "W7<", runs=False, reason="no <such> kernel"),
    )
    marks = tick_marks(wb.Quantize, slider_scale(wb.Quantize), ticks)
    assert "\N{BLACK DIAMOND}W4A16" in marks
    assert "\N{WHITE DIAMOND}W7&lt;" in marks
    assert "no kernel here: no &lt;such&gt; kernel" in marks
    assert ">2</span>" in marks
    assert (side(0.5, [0.25, 0.5, 0.7]), side(8, [6, 8]), side(4, [3, 4, 6])) == ("before", "after", "after")
