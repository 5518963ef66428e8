"""A method: one registered record that holds every fact about a step.

What is not stated is unknown, and shown so: a method without a rule for shapes has no predicted size or
speed, one without a rule for errors is predicted with the whole range, one that does not say where it may run
is refused where that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from workbench.compress.core.layer_sample import LayerSample
from workbench.modules.factored import Shape
from workbench.recipe import Step
from workbench.shapes.outline import Outline

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics
    from workbench.util.progress import Progress

# Why a step cannot be taken on a model that is streamed or spread
GRADIENTS = "gradients need all of the model on one device"
SHARED_OUT = (
    "sharing out over layers needs all of them on one device; take the uniform allocation and a whole width"
)
TRAINING = "it trains or runs the model in a way that needs all of it on one device"

Reads = Literal["moments", "gradients", "ranges"]  # statistics of calibration data


@dataclass(frozen=True)
class ErrorTable:
    """How far each layer's outputs move under a step, at every place of its slider, without running it.

    key: what the table depends on besides the slider: equal keys are one table.
    knots: the values of the slider at which it has entries.
    errors: a few rows of one weight to relative squared errors of the layer's outputs, [knots].
    works: whether the step changes a layer of this shape at all; None: every layer that it takes.
    """

    key: tuple[Any, ...]
    knots: Sequence[float]
    errors: Callable[[LayerSample], Tensor]
    works: Callable[[Shape], bool] | None = None


@dataclass(frozen=True)
class WholeTable:
    """How far layers' outputs move under a step that takes parts out of several layers at once, found on the
    whole model.

    key, knots: as those of an `ErrorTable`; what leaves also depends on the targets.
    errors: (statistics, samples of layers, progress, which may raise to stop) -> relative squared errors of
        their outputs, [layers, knots]; None where the model has nothing that the step takes.
    times: what these errors weigh beside those of single weights.
    ratios: whether it holds for metrics whose change is a ratio, such as perplexity; unknown there if not.
    """

    key: tuple[Any, ...]
    knots: Sequence[float]
    errors: Callable[[Statistics, list[LayerSample], Progress], Tensor | None]
    times: float = 1.0
    ratios: bool = False


@dataclass(frozen=True)
class Recovery:
    """What a step wins back of the errors that earlier steps made: the share of them that is left.

    least, most: the share left at best and at worst, 0 to 1; equal where a rule says it.
    of: the kinds of step whose errors it takes back, None for all.
    """

    least: float
    most: float
    of: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Method:
    """Every fact of one method. None means unknown.

    step: its configuration.
    apply: carries the step out: (step, work) -> the step as it was done, if that differs, or None.
    title: the slider's name in panels, such as "rank"; None takes the option's name.
    shapes: (outline, step) -> the outline of the model after it; None where shapes do not say.
    errors: step -> how far outputs move, or what it wins back; None where no rule holds.
    strength: the slider's value to how strong the step is: 0 is off, about 1 as strong as it gets. Measured
        points at other values count as near by it; without it, only points at the same value do.
    trains: step -> whether it trains: it may be ended early, is watched, and is not kept for the next move.
    placed: step -> why it cannot be taken on a model that is streamed from the host or spread over GPUs, ""
        if it can.
    reads: step -> which statistics of calibration data it reads.
    alone: whether it makes sense on one layer alone.
    """

    step: type[Step]
    apply: Callable[[Any, Any], Step | None]
    title: str | None = None
    shapes: Callable[[Outline, Any], Outline | None] | None = None
    errors: Callable[[Any], ErrorTable | WholeTable | Recovery | None] | None = None
    strength: Callable[[float], float] | None = None
    trains: Callable[[Any], bool] | None = None
    placed: Callable[[Any], str] | None = None
    reads: Callable[[Any], frozenset[Reads]] | None = None
    alone: bool | None = None

    @property
    def slider_title(self) -> str:
        """Return the slider's name in panels."""
        return self.title or self.step.slider.replace("_", " ")

    @property
    def kind(self) -> str:
        """Return the name that JSON and messages use."""
        return self.step.kind()
