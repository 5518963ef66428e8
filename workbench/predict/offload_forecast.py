"""How long a recipe takes on a streamed model, before anyone waits: passes over the weights, at the measured
speed of the way to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from workbench.compress.method import Reads
from workbench.compress.registry import METHODS
from workbench.measure.setting import Setting
from workbench.modules.layer import find_layers
from workbench.modules.offload import HOST, blocks_of, fetched, streams_to
from workbench.modules.placement import gigabytes, model_bytes
from workbench.recipe import Recipe, Step
from workbench.runtime.roofline import best, limits_of
from workbench.shapes.positions import positions
from workbench.util.device import Clock

SAMPLE = 2**26  # bytes at most that a way is timed with
STEP_PASSES = 3  # a step fetches the layers it changes, takes them home, and they are fetched to be checked
CLOSING_PASSES = 3  # the report compares them with the dense ones, and the sizes count their zeros


@dataclass(frozen=True)
class Forecast:
    """Seconds until the first look and until all items are read, on one streamed model.

    `pass_bytes` go to the device in one pass over the weights, at `bytes_per_s`; `pass_seconds` is one pass
    of the evaluation at least, with the arithmetic of a full batch. Time that a method itself computes is in
    it once a move has shown it (see `Pace`): most take less than the way.
    """

    pass_bytes: int
    bytes_per_s: float
    pass_seconds: float
    once_seconds: float
    compress_seconds: float
    first_seconds: float
    all_seconds: float
    known: bool = False  # from an earlier move

    def words(self) -> str:
        """Return a sentence for users."""
        reason = (
            "as the move before this one went"
            if self.known
            else "if the method itself takes no longer than the way"
        )
        return (
            f"streamed from the host: {gigabytes(self.pass_bytes)} a pass at {self.bytes_per_s / 1e9:.1f}"
            f" GB/s; about {seconds(self.first_seconds)} to the first look and {seconds(self.all_seconds)} to"
            f" all items, {reason}"
        )


@dataclass
class Pace:
    """What the last move on a streamed model took over what counting its passes says, compressing and reading
    apart. Mutable.

    The first move also takes host memory for the compressed weights, which the next one finds there (`warm`).
    """

    compress: float = 1.0
    read: float = 1.0
    warm: bool = False

    def learn(self, told: Forecast, compress_seconds: float, read_seconds: float) -> None:
        """Take what a move took to be compressed and to its first look.

        What is computed once says nothing about the next one, the dense model nothing about compressing.
        """
        if (forecast_seconds := told.first_seconds - told.once_seconds - told.compress_seconds) > 0:
            self.read *= read_seconds / forecast_seconds
        if not told.compress_seconds:
            return
        if self.warm and not told.once_seconds:
            self.compress *= compress_seconds / told.compress_seconds
        self.warm = True


def seconds(value: float) -> str:
    """Return a duration in words, such as `12 s` or `3 min`."""
    if value < 0.1:
        return "0.1 s"
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


def forecast(setting: Setting, pace: Pace, recipe: Recipe, first: int) -> Forecast | None:
    """Return how long a recipe will take until a look at the `first` items and until all.

    None where nothing is streamed.

    What was computed before (second moments, scores of the dense model) is not counted again.
    """
    task, kept = setting.task, setting.statistics
    device = streams_to(task.model)
    if device is None:
        return None
    speed = kept.once("bytes a second to the device", lambda: speed_to(setting))
    size = model_bytes(task.model)
    transfer = size / speed
    pass_seconds = pass_time(transfer, setting, device) * pace.read
    once = moment_seconds(setting, recipe, pass_seconds)
    compress = (
        STEP_PASSES * len(recipe) + (CLOSING_PASSES if len(recipe) else 0)
    ) * transfer * pace.compress + (0.0 if pace.warm or not len(recipe) else home_seconds(setting, size))
    read_before = sum(map(len, kept.once("dense scores", list)))

    def reading(items: int) -> float:
        return pass_seconds * (
            ceil(items / task.batch_size) + ceil(max(0, items - read_before) / task.batch_size)
        )

    start, everything = once + compress, len(setting.evaluation)
    return Forecast(
        size,
        speed,
        pass_seconds,
        once,
        compress,
        start + reading(min(first, everything)),
        start + reading(everything),
        pace.warm,
    )


def home_seconds(setting: Setting, size: int) -> float:
    """Return how long it takes to get `size` bytes of host memory that a GPU writes to, measured once with
    those of a block; 0 where that is ordinary memory.
    """
    if setting.device.type != "cuda" or not next(setting.task.model.parameters()).is_pinned():
        return 0.0
    largest = max(map(model_bytes, blocks_of(setting.task.model)), default=size)

    def measured() -> float:
        return Clock(HOST).time_ms(lambda: torch.empty(largest, dtype=torch.uint8, pin_memory=True)) / 1000

    return setting.statistics.once("seconds to pin a block", measured) * size / largest


def speed_to(setting: Setting) -> float:
    """Return the bytes a second at which the model's largest block reaches the device, measured as it is
    fetched.
    """
    model, device = setting.task.model, setting.device
    block = max(blocks_of(model), key=model_bytes, default=model)
    tensors = list(block.parameters())
    took = best(Clock(device), lambda: [fetched(tensor, device) for tensor in tensors], rounds=3)
    return sum(tensor.nbytes for tensor in tensors) / took


def pass_time(transfer: float, setting: Setting, device: torch.device) -> float:
    """Return the seconds of one pass with a full batch: the way or the arithmetic, whichever is longer.

    On a CPU one after the other.
    """
    limits = limits_of(str(device))
    arithmetic = (
        setting.task.batch_size
        * item_products(setting)
        / limits.multiply_adds_per_s[max(limits.multiply_adds_per_s)]
    )
    return max(transfer, arithmetic) if device.type == "cuda" else transfer + arithmetic


def item_products(setting: Setting) -> int:
    """Return the multiply-adds of one evaluation item, from one pass of it; kept."""

    def count() -> int:
        used = positions(setting.task, setting.evaluation)
        return sum(
            layer.parameter.numel() * used.get(name, 0)
            for name, layer in find_layers(setting.task.model)[0].items()
            if not layer.table or layer.others
        )

    return setting.statistics.once("multiply-adds of an item", count)


def may_read(step: Step, what: Reads) -> bool:
    """Return whether a step reads a statistic, as one may whose method does not say."""
    reads = METHODS.of(step).reads
    return reads is None or what in reads(step)


def moment_seconds(setting: Setting, recipe: Recipe, pass_seconds: float) -> float:
    """Return the seconds for the second moments, 0 if the recipe reads none or they are there: passes, and
    each batch's moments taken home.
    """
    reads = any(may_read(step, "moments") for step in recipe)
    if not reads or "second moments" in setting.statistics.kept:
        return 0.0
    task = setting.task
    batches = ceil(len(task.calibration) / task.batch_size)
    inputs = {
        (name.rpartition(".")[0], layer.parameter.shape[-1])
        for name, layer in find_layers(task.model)[0].items()
        if not layer.table
    }
    sizes = [4 * columns**2 for _, columns in inputs]
    home = setting.statistics.once("bytes a second home", lambda: speed_home(setting, max(sizes, default=4)))
    return batches * (pass_seconds + sum(sizes) / home)


def speed_home(setting: Setting, size: int) -> float:
    """Return the bytes a second at which results reach the host, into memory that is new to it, which takes
    longer than the way.
    """
    result = torch.empty(max(1, min(size, SAMPLE)), dtype=torch.uint8, device=streams_to(setting.task.model))
    return result.nbytes / best(Clock(setting.device), lambda: result.to(HOST, copy=True), rounds=3)
