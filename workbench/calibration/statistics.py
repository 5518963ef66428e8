"""What calibration data say about a model, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, cast
from weakref import WeakValueDictionary

from torch import Tensor

from workbench.calibration.memory_cache import Cache, cache_of
from workbench.calibration.passes import Gradients, Moments, gradients, second_moments
from workbench.calibration.routing import routing
from workbench.errors import LayerSkipped
from workbench.modules.layer import Layer, find_layers
from workbench.modules.offload import HOST, fetched, moved, streams_to
from workbench.util.progress import Progress, no_progress

if TYPE_CHECKING:
    from workbench.tasks.base import Task

T = TypeVar("T")

NO_INPUT = "it receives no input during calibration, so it cannot be compressed by its activations"


class Statistics:
    """What methods need to know about a model and derive from it: the dense one, or another one that the task
    is given.

    Nothing is computed before it is asked for. `once` keeps what does not depend on a slider (factorisations,
    sorted weights) within the budget of `cache`, so that moving the slider pays only for the rest.
    """

    def __init__(self, task: Task, progress: Progress = no_progress, cache: Cache | None = None) -> None:
        """Remember the task; compute nothing yet.

        Without a `cache` what is computed is kept in memory, within its default budget.
        """
        self.task = task
        self.progress = progress
        self.kept = cache or cache_of(task)
        self.visiting: WeakValueDictionary[int, Tensor] = (
            WeakValueDictionary()
        )  # second moments of a streamed model on its device, for as long as someone reads them

    def once(
        self, key: Hashable, compute: Callable[[], T], *, lasting: bool = False, optional: bool = False
    ) -> T:
        """Return `compute()`, kept under `key` for the next time.

        With `lasting` also on disk, for what depends on the model, the calibration data and the key alone;
        `optional` for what a move asks for once, so that it need not be kept where there is no room. See
        `Cache.once`.
        """
        if not optional or streams_to(self.task.model) is None:
            return self.kept.once(key, compute, lasting=lasting, optional=optional)
        return self.visit(
            self.kept.once(key, lambda: cast("T", moved(compute(), HOST)), lasting=lasting, optional=True)
        )  # the device has no room for it

    def stacked(
        self, family: Hashable, names: Sequence[str], compute: Callable[[list[int]], T]
    ) -> list[tuple[T, int]]:
        """Return (a stack, the place in it) of each name, where `compute(places)` makes the stack of some of
        the names at once.

        What an earlier stack holds is not computed again, whatever names it was computed with; all the rest
        is, together.
        """
        where: dict[str, tuple[Hashable, int]] = self.once(("places", family), dict)
        stacks: dict[Hashable, T] = {}
        for key in dict.fromkeys(where[name][0] for name in names if name in where):
            if (kept := self.kept.get(key)) is not None:
                stacks[key] = self.visit(kept[0])
        missing = [
            place for place, name in enumerate(names) if name not in where or where[name][0] not in stacks
        ]
        fresh = (family, tuple(names[place] for place in missing))
        places = {name: where[name] for name in names if name in where} | {
            names[place]: (fresh, index) for index, place in enumerate(missing)
        }
        if missing:
            stacks[fresh] = self.once(fresh, lambda: compute(missing), lasting=True, optional=True)
            where.update(places)
        return [(stacks[key], place) for key, place in (places[name] for name in names)]

    def visit(self, value: T) -> T:
        """Return a kept value where it is worked with: of a streamed model, which keeps all at home, a copy
        on its device.
        """
        device = streams_to(self.task.model)
        return value if device is None else cast("T", moved(value, device))

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Return the task's model's layers by name: to read, not to write."""
        return find_layers(self.task.model)[0]

    def second_moment(self, name: str) -> Tensor:
        """Return E[x x^T] of a layer's inputs, float32 [inputs, inputs], on the model's device.

        Raises:
            LayerSkipped: the layer sees no input during calibration.
            CompressionError: one that is not finite.

        """
        kept, device = entry_of(self.moments().matrices, name), streams_to(self.task.model)
        if device is None:
            return kept
        there = self.visiting.get(id(kept))
        if there is None:
            there = self.visiting[id(kept)] = fetched(kept, device)
        return there

    def rows(self, name: str) -> int:
        """Return how many inputs the layer saw: with fewer than it has columns, its second moment is
        singular. Raises as `second_moment`.
        """
        return entry_of(self.moments().rows, name)

    def moments(self) -> Moments:
        """Return the second moments of all layers."""
        return self.once("second moments", lambda: second_moments(self.task, self.progress), lasting=True)

    def routing(self) -> dict[str, Tensor]:
        """Return tokens and weighted output norms of each expert, by block: float64 [2, experts], as
        `workbench.calibration.routing.routing`.
        """
        return self.once("routing", lambda: routing(self.task, self.progress), lasting=True)

    def without_inputs(self) -> dict[str, str]:
        """Return the layers that multiply something, but of whose inputs calibration says nothing, and why.

        Kept by itself: the moments of a large model need not be read again for it.
        """

        def look() -> dict[str, str]:
            moments = self.moments()
            return {
                name: moments.failed.get(name, NO_INPUT)
                for name, layer in self.layers.items()
                if not layer.table and name not in moments.matrices
            }

        return self.once("layers without inputs", look, lasting=True)

    def without_gradients(self, *, tables: bool = False) -> dict[str, str]:
        """Return the layers that take no part in the loss of the calibration data, and that it is so; of
        embeddings only with `tables`.
        """

        def look() -> dict[str, str]:
            key = "gradients of tables" if tables else "gradients"
            by_layer = self.once(
                key, lambda: gradients(self.task, self.progress, tables=tables), lasting=True
            )
            return {
                name: "it takes no part in the loss of the calibration data"
                for name, layer in self.layers.items()
                if layer.table == tables and name not in by_layer
            }

        return self.once(("layers without gradients", tables), look, lasting=True)

    def gradients(self, name: str) -> Gradients:
        """Return the gradients of the task's loss (such as cross entropy with the labels of the calibration
        items) by a layer's weight.

        Raises:
            LayerSkipped: the layer takes no part in the loss.
            CompressionError: a gradient is not finite.
        """
        of_weights = self.once("gradients", lambda: gradients(self.task, self.progress), lasting=True)
        if name in of_weights:
            return of_weights[name]
        return entry_of(
            self.once(
                "gradients of tables", lambda: gradients(self.task, self.progress, tables=True), lasting=True
            ),
            name,
        )


def entry_of(table: dict[str, T], name: str) -> T:
    """Return a layer's entry, or say that calibration never reached it."""
    if name not in table:
        raise LayerSkipped(name, NO_INPUT)
    return table[name]
