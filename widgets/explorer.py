"""The whole panel: sliders on the left, the trade-off on the right, what it means below.

Composes; decides nothing.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as ipw

from widgets.form.model_picker import ModelPicker
from widgets.form.preset_bar import PresetBar
from widgets.form.recipe_form import RecipeForm
from widgets.labels import Labels
from widgets.panes.behaviour_view import BehaviourView
from widgets.panes.code_view import CodeView, line
from widgets.panes.error_pane import ErrorPane, explain
from widgets.panes.layer_view import LayerView
from widgets.panes.points_controller import Keeping
from widgets.panes.static_snapshot import Still
from widgets.panes.training_view import TrainingView
from widgets.panes.verdict_strip import HonestyStrip
from widgets.plot.tradeoff_view import TradeoffView
from widgets.session.load_progress import Waiting
from widgets.session.model_choice import Choice
from widgets.session.pacer import Pacer
from widgets.session.session import Session
from workbench.errors import WorkbenchError
from workbench.measure.behaviour import Behaviour, Continuation
from workbench.measure.measurement import Measurement
from workbench.metrics.metrics import metric_named
from workbench.recipe import Recipe
from workbench.util.text import size

BROWSER_SECONDS = 0.02  # what a browser takes to draw one point


class Explorer(ipw.VBox):
    """Drag a slider, watch the real model answer.

        from widgets import Explorer
        panel = Explorer("fashion-vit")   # shows itself as the last line of a cell
        point = panel.run(recipe)         # without a browser: measures, waits, returns the point

    Every slider has the name of its recipe option. What is predicted is hollow on the plot and marked as
    predicted in the strip; what is measured is filled, with its interval. Every finished point is in the
    ledger.
    """

    def __init__(
        self,
        model: str = "fashion-vit",
        data: str | None = None,
        device: str | None = None,
        *,
        recipe: Recipe | None = None,
        ledger: str | Path | None = None,
        evaluation_items: int | None = None,
        runtime: str | None = None,
        placement: str | None = None,
        offline: bool = False,
    ) -> None:
        """Show the panel at once and load the model behind it.

        Args:
            model: a catalogue name, a local directory, or a hub id.
            data: as for `workbench.Bench`; None takes the model's own.
            device: "cpu", "cuda", or None for the GPU where there is one.
            recipe: where the sliders start; None turns every method off.
            ledger: where points are kept; None takes the user's own file for the model.
            evaluation_items: at most so many; None takes the task's default.
            runtime: how both models are run when they are timed, as for `workbench.Bench`.
            placement: where the weights lie, as for `workbench.Bench`.
            offline: never reach for the network.

        """
        self.quiet = False
        self.errors = ErrorPane()
        self.form = RecipeForm(recipe)
        self.plot = TradeoffView(self.go_to)
        self.strip, self.code = HonestyStrip(), CodeView()
        self.behaviour = BehaviourView(lambda: self.guarded(self.ask_behaviour))
        self.still = Still()
        self.line, self.dense = ipw.HTML(), ipw.HTML("loading ...")
        self.picker = ModelPicker(Choice(model, data, device, evaluation_items))
        self.waiting = Waiting(self.picker.busy)
        self.pacer = Pacer(self.failed)
        self.session = Session(
            on_live=lambda: self.pacer.post("live", self.draw_live),
            on_history=lambda: self.pacer.post("history", self.draw_history),
            on_loaded=self.loaded,
            on_error=self.failed,
            on_not_loaded=self.not_loaded,
            breathe=self.breathe,
            ledger=ledger,
            runtime=runtime,
            placement=placement,
            offline=offline,
            progress=False,
        )
        self.keeping = Keeping(
            self.session,
            go_to=self.go_to,
            guarded=self.guarded,
            post=self.pacer.post,
            changed=lambda: self.pacer.post("history", self.draw_history),
        )
        self.history, self.compare, self.plot.on_select = (
            self.keeping.history,
            self.keeping.compare,
            self.brushed,
        )
        self.training = TrainingView(lambda: self.guarded(self.session.stop_training))
        self.session.on_recipe = self.follow
        self.layers = LayerView(self.session, self.form, guarded=self.guarded, post=self.pacer.post)
        self.presets = PresetBar(
            self.form,
            self.session,
            self.guarded,
            lambda words: self.errors.say("search", words, "note"),
            self.pacer.post,
        )
        super().__init__(self.arrange())
        self.tabs.observe(
            lambda change: self.layers.set_visible(
                visible=change["new"] == self.tabs.children.index(self.layers)
            ),
            "selected_index",
        )
        self.add_class("wb-panel")
        self.picker.observe(lambda _: self.load(), "choice")
        self.picker.stop.on_click(lambda _: self.guarded(self.give_up))
        self.form.observe(self.moved, "recipe")
        self.form.observe(lambda _: self.errors.say("sliders", self.form.error), "error")
        self.form.observe(lambda _: self.errors.say("note", self.form.note, "note"), "note")
        self.session.start(self.form.recipe)
        self.load()

    @property
    def model_name(self) -> str:
        """Return the name of the model on the bench, or of the one that loads."""
        return (self.session.choice or self.picker.choice).name

    def arrange(self) -> list[ipw.Widget]:
        """Return the parts of the panel, top to bottom."""
        style = ipw.HTML(
            f"<style>{(Path(__file__).parent / 'style.css').read_text(encoding='utf-8')}</style>",
            layout=ipw.Layout(display="none"),
        )
        head = ipw.HBox([self.picker, self.picker.loading, self.dense])
        left = ipw.VBox([self.form, self.presets, self.line])
        right = ipw.VBox([self.plot])
        main = ipw.HBox([left, right])
        tabs = self.tabs = ipw.Tab(
            [self.layers, self.behaviour, self.compare, self.history, self.code],
            titles=["layers", "behaviour", "compare", "history", "code"],
        )
        named = {
            "wb-head": head,
            "wb-left": left,
            "wb-right": right,
            "wb-main": main,
            "wb-tabs": tabs,
            "wb-dense": self.dense,
            "wb-line": self.line,
        }
        for name, widget in named.items():
            widget.add_class(name)
        return [
            style,
            Labels(),
            head,
            main,
            self.errors,
            self.training,
            self.strip,
            self.keeping.line,
            self.keeping.bar,
            tabs,
        ]

    def _ipython_display_(self) -> None:
        """Show the panel, and under it the picture that stays where no kernel runs."""
        from IPython.display import display

        display({**self._repr_mimebundle_(), "text/html": ""}, raw=True)
        self.still.display()

    def guarded(self, act: Callable[[], None]) -> None:
        """Act on a click; what goes wrong is shown in the panel."""
        try:
            self.errors.say("action", "")
            act()
        except Exception as error:  # noqa: BLE001  an exception in a callback appears nowhere else
            self.errors.say("action", explain(error, self.form.last))

    def go_to(self, key: str) -> None:
        """Put the sliders back to a point of the ledger."""
        found = next((row for row in self.session.rows() if row.key == key), None)
        if found is not None:
            self.guarded(lambda: self.form.set_recipe(found.recipe))

    def brushed(self, keys: Sequence[str]) -> None:
        """Put the points of a box side by side, and show them."""
        self.keeping.select(keys)
        if keys:
            self.tabs.selected_index = self.tabs.children.index(self.compare)

    def moved(self, _change: dict[str, Any]) -> None:
        """Start on what the sliders say."""
        if not self.quiet:
            self.errors.say("work", "")
            self.errors.say("search", "")
            self.guarded(lambda: self.session.start(self.form.recipe))

    def follow(self, recipe: Recipe) -> None:
        """Put the sliders on what is measured, without starting anew."""
        self.quiet = True
        try:
            self.form.set_recipe(recipe)
        finally:
            self.quiet = False

    def load(self) -> None:
        """Load what is picked; what is on the bench stays usable."""
        if self.picker.choice != self.session.choice:
            self.errors.say("load", "")
            self.waiting.start(self.picker.choice.name)
            self.session.load(self.picker.choice)
        elif self.session.loader.busy:
            self.give_up()

    def give_up(self) -> None:
        """Stop waiting for what loads, and show what is on the bench."""
        self.session.give_up()
        self.waiting.stop()
        if self.session.choice is not None:
            self.picker.put(self.session.choice)

    def loaded(self) -> None:
        """Show a model that has been loaded."""
        self.waiting.stop()
        self.errors.say("work", "")
        self.pacer.post("forget", self.layers.forget)
        self.pacer.post(
            "kernels",
            lambda: self.form.show_kernels(self.session.bench.device.type if self.session.bench else ""),
        )
        self.pacer.post("history", self.draw_history)

    def breathe(self) -> None:
        """Let the prediction be drawn, here and in the browser, before the processor is busy with the
        measurement.
        """
        if self.pacer.flush(0.05):
            time.sleep(BROWSER_SECONDS)

    def failed(self, error: BaseException) -> None:
        """Show what a thread raised; where it is a defect of ours, the whole traceback goes to the log."""
        log_defect(error)
        self.errors.say("work", explain(error, self.form.last))

    def not_loaded(self, error: BaseException) -> None:
        """Go back to the model that is there, and say why the other one is not."""
        wanted = self.picker.choice
        self.waiting.stop()
        log_defect(error)
        self.errors.say("load", f"{wanted.name} is not loaded: {explain(error, '')}")
        if self.session.choice is not None:
            self.picker.put(self.session.choice)
        self.pacer.post("live", self.draw_live)

    def ask_behaviour(self) -> None:
        """Compare the answers of both models, item by item, behind the panel."""
        self.session.compare(
            lambda recipe, found: self.pacer.post("behaviour", lambda: self.draw_behaviour(recipe, found))
        )
        self.behaviour.wait()

    def draw_behaviour(self, recipe: Recipe, found: Behaviour | Sequence[Continuation]) -> None:
        """Draw what changed."""
        if self.session.bench is None:
            return
        if isinstance(found, Behaviour):
            self.behaviour.show_classes(recipe.label(), found, self.session.bench.task.evaluation)
        else:
            self.behaviour.show_texts(recipe.label(), found)

    def draw_live(self) -> None:
        """Draw the present state."""
        state = self.session.live
        self.plot.show_live(state)
        self.strip.show(state)
        self.line.value = line(state.recipe)
        self.code.show(self.model_name, state.recipe)
        self.layers.show(state.point)
        if state.state == "measured":
            self.still.show(self.model_name, state, self.plot.figure)
        self.keeping.draw_live(state)
        self.training.show(state)
        anchor = self.plot.anchor()
        self.dense.value = dense_words(anchor) if anchor is not None else ""

    def draw_history(self) -> None:
        """Draw the past."""
        rows = self.session.rows()
        said = self.keeping.draw_history(rows)
        self.plot.pinned = tuple(key for key, annotation in said.items() if annotation.pinned)
        self.plot.show_history(rows)
        self.tabs.set_title(self.tabs.children.index(self.history), f"history ({len(rows):,})")

    def run(self, recipe: Recipe) -> Measurement:
        """Put the sliders on a recipe, measure it, wait, and return the complete point: for notebooks without
        a browser.

        Raises:
            WorkbenchError: what loading, compression or measurement raised.
        """
        if self.session.bench is None:
            self.session.load_now(self.picker.choice)
        self.follow(recipe)
        point = self.session.run(recipe)
        self.pacer.flush()
        return point

    def close(self) -> None:
        """Stop the threads and close the widgets.

        Ipywidgets calls this also for a panel that could not be made.
        """
        for part in (
            vars(self).get("waiting"),
            vars(self).get("keeping"),
            vars(self).get("session"),
            vars(self).get("pacer"),
        ):
            if part is not None:
                part.close()
        super().close()


def log_defect(error: BaseException) -> None:
    """Write the whole traceback of what is no user's mistake to the log."""
    if not isinstance(error, WorkbenchError):
        traceback.print_exception(error)


def dense_words(point: Measurement) -> str:
    """Return the dense model in the head line."""
    quality = point.primary
    value = metric_named(quality.metric).words(quality.dense.value)
    time = f" &middot; {point.latency.dense_median_ms:.1f} ms" if point.latency else ""
    if point.latency and point.latency.real_time_factors:
        time += f" &middot; real-time factor {point.latency.real_time_factors[0]:.3f}"
    about = escape(
        f"{quality.metric} on {point.items:,} items of {point.context.data_name}; {point.context.device_name}"
    )
    return (
        f"<span title='{about}'><b>\N{BLACK STAR}</b> dense: <b>{value}</b> {escape(quality.metric)} &middot;"
        f" {size(point.dense_sizes.file_bytes)}{time}</span>"
    )
