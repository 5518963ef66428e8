"""Layer by layer: what was done to each weight, what it cost, and what to do differently for one of them."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go

from widgets.figures.layer_figures import weights_changes, weights_figure
from widgets.form.layer_override import layer_overrides
from widgets.form.recipe_form import RecipeForm
from widgets.panes.layer_grid import LayerGrid
from widgets.panes.layer_jobs import LayerJobs
from widgets.panes.layer_rows import TIMES, full_rank, table_of
from widgets.plot.kept_figure import kept_figure
from widgets.session.session import Session
from widgets.session.state import PanelState
from workbench.compress.core.layer_report import LayerReport
from workbench.measure.measurement import Measurement
from workbench.measure.weight_histograms import WeightChange

ABOUT = (
    "Each layer alone, all others dense, on the same items, paired with the dense model. It does not say what"
    " layers cost together: errors pass on from layer to layer and can add up, cancel or grow. Distillation"
    " is left out, and each interval holds by itself."
)
START = "<span class='wb-dim'>Move a slider: every layer is listed here with what happened to it.</span>"


class LayerView(ipw.VBox):
    """A heat map of the layers of the latest point; for the one that is chosen its weights and own settings.

    `show` and `draw` are called by the thread that draws; everything that changes controls happens where the
    user's moves arrive.
    """

    def __init__(
        self,
        session: Session,
        form: RecipeForm,
        *,
        guarded: Callable[[Callable[[], None]], None],
        post: Callable[[str, Callable[[], None]], None],
    ) -> None:
        """Make the tab; the histogram is made when a layer is chosen for the first time.

        Args:
            session: whose points are shown, and whose worker reads weights.
            form: whose recipe the settings of one layer change.
            guarded: runs an action and shows what it raises in the panel.
            post: takes a slot and a drawing, to be done by the thread that draws.

        """
        self.form, self.post = form, post
        self.point: Measurement | None = None
        self.drawn: tuple[Any, ...] = ()
        self.figure: go.FigureWidget | None = None
        self.jobs = LayerJobs(session, lambda: post("layers", self.draw))
        self.pick = ipw.Dropdown(
            options=[("none", "")],
            description="layer",
            tooltip="the layer whose weights and settings are shown; a click on its row does the same",
        )
        self.ask = ipw.Button(
            description="sensitivity", tooltip="measure what the present recipe costs on each layer alone"
        )
        self.status = ipw.HTML(START)
        self.grid = LayerGrid()
        self.title, self.words = ipw.HTML(), ipw.HTML()
        self.log_scale = ipw.Checkbox(description="log scale", indent=False, value=False)
        self.overrides = layer_overrides(form, guarded)
        self.detail = ipw.VBox([self.title, *self.overrides, self.words], layout=ipw.Layout(display="none"))
        bar, main = ipw.HBox([self.pick, self.ask, self.status]), ipw.HBox([self.grid, self.detail])
        super().__init__([bar, main])
        named = {
            "wb-layers": self,
            "wb-layer-bar": bar,
            "wb-layer-main": main,
            "wb-layer-detail": self.detail,
            "wb-layer-words": self.words,
        }
        for name, widget in named.items():
            widget.add_class(name)
        self.pick.observe(lambda change: self.choose(change["new"]), "value")
        self.grid.observe(lambda change: self.choose(change["new"]), "chosen")
        self.ask.on_click(lambda _: guarded(self.ask_sensitivity))
        self.log_scale.observe(lambda _: post("layers log", self.draw_log), "value")
        session.on_loaded.subscribe(lambda: post("layers forget", self.forget))

    def choose(self, layer: str) -> None:
        """Look at a layer, none if empty."""
        if layer == self.jobs.layer:
            return
        self.pick.value = layer if layer in dict(self.pick.options).values() else ""
        self.grid.chosen = layer
        (self.add_class if layer else self.remove_class)("wb-chosen")
        self.detail.layout.display = None if layer else "none"
        self.jobs.look_at(layer)
        self.show_overrides()
        self.post("layers", self.draw)

    def show_overrides(self) -> None:
        """Show how the chosen layer stands in the recipe on the sliders; nothing where none is looked at."""
        layer = self.jobs.layer
        if layer and self.jobs.visible:
            head = layer == self.jobs.head()
            for override in self.overrides:
                override.show(self.form.recipe, layer, head=head)

    def set_visible(self, *, visible: bool) -> None:
        """Read weights and draw only while the tab is open."""
        self.jobs.visible = visible
        if visible:
            self.jobs.inspect()
            self.show_overrides()
            self.post("layers", self.draw)

    def ask_sensitivity(self) -> None:
        """Measure what each layer alone costs, behind the panel."""
        self.jobs.sensitivity()
        self.post("layers", self.draw)

    def show(self, state: PanelState) -> None:
        """Show a point's layers; before the first look at a new recipe the last ones stay."""
        self.point = state.point or self.point
        self.draw()

    def forget(self) -> None:
        """Show nothing: another model is on the bench."""
        self.point, self.drawn = None, ()
        self.choose("")
        self.show_names([])
        self.grid.show(table_of((), {}))
        self.status.value = START

    def draw(self) -> None:
        """Draw what is known now; what has not changed is not sent."""
        point = self.point
        if point is None or not self.jobs.visible:
            return
        costs, most = self.jobs.known_costs(point.recipe)
        drawn = (point.key, len(costs), most)
        if drawn != self.drawn:
            self.drawn = drawn
            self.show_names([row.name for row in point.layers])
            self.grid.show(table_of(point.layers, costs))
        self.status.value = status(point, len(costs), most, running=self.jobs.running())
        row = next((row for row in point.layers if row.name == self.jobs.layer), None)
        if row is not None:
            self.draw_detail(row)

    def show_names(self, names: list[str]) -> None:
        """Offer the layers of the present model; a chosen one that it lacks is forgotten."""
        options = [("none", ""), *((name, name) for name in names)]
        if options != list(self.pick.options):
            keep = self.jobs.layer if self.jobs.layer in names else ""
            self.pick.options = options
            self.pick.value = keep

    def draw_detail(self, row: LayerReport) -> None:
        """Draw the chosen layer: facts, and its weights once they are read."""
        change = self.jobs.shown()
        shape = f"{TIMES.join(map(str, row.shape))} = {row.weights:,} weights stored"
        self.title.value = f"<b>{escape(row.name)}</b> <span class='wb-dim'>{shape}</span>"
        self.words.value = words(row, self.jobs.session.state.recipe.label(), change)
        if change is not None:
            self.draw_weights(change)
        if self.figure is not None:
            (self.figure.add_class if change is None else self.figure.remove_class)("wb-stale")

    def draw_weights(self, change: WeightChange) -> None:
        """Draw the histogram; its widget weighs 5 MB, so it is made when it is first needed."""
        changes = weights_changes(change)
        if self.figure is None:
            figure = weights_figure()
            for index, values in changes.items():
                figure.data[index].update(values)
            self.figure = kept_figure(figure)
            self.detail.children = (*self.detail.children, self.figure, self.log_scale)
            return
        with self.figure.batch_update():
            for index, values in changes.items():
                self.figure.data[index].update(values)

    def draw_log(self) -> None:
        """Switch the counts between a linear and a logarithmic scale."""
        if self.figure is not None:
            self.figure.update_layout(yaxis_type="log" if self.log_scale.value else "linear")


def status(point: Measurement, measured: int, most: int, *, running: bool) -> str:
    """Return the line beside the button: which recipe, how far the sensitivity is, what it does not say."""
    head = f"<b>{escape(point.recipe.label())}</b>"
    if running:
        text = (
            f"measuring one layer at a time: {measured} of {most or '...'}; cancel or a slider move stops it"
        )
        return f"{head} <span class='wb-dim'>{text}</span>"
    if not measured:
        return head
    text = f"{measured} of {most} layers measured alone; together they may cost more or less (hover)"
    return f"{head} <span class='wb-dim' title='{escape(ABOUT)}'>{text}</span>"


def words(row: LayerReport, label: str, change: WeightChange | None) -> str:
    """Return the report on a layer, in words, and its zeros before and after.

    `label` is that of the recipe of `change`.
    """
    facts = {
        "happened": row.outcome,
        "zeros": "" if row.sparsity is None else f"{row.sparsity:.1%}",
        "rank": "" if row.rank is None else f"{row.rank} of {full_rank(row)}",
        "bits": "" if row.bits is None else str(row.bits),
        "relative error": "" if row.relative_error is None else f"{row.relative_error:.4f}",
    }
    told = "".join(f"<div><span>{name}</span>{escape(text)}</div>" for name, text in facts.items() if text)
    if change is None:
        about = f"reading the weights under {escape(label)} ..."
    else:
        product = " (of the product of its two factors)" if row.rank is not None else ""
        counts = (
            f"{change.zeros_before:,} before, {change.zeros_after:,} after{product}, of {change.weights:,}"
        )
        about = f"Weights under <b>{escape(label)}</b>; exact zeros, not drawn: {counts}."
    return f"<div class='wb-facts'>{told}</div><p class='wb-dim'>{about}</p>"
