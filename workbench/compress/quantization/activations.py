"""Activations: round what layers read, so that products can be of small integers on both sides (W8A8)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from workbench.compress.core.batch import Batch, attempt, of_one_shape
from workbench.compress.core.context import Work
from workbench.compress.method import ErrorTable
from workbench.compress.quantization.observers import Ranges, called_layers, ranges_now
from workbench.compress.registry import METHODS
from workbench.errors import LayerSkipped, RecipeError
from workbench.modules.input_quantizer import InputFormat, QuantizesInputs, quantized_class, quantized_like
from workbench.modules.layer import Layer, can_hold, replace_module
from workbench.modules.weight_shapes import StoredTensor
from workbench.recipe import Mark, Step, first_leaving
from workbench.shapes.outline import Outline
from workbench.util.about import About
from workbench.util.configuration import configuration

LEAST_SMOOTHING = 1e-5  # as in the paper's code: no weight is divided by less


@configuration
class Activations(Step):
    """Round the inputs of every product: to integers of `activation_bits`, or to float8 (e4m3) with a scale.

    `dynamic` scales follow the inputs at hand: the largest magnitude of each token (a row of a Linear's
    inputs, an image of a convolution's) or of the whole tensor. `static` scales are fixed: the extremes that
    calibration data reach, one range a layer. `smoothing` moves outliers of the inputs into the weights first
    (SmoothQuant, Xiao et al. 2023): input channel j is divided by max|x_j|^smoothing / max|w_j|^(1 -
    smoothing), and the weights are multiplied by it, so that nothing changes before rounding. Each layer has
    divisors of its own; the paper folds them into the norm before, where layers share them.

    The rounding is simulated, and exact: quality is that of integer products with wide accumulators. Weights
    stay as they are: W8A8 is this step and Quantize(weight_bits=8) after it. Training after it passes
    gradients through the rounding.

    What it does not do: make anything faster by itself; round the products inside attention, embeddings, or
    what a repair term reads. With one dynamic scale a tensor, an answer depends on what else is in its batch,
    padding included.
    """

    slider: ClassVar[str] = "activation_bits"
    position: ClassVar[int] = 28
    aside: ClassVar[bool] = True
    stops: ClassVar[tuple[float, ...]] = (8,)
    about: ClassVar[tuple[About, ...]] = (
        About(
            "activation_scaling=dynamic",
            "per token as in ZeroQuant, Yao et al. 2022",
            "nothing",
            "new modules around the same weights",
            "finds its scales at every pass, which costs time",
        ),
        About(
            "activation_scaling=static",
            "Jacob et al. 2018",
            "extremes of every layer's inputs, one pass over calibration data; again after a step that"
            " changed the model",
            "new modules",
            "inputs beyond those of calibration are clamped",
        ),
        About(
            "smoothing",
            "SmoothQuant, Xiao et al. 2023",
            "as static",
            "one product a weight",
            "weights become harder to round as inputs become easier",
        ),
        About(
            "activation_format=float8",
            "Micikevicius et al. 2022 (e4m3)",
            "as the scaling",
            "new modules",
            "3 bits of mantissa: coarser than 8-bit integers without outliers",
        ),
    )

    activation_bits: Annotated[
        int, Field(ge=4, le=8, description="bits per input of a product; kernels exist for 8")
    ] = 8
    activation_format: Annotated[
        Literal["integer", "float8"], Field(description="what inputs are rounded to")
    ] = "integer"
    activation_scaling: Annotated[
        Literal["dynamic", "static"],
        Field(description="scales from the inputs at hand, or fixed on calibration data"),
    ] = "dynamic"
    activation_granularity: Annotated[
        Literal["token", "tensor"], Field(description="which inputs share a scale")
    ] = "token"
    activation_grid: Annotated[
        Literal["symmetric", "asymmetric"], Field(description="whether the integers have a zero point")
    ] = "symmetric"
    smoothing: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="how much of the inputs' outliers moves into the weights; 0 moves none, 0.5 is usual",
        ),
    ] = 0.0

    @model_validator(mode="after")
    def choices_fit(self) -> Activations:
        """Refuse choices that contradict each other."""
        if self.activation_format == "float8" and self.activation_bits != 8:
            raise ValueError(
                f"activation_format='float8' has 8 bits, activation_bits={self.activation_bits} contradicts"
                " it: take activation_bits=8, or activation_format='integer'"
            )
        if self.activation_format == "float8" and self.activation_grid == "asymmetric":
            raise ValueError("activation_format='float8' has no zero point: take activation_grid='symmetric'")
        if self.activation_scaling == "static" and self.activation_granularity == "token":
            raise ValueError(
                "activation_scaling='static' has one range a layer, tokens to come are not known: take"
                " activation_granularity='tensor'"
            )
        return self

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse smoothing where it would move weights off a grid or away from what was fitted to them."""
        after = first_leaving(earlier, "grid", "cast", "term")
        if self.smoothing and after is not None:
            raise RecipeError(
                f"Activations(smoothing={self.smoothing:g}) cannot follow {type(after).__name__}: it"
                " multiplies weights that are settled; put Activations before it, or take smoothing=0"
            )

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the mark that it leaves: inputs that are rounded."""
        return frozenset({"inputs"})

    @property
    def rounding(self) -> InputFormat:
        """Return how inputs are rounded."""
        return InputFormat(
            self.activation_bits,
            self.activation_format,
            self.activation_scaling == "dynamic",
            self.activation_granularity == "token",
            self.activation_grid == "symmetric",
        )

    def label(self) -> str:
        """Return such as `A8`, `A8 static` or `A-float8 smooth 0.5`."""
        name = "A-float8" if self.activation_format == "float8" else f"A{self.activation_bits}"
        static = " static" if self.activation_scaling == "static" else ""
        return name + static + (f" smooth {self.smoothing:g}" if self.smoothing else "")


@dataclass(frozen=True)
class Fitted:
    """What calibration says about the layers of one batch: divisors [layers, channels] or None, scales and
    zero points [layers] or None.
    """

    smooth: Tensor | None
    scale: Tensor | None
    zero: Tensor | None


def shapes(outline: Outline, step: Activations) -> Outline:
    """Return the outline with what rounds inputs beside the weights: divisors, scales and zero points."""
    added: list[StoredTensor] = []
    for weight in outline.weights:
        if weight.table or not outline.takes(weight, step):
            continue
        name = weight.origin if weight.others else weight.name
        if step.smoothing and not weight.others:
            channels = weight.shape[1] if len(weight.shape) == 4 else weight.columns
            added.append(StoredTensor(f"{name}.smooth", "F32", (channels,), 4 * channels))
        if step.activation_scaling == "static":
            added += [
                StoredTensor(f"{name}.input_scale", "F32", (), 4),
                StoredTensor(f"{name}.input_zero", "I32", (), 4),
            ]
    return replace(outline, rest=(*outline.rest, *added), inputs=step.rounding)


WIDTHS = tuple(range(2, 9))
FLOAT8 = 2.0**-10  # relative squared error of e4m3 numbers: three bits of mantissa
INTEGER = 64 / 12  # that of b-bit integers over a range of 4 standard deviations each way is this times 4^-b


def error_table(step: Activations) -> ErrorTable:
    """Return the errors of rounded inputs, the same in every layer: by the width alone."""
    if step.activation_format == "float8":
        return ErrorTable(("float8",), (8,), lambda _: torch.tensor([FLOAT8], dtype=torch.float64))
    errors = torch.tensor([INTEGER * 4.0**-bits for bits in WIDTHS], dtype=torch.float64)
    return ErrorTable(("integer",), WIDTHS, lambda _: errors)


@METHODS.register(
    Activations,
    title="activations",
    shapes=shapes,
    errors=error_table,
    strength=lambda bits: min(1.0, (2.0 ** (4 - bits)) ** 0.5),
    trains=lambda _: False,
    placed=lambda _: "",
    reads=lambda step: frozenset({"ranges"} if step.activation_scaling == "static" or step.smoothing else ()),
    alone=True,
)
def activations(step: Activations, work: Work) -> None:
    """Replace layers by ones that round their inputs; smoothing multiplies their weights."""
    calls = called_layers(work.statistics)
    layers = [layer for layer in work.choose(step) if can_round(layer, work, calls)]
    ranges = ranges_now(work) if step.smoothing or step.activation_scaling == "static" else None
    done = 0
    for batch in (
        part for members in (smoothable(layers, step), others(layers, step)) for part in of_one_shape(members)
    ):
        work.progress(step.kind(), done, len(layers))
        smoothing = step.smoothing if not batch.layers[0].others else 0.0
        attempt(batch, partial(round_batch, step, smoothing=smoothing, ranges=ranges, work=work))
        done += len(batch.layers)
        for layer in batch.layers:
            kept = (
                f", not smoothed: its weight is shared with {', '.join(layer.others)}"
                if step.smoothing and layer.others
                else ""
            )
            work.took(
                step, layer, f"{step.rounding.words()}{f', smoothed {smoothing:g}' if smoothing else kept}"
            )
    work.progress(step.kind(), len(layers), len(layers))


def round_batch(step: Activations, batch: Batch, smoothing: float, ranges: Ranges | None, work: Work) -> None:
    """Make layers of one shape round their inputs."""
    fitted = fit(batch, step, smoothing, ranges)
    if fitted.smooth is not None:
        batch.write(batch.matrices() * columns_of(batch, fitted.smooth).unsqueeze(1))
    install(batch, step.rounding, fitted, work)


def smoothable(layers: list[Layer], step: Activations) -> list[Layer]:
    """Return the layers that are smoothed: whose weight is nobody else's."""
    return [layer for layer in layers if step.smoothing and not layer.others]


def others(layers: list[Layer], step: Activations) -> list[Layer]:
    """Return the layers that are not smoothed."""
    return [layer for layer in layers if not step.smoothing or layer.others]


def can_round(layer: Layer, work: Work, calls: frozenset[str]) -> bool:
    """Return whether a layer's inputs can be rounded; if not, the report says why."""
    reason = ""
    if layer.table:
        reason = "an embedding looks rows up: it has no inputs to round"
    elif isinstance(layer.module, QuantizesInputs):
        reason = "its inputs are rounded already"
    elif quantized_class(layer.module) is None:
        reason = f"a {type(layer.module).__name__} may do more than one product"
    elif layer.origin not in calls:
        reason = "the model reads its weight but never calls it"
    if reason:
        work.say(layer, f"activations skipped: {reason}")
    return not reason


def fit(batch: Batch, step: Activations, smoothing: float, ranges: Ranges | None) -> Fitted:
    """Return divisors and fixed scales of layers of one shape.

    Raises:
        LayerSkipped: a layer receives no input during calibration.

    """
    if ranges is None:
        return Fitted(None, None, None)
    for layer in batch.layers:
        if layer.name not in ranges.low:
            raise LayerSkipped(
                layer.name,
                "it receives no input during calibration: take activation_scaling='dynamic' and smoothing=0",
            )
    low, high = (
        torch.stack([side[layer.name] for layer in batch.layers]) for side in (ranges.low, ranges.high)
    )
    smooth = (
        divisors(torch.maximum(low.abs(), high.abs()), largest_weights(batch), smoothing)
        if smoothing
        else None
    )
    if step.activation_scaling == "dynamic":
        return Fitted(smooth, None, None)
    if smooth is not None:
        low, high = low / smooth, high / smooth
    scale, zero = step.rounding.parameters(low.amin(1).clamp_max(0), high.amax(1).clamp_min(0))
    return Fitted(smooth, scale, zero.to(torch.int32))


def largest_weights(batch: Batch) -> Tensor:
    """Return max|w| over the outputs (and the kernel) of each input channel, float32 [layers, channels]."""
    columns = batch.matrices().abs().amax(1)
    return columns.view(len(columns), -1, batch.layers[0].patch).amax(2)


def divisors(inputs: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Return max|x|^smoothing / max|w|^(1 - smoothing), 1 where either is zero; all [layers, channels]."""
    exact = inputs.pow(smoothing) / weights.pow(1 - smoothing)
    return torch.where((inputs > 0) & (weights > 0), exact, torch.ones_like(exact)).clamp_min(LEAST_SMOOTHING)


def columns_of(batch: Batch, channels: Tensor) -> Tensor:
    """Return [layers, channels] repeated for each column of the matrices: a convolution has several a
    channel.
    """
    return channels.repeat_interleave(batch.layers[0].patch, 1)


def install(batch: Batch, rounding: InputFormat, fitted: Fitted, work: Work) -> None:
    """Put modules that round their inputs in the places of a batch's, wherever a weight is multiplied by."""
    for index, layer in enumerate(batch.layers):
        own: list[Any] = [
            None if part is None else part[index].clone()
            for part in (fitted.smooth, fitted.scale, fitted.zero)
        ]
        for name, module in {layer.name: layer.module, **layer.others}.items():
            if not can_hold(module) or quantized_class(module) is None:
                continue
            rounding_module = quantized_like(module, rounding, *own)
            replace_module(work.model, name, rounding_module)
            if name == layer.name:
                layer.module = rounding_module
            else:
                layer.others[name] = rounding_module
