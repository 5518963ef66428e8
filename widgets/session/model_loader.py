"""Loads models on a thread of its own; the one on the bench stays usable meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from widgets.session.model_choice import ModelChoice
from widgets.session.worker import Make, Stale, Worker
from workbench.bench import Bench
from workbench.predict.predictor import Predictor
from workbench.recipe import Recipe


@dataclass(frozen=True)
class Loaded:
    """A model with its data, and the predictor that learns from its points."""

    choice: ModelChoice
    bench: Bench
    predictor: Predictor


class ModelLoader:
    """The newest choice wins: what was loading before is never taken over."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        on_loaded: Callable[[Loaded], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """Load nothing yet.

        Args:
            settings: those of `workbench.Bench` that no `ModelChoice` holds.
            on_loaded: gets what has been loaded.
            on_error: gets what loading raised, where nobody waits for it.

        """
        self.settings, self.on_loaded, self.on_error = settings, on_loaded, on_error
        self.worker: Worker[Loaded] = Worker(on_error)

    @property
    def busy(self) -> bool:
        """Return whether something loads."""
        return self.worker.busy

    def start(self, choice: ModelChoice) -> None:
        """Start loading a model in place of what loads, and return at once."""
        self.give_up()
        self.worker.submit(self.job(choice), self.on_loaded)

    def load_now(self, choice: ModelChoice) -> None:
        """Load a model, wait, and raise what goes wrong."""
        self.worker.run(self.job(choice), self.on_loaded)

    def give_up(self) -> None:
        """Stop waiting for what loads.

        A library in the middle of a download cannot be stopped: its thread is left to end alone.
        """
        if self.worker.busy:
            self.worker.close(timeout=0)
            self.worker = Worker(self.on_error)

    def job(self, choice: ModelChoice) -> Make[Loaded]:
        """Return the job that loads a model with its data."""

        def make(_stale: Stale) -> Iterator[Loaded]:
            bench = Bench(
                choice.model,
                choice.data,
                device=choice.device,
                evaluation_items=choice.evaluation_items,
                **self.settings,
            )
            predictor = bench.predictor()
            predictor.predict(Recipe())  # the first one is slow: libraries warm up
            bench.predicts = predictor.record
            yield Loaded(choice, bench, predictor)

        return make

    def close(self) -> None:
        """Stop; what cannot be stopped in ten seconds ends alone, and is waited for before Python is left."""
        self.worker.close()
