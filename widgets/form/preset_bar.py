"""Buttons under the sliders: back and forth, cancel, and the way to the smallest point within a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ipywidgets as ipw

from widgets.form.recipe_form import RecipeForm
from widgets.session.point_search import Ended, search
from widgets.session.session import Session
from workbench.errors import RecipeError
from workbench.ledger.pareto import fastest_within, smallest_within
from workbench.measure.measurement import Measurement
from workbench.search.local_search import Trial
from workbench.util.text import size

WITHIN = (0.005, 0.01, 0.02, 0.05)
TRIALS = 24


class PresetBar(ipw.VBox):
    """Undo, redo, cancel, reset; presets among measured points, and a search that measures more of them."""

    def __init__(
        self,
        form: RecipeForm,
        session: Session,
        guarded: Callable[[Callable[[], None]], None],
        say: Callable[[str], None],
        post: Callable[[str, Callable[[], None]], None],
    ) -> None:
        """Make the buttons.

        Args:
            form: the sliders that presets move.
            session: knows the measured points, and searches.
            guarded: calls a function; what it raises is shown in the panel.
            say: shows a sentence in the panel, "" removes it.
            post: runs a function on the thread that draws, in a slot.

        """
        self.form, self.session, self.guarded, self.say, self.post = form, session, guarded, say, post
        self.within = ipw.Dropdown(
            options=[(f"{100 * drop:g} %", drop) for drop in WITHIN],
            value=0.01,
            description="within",
            tooltip="the loss of quality against the dense model that you accept",
        )
        self.within.add_class("wb-within")
        self.search = self.button(
            "search",
            "measure up to 24 recipes, one slider at a time, towards the smallest file within this loss;"
            " cancel stops it",
            self.start,
        )
        smallest = self.button(
            "smallest",
            "the smallest measured point whose whole interval is within this loss",
            lambda: self.preset(smallest_within),
        )
        fastest = self.button(
            "fastest",
            "the fastest measured point within this loss that is faster than dense on this device, beyond its"
            " interval",
            lambda: self.preset(fastest_within),
        )
        undo = self.button("undo", "take back the last move", form.undo)
        redo = self.button("redo", "do it again", form.redo)
        stop = self.button("cancel", "stop measuring or searching; what has been read stays", self.cancel)
        reset = self.button("reset", "turn every method off", form.reset)
        back, ahead = (
            ipw.HBox([undo, redo, stop, reset]),
            ipw.HBox([self.within, smallest, fastest, self.search]),
        )
        for row in (back, ahead):
            row.add_class("wb-buttons")
        super().__init__([back, ahead])

    def button(self, label: str, about: str, act: Callable[[], None]) -> ipw.Button:
        """Return a button whose errors are shown in the panel."""
        button = ipw.Button(description=label, tooltip=about)
        button.on_click(lambda _: self.guarded(act))
        return button

    def preset(self, choose: Callable[[Sequence[Measurement], float], Measurement | None]) -> None:
        """Put the sliders on the measured point that `choose` finds.

        Raises:
            RecipeError: none is shown to be within the loss.

        """
        rows = self.session.rows()
        point = choose(rows, self.within.value)
        if point is None or not len(point.recipe):
            what = "smaller" if choose is smallest_within else "faster"
            raise RecipeError(
                f"none of {len(rows):,} measured points is {what} and shown to be within {self.within.label}:"
                " move the sliders, allow more, or press search"
            )
        self.form.set_recipe(point.recipe)

    def cancel(self) -> None:
        """Stop what is measured."""
        self.session.cancel()
        self.say("")

    def start(self) -> None:
        """Begin a search behind the panel; moving a slider or cancel ends it."""
        drop, label = self.within.value, self.within.label
        self.say(f"search within {label}: starting; a slider or cancel stops it")

        def heard(news: Trial | Ended) -> None:
            self.post("search", lambda: self.show(news, label))

        search(self.session, drop, TRIALS, heard)

    def show(self, news: Trial | Ended, label: str) -> None:
        """Say how far a search is, and at its end put the sliders on its best point."""
        if isinstance(news, Ended):
            self.ended(news.last, label)
        else:
            self.say(tried(news, label))

    def ended(self, last: Trial | None, label: str) -> None:
        """Put the sliders on the best point of a search."""
        best = smallest_within(self.session.rows(), self.within.value) if last is None else last.best
        if best is None or not len(best.recipe):
            self.say(
                f"search within {label}: none of the recipes near the dense model is shown to be within;"
                " allow more, or read more items"
            )
            return
        self.form.set_recipe(best.recipe)
        count = "no neighbour is smaller" if last is None else f"{last.tried} tried"
        self.say(
            f"search within {label} ended, {count}: {best.recipe.label()} is the smallest,"
            f" {size(best.sizes.file_bytes)}, {best.shrink:.1f}\N{MULTIPLICATION SIGN} smaller"
        )


def tried(trial: Trial, label: str) -> str:
    """Return how far a search is."""
    best = "none within yet"
    if trial.best is not None:
        best = f"smallest within {label}: {size(trial.best.sizes.file_bytes)} ({trial.best.recipe.label()})"
    return f"search {trial.tried} of at most {trial.trials}: {best}"
