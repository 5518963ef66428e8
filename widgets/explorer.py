"""The whole panel: sliders on the left, the trade-off on the right, what it means below. Composes; decides nothing."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as ipw

from widgets import live as records
from widgets.behaviour_view import BehaviourView
from widgets.code_view import CodeView, line
from widgets.error_pane import ErrorPane, explain
from widgets.history_view import HistoryView
from widgets.honesty import HonestyStrip
from widgets.layer_view import LayerView
from widgets.pacer import Pacer
from widgets.recipe_form import RecipeForm
from widgets.session import Session
from widgets.tradeoff_view import TradeoffView
from workbench.errors import RecipeError, WorkbenchError
from workbench.measure.behaviour import Behaviour, Continuation
from workbench.measure.measurement import Measurement
from workbench.recipe import Recipe
from workbench.words import size
from workbench.zoo import models


class Explorer(ipw.VBox):
    """Drag a slider, watch the real model answer.

        from widgets import Explorer
        panel = Explorer("fashion-vit")   # shows itself as the last line of a cell
        point = panel.run(recipe)         # without a browser: measures, waits, returns the point

    Every slider has the name of its recipe option. What is predicted is hollow on the plot and marked as predicted in the
    strip; what is measured is filled, with its interval. Every finished point is in the ledger.
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
            offline: never reach for the network.

        """
        self.quiet = False
        self.model_name = model
        self.errors = ErrorPane()
        self.form = RecipeForm(recipe)
        self.plot = TradeoffView(self.go_to)
        self.strip, self.layers, self.code, self.history = HonestyStrip(), LayerView(), CodeView(), HistoryView(self.go_to)
        self.behaviour = BehaviourView(lambda: self.guarded(self.ask_behaviour))
        self.line, self.dense = ipw.HTML(), ipw.HTML("loading ...")
        names = list(dict.fromkeys([model, *(entry.name for entry in models())]))
        self.model = ipw.Dropdown(options=names, value=model, description="model", tooltip="the model to compress; another one loads while this one stays usable")
        self.pacer = Pacer(self.failed)
        self.session = Session(
            on_live=lambda: self.pacer.post("live", self.draw_live), on_history=lambda: self.pacer.post("history", self.draw_history),
            on_loaded=self.loaded, on_error=self.failed, on_not_loaded=self.not_loaded, breathe=lambda: self.pacer.flush(0.05), data=data, device=device, ledger=ledger, evaluation_items=evaluation_items,
            offline=offline, progress=False,
        )  # fmt: skip
        super().__init__(self.arrange())
        self.add_class("wb-panel")
        self.model.observe(self.model_picked, "value")
        self.form.observe(self.moved, "recipe")
        self.form.observe(lambda _: self.errors.say("sliders", self.form.error), "error")
        self.form.observe(lambda _: self.errors.say("note", self.form.note, "note"), "note")
        self.session.start(self.form.recipe)
        self.session.load(model)

    def arrange(self) -> list[ipw.Widget]:
        """Return the parts of the panel, top to bottom."""
        style = ipw.HTML(f"<style>{(Path(__file__).parent / 'style.css').read_text(encoding='utf-8')}</style>", layout=ipw.Layout(display="none"))
        head = ipw.HBox([self.model, self.dense])
        left = ipw.VBox([self.form, self.buttons(), self.line])
        right = ipw.VBox([self.plot])
        main = ipw.HBox([left, right])
        tabs = self.tabs = ipw.Tab([self.layers, self.behaviour, self.history, self.code], titles=["layers", "behaviour", "history", "code"])
        named = {"wb-head": head, "wb-left": left, "wb-right": right, "wb-main": main, "wb-tabs": tabs, "wb-model": self.model, "wb-dense": self.dense, "wb-line": self.line}
        for name, widget in named.items():
            widget.add_class(name)
        return [style, head, main, self.errors, self.strip, tabs]

    def buttons(self) -> ipw.HBox:
        """Return presets, undo, redo and cancel."""
        def button(words: str, about: str, act: Callable[[], None]) -> ipw.Button:
            made = ipw.Button(description=words, tooltip=about)
            made.on_click(lambda _: self.guarded(act))
            return made

        row = ipw.HBox([
            button("undo", "take back the last move", self.form.undo),
            button("redo", "do it again", self.form.redo),
            button("cancel", "stop measuring; what has been read stays", self.session.cancel),
            button("reset", "turn every method off", self.form.reset),
            ipw.HTML("<span class='wb-dim'>within 1%:</span>"),
            button("smallest", "the smallest measured point whose whole interval is within 1% of the dense model", lambda: self.preset(records.smallest_within)),
            button("fastest", "the fastest measured point within 1% that is faster beyond its interval", lambda: self.preset(records.fastest_within)),
        ])  # fmt: skip
        row.add_class("wb-buttons")
        return row

    def guarded(self, act: Callable[[], None]) -> None:
        """Act on a click; what goes wrong is shown in the panel."""
        try:
            self.errors.say("action", "")
            act()
        except Exception as error:  # noqa: BLE001  an exception in a callback appears nowhere else
            self.errors.say("action", explain(error, self.form.last))

    def preset(self, choose: Callable[[list[Measurement], float], Measurement | None]) -> None:
        """Put the sliders on the point of the ledger that `choose` finds within 1%."""
        found = choose(self.session.rows(), 0.01)
        if found is None:
            raise RecipeError("no measured point is shown to be within 1% and better: try a few sliders first")
        self.form.set_recipe(found.recipe)

    def go_to(self, key: str) -> None:
        """Put the sliders back to a point of the ledger."""
        found = next((row for row in self.session.rows() if row.key == key), None)
        if found is not None:
            self.guarded(lambda: self.form.set_recipe(found.recipe))

    def moved(self, _change: dict[str, Any]) -> None:
        """Start on what the sliders say."""
        if not self.quiet:
            self.errors.say("work", "")
            self.guarded(lambda: self.session.start(self.form.recipe))

    def model_picked(self, change: dict[str, Any]) -> None:
        """Load another model."""
        self.errors.say("load", "")
        if change["new"] != self.model_name:
            self.dense.value = f"loading {escape(change['new'])} ..."
            self.session.load(change["new"])

    def loaded(self) -> None:
        """Show a model that has been loaded."""
        self.model_name = self.model.value
        self.pacer.post("history", self.draw_history)

    def failed(self, error: BaseException) -> None:
        """Show what a thread raised; where it is a defect of ours, the whole traceback goes to the log."""
        if not isinstance(error, WorkbenchError):
            traceback.print_exception(error)
        self.errors.say("work", explain(error, self.form.last))

    def not_loaded(self, error: BaseException) -> None:
        """Go back to the model that is there, and say why the other one is not."""
        self.failed(error)
        self.dense.value = "not loaded"
        self.model.value = self.model_name
        self.pacer.post("live", self.draw_live)

    def ask_behaviour(self) -> None:
        """Compare the answers of both models, item by item, behind the panel."""
        self.session.compare(lambda recipe, found: self.pacer.post("behaviour", lambda: self.draw_behaviour(recipe, found)))
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
        anchor = self.plot.anchor()
        if anchor is not None:
            self.dense.value = dense_words(anchor)

    def draw_history(self) -> None:
        """Draw the past."""
        rows = self.session.rows()
        self.plot.show_history(rows)
        self.history.show(rows)
        self.tabs.set_title(self.tabs.children.index(self.history), f"history ({len(rows):,})")

    def run(self, recipe: Recipe) -> Measurement:
        """Put the sliders on a recipe, measure it, wait, and return the complete point: for notebooks without a browser.

        Raises:
            WorkbenchError: what loading, compression or measurement raised.

        """
        if self.session.bench is None:
            self.session.load_now(self.model.value)
        self.quiet = True
        try:
            self.form.set_recipe(recipe)
        finally:
            self.quiet = False
        point = self.session.run(recipe)
        self.pacer.flush()
        return point

    def close(self) -> None:
        """Stop the threads and close the widgets; ipywidgets calls this also for a panel that could not be made."""
        for part in (vars(self).get("session"), vars(self).get("pacer")):
            if part is not None:
                part.close()
        super().close()


def dense_words(point: Measurement) -> str:
    """Return the dense model in the head line."""
    quality = point.primary
    value = f"{quality.dense.value:.1%}" if quality.metric.endswith("accuracy") else f"{quality.dense.value:.4g}"
    time = f" &middot; {point.latency.dense_median_ms:.1f} ms" if point.latency else ""
    about = escape(f"{quality.metric} on {point.items:,} items of {point.context.data_name}; {point.context.device_name}")
    return f"<span title='{about}'><b>\N{BLACK STAR}</b> dense: <b>{value}</b> {escape(quality.metric)} &middot; {size(point.dense_sizes.file_bytes)}{time}</span>"
