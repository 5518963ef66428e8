"""Which layers stand apart from a slider, and how one is taken out, set apart or put back; pure."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.errors import RecipeError
from workbench.recipe import Step

Mode = Literal["follow", "out", "own"]


@dataclass(frozen=True)
class Line:
    """The steps of one kind that stand before and after the one on the slider."""

    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()

    @classmethod
    def around(cls, main: Step | None, steps: Sequence[Step]) -> Line:
        """Return the steps of its kind before and after `main`."""
        index = next((i for i, step in enumerate(steps) if step is main), 0)
        return cls(tuple(steps[:index]), tuple(steps[index + 1 :]))

    def steps(self, main: Step) -> tuple[Step, ...]:
        """Return all steps of the kind in their order."""
        return (*self.before, main, *self.after)


@dataclass(frozen=True)
class LayerSteps:
    """All steps of one kind: `main` is on the slider, `own` stand beside it.

    Each change returns a new one.
    """

    main: Step
    own: Line = Line()

    def steps(self) -> tuple[Step, ...]:
        """Return the steps in their order."""
        return self.own.steps(self.main)

    def mode(self, layer: str, *, head: bool = False) -> tuple[Mode, Step]:
        """Return how a layer stands (following `main`, left out, or on its own), and by which step."""
        for step in (*self.own.before, *self.own.after):
            if step.takes(layer, head=head):
                return "own", step
        return ("follow" if self.main.takes(layer, head=head) else "out"), self.main

    def exclude(self, layer: str) -> LayerSteps:
        """Return the steps without this layer.

        Raises:
            RecipeError: the step on the slider works on this layer alone.

        """
        main = without(self.main, layer)
        if main is None:
            raise RecipeError(f"{self.main!r} works on {layer} alone: move its slider, or turn it off")
        before, after = (
            tuple(left for step in part if (left := without(step, layer)) is not None)
            for part in (self.own.before, self.own.after)
        )
        return LayerSteps(main, Line(before, after))

    def override(self, layer: str, step: Step) -> LayerSteps:
        """Return the steps with `step` for this layer only; it keeps its place if the layer had one already.

        Raises:
            RecipeError: see `exclude`.

        """
        mine = dataclasses.replace(step, targets=(literal(layer),))
        before, after = (
            tuple(mine if old.targets == mine.targets else old for old in part)
            for part in (self.own.before, self.own.after)
        )
        if mine in (*before, *after):
            return LayerSteps(self.main, Line(before, after))
        apart = self.exclude(layer)
        return LayerSteps(apart.main, Line(apart.own.before, (*apart.own.after, mine)))

    def follow(self, layer: str, *, head: bool = False) -> LayerSteps:
        """Return the steps with this layer taken by `main`; the output head (`head`) has to be named.

        Raises:
            RecipeError: a wider target such as `!re:fc` leaves it out.

        """
        if self.mode(layer, head=head)[0] == "follow":
            return self
        apart = self.exclude(layer)
        kept = tuple(target for target in apart.main.targets if target != f"!{literal(layer)}")
        main = dataclasses.replace(apart.main, targets=kept or ("*",))
        if main.excluded(layer) is not None:
            raise RecipeError(
                f"{layer} is left out by target {main.excluded(layer)!r} of {main.kind()}, which is wider:"
                " change the recipe in Python"
            )
        if not main.takes(layer, head=head):
            main = dataclasses.replace(main, targets=(*main.targets, literal(layer)))
        return LayerSteps(main, apart.own)


def literal(layer: str) -> str:
    """Return a layer's name as a target that picks nothing else."""
    return glob.escape(layer)


def without(step: Step, layer: str) -> Step | None:
    """Return the step without a layer, None if it worked on nothing else."""
    kept = tuple(target for target in step.targets if target != literal(layer))
    if not kept or (len(kept) < len(step.targets) and all(target.startswith("!") for target in kept)):
        return None
    if dataclasses.replace(step, targets=kept).takes(layer):
        kept = (*kept, f"!{literal(layer)}")
    return dataclasses.replace(step, targets=kept)
