"""Whether a model waits for memory or for arithmetic, and how much faster a recipe can be (the roofline of
Williams et al. 2009).

Bandwidth and arithmetic are measured on this device, once. A layer takes as long as its bytes need to be read
from main memory and its products to be computed, whichever is longer. Overheads are not counted, so most
measured ratios lie below; what fits into a cache is read faster than this, so small models wait for memory
less than it says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from workbench.util.device import Clock
from workbench.util.library_internals import byte_product
from workbench.util.text import one_line

if TYPE_CHECKING:
    from workbench.shapes.outline import Outline

COPIED = {"cpu": 2**26, "cuda": 2**29}  # bytes: more than any cache holds
PASSES = {
    "cpu": 9,
    "cuda": 1,
}  # over inputs that are rounded: largest, division, rounding, clamping one by one, or one kernel
SQUARE = {"cpu": 1024, "cuda": 8192}  # rows of the matrices that are multiplied


@dataclass(frozen=True)
class Limits:
    """What a device can do at most: bytes read and written a second, and multiply-adds a second by the
    inputs' width in bits.
    """

    bytes_per_s: float
    multiply_adds_per_s: dict[int, float]
    refused: str = ""  # what it could not be asked

    def words(self) -> str:
        """Return both as a line for users."""
        sums = ", ".join(
            f"{2 * rate / 1e9:,.0f} GFLOP/s at {bits} bits"
            for bits, rate in sorted(self.multiply_adds_per_s.items(), reverse=True)
        )
        rest = f"; {self.refused}" if self.refused else ""
        return f"measured here: {self.bytes_per_s / 1e9:,.1f} GB/s copied, {sums}{rest}"


@dataclass(frozen=True)
class Product:
    """One layer of one pass: [rows, inputs] by [inputs, outputs].

    `weight_bytes` as they are read, `bits` of the numbers that are multiplied.

    `passes` over the inputs, each read and written as float32, round them before the product.
    """

    rows: int
    inputs: int
    outputs: int
    weight_bytes: float
    bits: int
    passes: int = 0

    def rounding_seconds(self, limits: Limits) -> float:
        """Return the least time for rounding the inputs."""
        return self.passes * 8 * self.rows * self.inputs / limits.bytes_per_s

    def seconds(self, limits: Limits, activation_bytes: int) -> tuple[float, float]:
        """Return the least time for memory and for arithmetic."""
        moved = self.weight_bytes + self.rows * (
            self.inputs * min(activation_bytes, self.bits / 8) + self.outputs * activation_bytes
        )
        rate = (
            limits.multiply_adds_per_s.get(self.bits)
            or limits.multiply_adds_per_s[max(limits.multiply_adds_per_s)]
        )
        return moved / limits.bytes_per_s, self.rows * self.inputs * self.outputs / rate


@dataclass(frozen=True)
class Roof:
    """What bounds a recipe: `memory` is the share of the time that layers wait for memory, `ratio` the speed
    to expect against dense.
    """

    memory: float
    ratio: float

    @property
    def bound(self) -> str:
        """Return "memory" or "arithmetic"."""
        return "memory" if self.memory >= 0.5 else "arithmetic"

    def words(self) -> str:
        """Return a sentence for users."""
        return (
            f"bound by {self.bound} ({self.memory:.0%} of the time waits for memory); {self.ratio:.2f}x as"
            " fast by bandwidth and arithmetic measured here"
        )


def roof(
    dense: Iterable[Product], compressed: Iterable[Product], limits: Limits, activation_bytes: int
) -> Roof:
    """Return the bound of a recipe's products, and the ratio of the dense model's time to theirs."""
    before = sum(max(product.seconds(limits, activation_bytes)) for product in dense)
    memory = after = 0.0
    for product in compressed:
        reading, computing = product.seconds(limits, activation_bytes)
        rounding = product.rounding_seconds(limits)
        after += max(reading, computing) + rounding
        memory += rounding + (reading if reading >= computing else 0.0)
    return Roof(memory / after if after else 0.0, before / after if after else 1.0)


def products(
    outline: Outline, items: int, multiplied: Callable[[int], int], passes: int = 0
) -> list[Product]:
    """Return the products of one pass over `items`, whose inputs are rounded in `passes`.

    `multiplied(bits)` says in what width a kernel here multiplies weights of `bits`, 0 if none reads them so.
    """
    listed = []
    for weight in outline.weights:
        if weight.table:
            continue
        wide = weight.dtype.itemsize * 8
        bits = math.ceil(weight.bits)
        kernel = multiplied(bits) if bits else 0
        listed.append(
            Product(
                items * outline.positions.get(weight.origin, 1),
                weight.columns,
                weight.rows,
                weight.count * ((weight.bits if kernel else wide) / 8),
                min(kernel or wide, wide),
                passes,
            )
        )
    return listed


@cache
def limits_of(device: str) -> Limits:
    """Return the limits of a device, measured the first time they are asked for: about half a second."""
    place = torch.device(device)
    clock = Clock(place)
    wide = torch.bfloat16 if place.type == "cuda" else torch.float32
    source = torch.empty(COPIED[place.type], dtype=torch.uint8, device=place).fill_(1)
    target = torch.empty_like(source)
    side = SQUARE[place.type]
    left, right = (torch.randn(side, side, device=place, dtype=wide) for _ in range(2))
    rates = {8 * wide.itemsize: side**3 / best(clock, lambda: left @ right)}
    try:
        codes = torch.randint(-127, 127, (side, side), dtype=torch.int8, device=place)
        rates[8] = side**3 / best(clock, lambda: byte_product(codes, codes.t()))
        refused = ""
    except RuntimeError as error:  # this device has none
        refused = f"no products of 8-bit integers ({one_line(error)})"
    return Limits(2 * source.nbytes / best(clock, lambda: target.copy_(source)), rates, refused)


def best(clock: Clock, call: Callable[[], object], rounds: int = 9) -> float:
    """Return the seconds of the faster half of some rounds, as their median, after two untimed ones."""
    times = sorted(clock.time_ms(call) / 1000 for _ in range(rounds + 2))[: rounds // 2 + 1]
    return statistics.median(times)
