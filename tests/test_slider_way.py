"""From a slider's move to the measurement: what the real panel calls on the way, and in which order."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

import workbench as wb
from widgets.explorer import Explorer

ROOT = Path(__file__).parents[1]
WAY = (  # from the control to the worker that is told to stop: each does something of its own
    "StepForm.moved",
    "StepForm.settle",
    "RecipeForm.moved",
    "RecipeForm.settle",
    "Explorer.moved",
    "Session.start",
    "Worker.cancel",
)
CONTROL = (
    "widgets/form/",
    "workbench/recipe.py",
    "workbench/util/configuration.py",  # which checks its options
    "workbench/compress/",
    "workbench/util/registry.py",  # where they look up criteria and number formats
    "workbench/formats/number_format.py",
)  # a method's options check themselves
PANES = ("widgets/panes/", "widgets/plot/", "widgets/figures/")


class Traced:
    """The project's own functions that this thread calls: (file, name, those of the way that called it)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[str, ...]]] = []

    def note(self, frame, event, _arg):
        if event == "call" and (place := self.place(frame)):
            self.calls.append((place, frame.f_code.co_qualname, tuple(self.stack(frame))))

    @staticmethod
    def place(frame) -> str:
        path = Path(frame.f_code.co_filename)
        place = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        return place if place.startswith(("widgets/", "workbench/")) else ""

    def stack(self, frame):
        """Return the project's functions that are running, the first caller first."""
        names = []
        while frame is not None:
            if self.place(frame).startswith("widgets/"):
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        return reversed(names)

    def __enter__(self):
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_error):
        sys.setprofile(None)

    def before(self, name: str) -> list[tuple[str, str, tuple[str, ...]]]:
        """Return the calls before the first one of a function."""
        return self.calls[: [called for _, called, _ in self.calls].index(name)]


def settled(panel):
    end = time.monotonic() + 60
    while panel.session.measurer.busy or panel.session.preparer.busy or not panel.pacer.flush():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module", params=["fashion-cnn", "fashion-vit"])
def panel(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("way") / "points.journal"
    explorer = Explorer(request.param, ledger=where, evaluation_items=64, offline=True, device="cpu")
    explorer.run(wb.Recipe(wb.Prune(sparsity=0.5)))
    settled(explorer)
    yield explorer
    explorer.close()


def slider(panel, name):
    return next(form for form in panel.form.forms if form.kind.slider == name).slider


def move(panel, name, value) -> Traced:
    """Move a slider as a browser does, and return what this thread called."""
    with Traced() as traced:
        slider(panel, name).set_state({"value": value})
    return traced


def test_the_running_measurement_is_cancelled_before_anything_but_the_control(panel):
    for name, value in (("sparsity", 0.6), ("weight_bits", 3)):
        traced = move(panel, name, value)
        before = traced.before("Worker.cancel")
        strangers = {
            (place, called)
            for place, called, _ in before
            if not place.startswith(CONTROL) and called not in WAY
        }
        assert strangers == set()
        assert len(before) < 80, len(before)
        (cancelled,) = [stack for _, called, stack in traced.calls if called == "Worker.cancel"][:1]
        assert cancelled == WAY
        settled(panel)


def test_few_functions_lie_between_the_control_and_the_session_and_no_pane_is_among_them(panel):
    traced = move(panel, "sparsity", 0.7)
    before = traced.before("Worker.submit")
    ours = {called for place, called, _ in before if place.startswith("widgets/")}
    assert len(ours) < 32, sorted(ours)
    assert not any(place.startswith(PANES) for place, _, _ in before)
    settled(panel)
    assert panel.session.state.phase == "measured"
    assert panel.session.state.recipe.get("prune") == wb.Prune(sparsity=0.7)


def test_what_a_browser_only_repeats_cancels_nothing(panel):
    slider(panel, "sparsity").set_state({"value": 0.62})
    settled(panel)
    traced = move(panel, "sparsity", 0.62 + 1e-12)
    assert {called for _, called, _ in traced.calls} <= {
        "StepForm.moved",
        "StepForm.is_noise",
        "Scale.rounded",
        "decimals",
    }


def test_what_the_rules_refuse_leaves_the_measurement_running(panel):
    panel.session.start(wb.Recipe(wb.Prune(sparsity=0.55), wb.Distill(temperature=2, steps=5000)))
    running = panel.session.measurer.generation
    prune = next(form for form in panel.form.forms if form.kind is wb.Prune)
    prune.choices["pattern"].value = "4:2"
    assert "removes nothing" in panel.errors.value
    assert panel.session.measurer.generation == running
    panel.session.cancel()
    prune.choices["pattern"].value = "unstructured"
    settled(panel)


def test_panes_that_show_nothing_do_nothing(panel):
    """No layer is chosen, and history, comparison and code are in tabs that nobody looks at."""
    idle = [panel.history, panel.compare, panel.code, *panel.layers.overrides]
    calls = []

    def note(frame, event, _arg):
        owner = frame.f_locals.get("self")
        if event == "call" and any(owner is pane for pane in idle):
            calls.append(frame.f_code.co_qualname)

    threading.setprofile(note)  # the pacer's thread draws; it is started anew
    panel.pacer.close()
    panel.pacer.closed, panel.pacer.thread = False, None
    sys.setprofile(note)
    try:
        slider(panel, "sparsity").set_state({"value": 0.8})
        settled(panel)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert panel.session.state.phase == "measured"
    assert calls == []
    panel.tabs.select(panel.history)
    panel.pacer.flush()
    assert "80% sparse" in panel.history.table.value
    assert panel.tabs.titles[3] == f"history ({len(panel.session.rows())})"
