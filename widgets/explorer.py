"""The whole panel: sliders on the left, the trade-off on the right, what it means below.

Composes; decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as ipw

from widgets.form.model_picker import ModelPicker
from widgets.form.preset_bar import PresetBar
from widgets.form.recipe_form import RecipeForm
from widgets.labels import Labels
from widgets.panes.behaviour_view import BehaviourView
from widgets.panes.code_view import CodeView, RecipeLine
from widgets.panes.dense_line import DenseLine
from widgets.panes.error_pane import ErrorPane, explain, log_defect
from widgets.panes.layer_view import LayerView
from widgets.panes.pane_tabs import OwnPane, PaneTabs, with_own
from widgets.panes.points_controller import PointsController
from widgets.panes.static_snapshot import StaticSnapshot
from widgets.panes.training_view import TrainingView
from widgets.panes.verdict_strip import VerdictStrip
from widgets.plot.tradeoff_view import TradeoffView
from widgets.session.earlier_panels import close_earlier
from widgets.session.leaving import at_exit
from widgets.session.load_progress import LoadProgress
from widgets.session.model_choice import ModelChoice
from widgets.session.pacer import Pacer
from widgets.session.session import Session
from workbench.measure.measurement import Measurement
from workbench.recipe import Recipe

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
        panes: Sequence[OwnPane] = (),
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
            panes: more tabs, each made from the panel's session; see `OwnPane`.

        Raises:
            ValueError: two tabs have one title.

        """
        self.made_by: object = None
        self.closed = False
        choice = ModelChoice(model, data, device, evaluation_items)
        close_earlier(self, (choice, recipe, ledger, runtime, placement, offline))
        self.following = (
            False  # whether the sliders are put where the session is, and not the other way round
        )
        self.errors = ErrorPane()
        self.form = RecipeForm(recipe)
        self.picker = ModelPicker(choice)
        self.load_progress = LoadProgress(self.picker.busy)
        self.pacer = Pacer(self.failed)
        self.session = Session(
            ledger=ledger, runtime=runtime, placement=placement, offline=offline, progress=False
        )
        self.make_panes(panes)
        super().__init__(self.arrange())
        self.add_class("wb-panel")
        self.join()
        self.leaves = at_exit(self.stop)
        self.session.start(self.form.recipe)
        self.load()

    def make_panes(self, own: Sequence[OwnPane]) -> None:
        """Make what shows the session's state. `panes` are drawn in their order, by the pacer's thread.

        Tabs come last: what a pane from outside raises keeps nothing else from being drawn.
        """
        session, guarded, post = self.session, self.guarded, self.pacer.post
        self.plot = TradeoffView(self.go_to, self.brushed)
        self.strip, self.line, self.dense = VerdictStrip(), RecipeLine(), DenseLine()
        self.points = PointsController(session, go_to=self.go_to, guarded=guarded, post=post)
        self.training = TrainingView(lambda: guarded(session.stop_training))
        self.layers = LayerView(session, self.form, guarded=guarded, post=post)
        self.behaviour = BehaviourView(session, guarded=guarded, post=post)
        self.code = CodeView()
        self.history, self.compare = self.points.history, self.points.compare
        tabs = {
            "layers": self.layers,
            "behaviour": self.behaviour,
            "compare": self.compare,
            "history": self.history,
            "code": self.code,
        }
        self.tabs = PaneTabs(with_own(tabs, own, session), post)
        self.snapshot = StaticSnapshot(self.plot.figure.to_dict)
        self.panes = (
            self.plot,
            self.strip,
            self.line,
            self.dense,
            self.points,
            self.training,
            self.snapshot,
            self.tabs,
        )

    def arrange(self) -> list[ipw.Widget]:
        """Return the parts of the panel, top to bottom."""
        css = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
        style = ipw.HTML(f"<style>{css}</style>", layout=ipw.Layout(display="none"))
        self.presets = PresetBar(
            self.form,
            self.session,
            self.guarded,
            lambda message: self.errors.say("search", message, "note"),
            self.pacer.post,
        )
        head = ipw.HBox([self.picker, self.picker.loading, self.dense])
        left, right = ipw.VBox([self.form, self.presets, self.line]), ipw.VBox([self.plot])
        main = ipw.HBox([left, right])
        named = {"wb-head": head, "wb-left": left, "wb-right": right, "wb-main": main, "wb-line": self.line}
        for name, widget in named.items():
            widget.add_class(name)
        below = [self.errors, self.training, self.strip, self.points.line, self.points.bar, self.tabs]
        return [style, Labels(), head, main, *below]

    def join(self) -> None:
        """Let controls and session tell what happens."""
        session, post = self.session, self.pacer.post
        session.on_state.subscribe(lambda: post("state", self.draw))
        session.on_points.subscribe(lambda: post("points", session.read_past))
        session.on_loaded.subscribe(self.loaded)
        session.on_error.subscribe(self.failed)
        session.on_load_error.subscribe(self.not_loaded)
        session.on_recipe.subscribe(self.follow)
        session.on_start.subscribe(self.starting)
        self.form.observe(self.moved, "state")
        self.picker.observe(lambda _: self.load(), "choice")
        self.picker.stop.on_click(lambda _: self.guarded(self.give_up))
        self.tabs.observe(
            lambda _: self.layers.set_visible(visible=self.tabs.visible is self.layers), "selected_index"
        )

    def _ipython_display_(self) -> None:
        """Show the panel, and under it the picture that stays where no kernel runs."""
        from IPython.display import display

        display({**self._repr_mimebundle_(), "text/html": ""}, raw=True)
        self.snapshot.display()

    # --- what a user does

    def guarded(self, act: Callable[[], None]) -> None:
        """Act on a click; what goes wrong is shown in the panel."""
        self.errors.guard(act, lambda: self.form.state.last)

    def moved(self, change: dict[str, Any]) -> None:
        """Start on what the sliders say now, then show what they say of themselves."""
        state, before = change["new"], change["old"]
        if state.recipe != before.recipe and not self.following:
            try:
                self.session.start(state.recipe)
            except Exception as error:  # noqa: BLE001  an exception in a callback appears nowhere else
                self.failed(error)
            for source in ("action", "search"):
                self.errors.say(source, "")
        self.errors.say("sliders", state.error)
        self.errors.say("note", state.note, "note")
        self.layers.show_overrides()

    def go_to(self, key: str) -> None:
        """Put the sliders back to a point of the ledger."""
        point = next((row for row in self.session.rows() if row.key == key), None)
        if point is not None:
            self.guarded(lambda: self.form.set_recipe(point.recipe))

    def brushed(self, keys: Sequence[str]) -> None:
        """Put the points of a box side by side, and show them."""
        self.points.select(keys)
        if keys:
            self.tabs.select(self.compare)

    def load(self) -> None:
        """Load what is picked; what is on the bench stays usable."""
        if self.picker.choice != self.session.choice:
            self.errors.say("load", "")
            self.load_progress.start(self.picker.choice.name)
            self.session.load(self.picker.choice)
        elif self.session.loader.busy:
            self.give_up()

    def give_up(self) -> None:
        """Stop waiting for what loads, and show what is on the bench."""
        self.session.loader.give_up()
        self.load_progress.stop()
        if self.session.choice is not None:
            self.picker.put(self.session.choice)

    # --- what the session tells

    def draw(self) -> None:
        """Draw the present state."""
        state = self.session.state
        self.tabs.set_title(self.tabs.children.index(self.history), f"history ({len(state.past.rows):,})")
        self.errors.say("ledger", state.past.damage, "note")
        for pane in self.panes:
            pane.show(state)

    def follow(self, recipe: Recipe) -> None:
        """Put the sliders on what is measured, without starting anew."""
        self.following = True
        try:
            self.form.set_recipe(recipe)
        finally:
            self.following = False

    def loaded(self) -> None:
        """Show that a model has been loaded."""
        self.load_progress.stop()
        device = "" if self.session.bench is None else self.session.bench.device.type
        self.pacer.post("kernels", lambda: self.form.show_kernels(device))

    def starting(self) -> None:
        """Let the prediction be drawn, here and in the browser, before a measurement takes the processor."""
        self.errors.say("work", "")  # what the one before raised
        if self.pacer.flush(0.05):
            time.sleep(BROWSER_SECONDS)

    def failed(self, error: BaseException) -> None:
        """Show what a thread raised; where it is a defect of ours, the whole traceback goes to the log."""
        log_defect(error)
        self.errors.say("work", explain(error, self.form.state.last))

    def not_loaded(self, error: BaseException) -> None:
        """Go back to the model that is there, and say why the other one is not."""
        wanted = self.picker.choice
        self.load_progress.stop()
        log_defect(error)
        self.errors.say("load", f"{wanted.name} is not loaded: {explain(error, '')}")
        if self.session.choice is not None:
            self.picker.put(self.session.choice)
        self.pacer.post("state", self.draw)

    # --- without a browser

    def run(self, recipe: Recipe) -> Measurement:
        """Put the sliders on a recipe, measure it, wait, and return the complete point.

        Raises:
            WorkbenchError: what loading, compression or measurement raised.
        """
        if self.session.bench is None:
            self.session.loader.load_now(self.picker.choice)
        self.follow(recipe)
        point = self.session.run(recipe)
        self.pacer.flush()
        return point

    def close(self) -> None:
        """Stop the threads, let go of the model and close the widgets, all parts of the panel among them.

        Ipywidgets calls this also for a panel that could not be made.
        """
        self.stop()
        for part in parts_of(self):
            part.close()
        super().close()

    def stop(self) -> None:
        """Stop the threads and let go of the model."""
        attributes = vars(self)
        self.closed = True
        if "leaves" in attributes:
            self.leaves()
        if "load_progress" in attributes:
            self.load_progress.stop()
        for name, part in list(attributes.items()):
            if name in {"points", "session", "pacer"}:
                part.close()


def parts_of(panel: ipw.Widget) -> list[ipw.Widget]:
    """Return every widget that a widget is made of, but not itself: layouts, styles, and those that are not
    shown now.
    """
    waiting, widgets = [panel], dict[int, ipw.Widget]()
    while waiting:
        current = waiting.pop()
        for value in [*current.trait_values().values(), *vars(current).values()]:
            for trait in held(value):
                if isinstance(trait, ipw.Widget) and id(trait) not in widgets and trait is not panel:
                    widgets[id(trait)] = trait
                    waiting.append(trait)
    return list(widgets.values())


def held(value: object) -> Iterable[object]:
    """Return the members of a list, tuple or table; of anything else, itself alone."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)
