"""Number formats of stored weights: what a code stands for. One registered record holds every fact of one.

A format is one of three sorts: integers on an affine grid (`bits` None; `workbench.formats.affine` does the
arithmetic), small numbers with a scale a group (`levels`, or `encode` and `decode`), or a cast (`cast`),
16-bit numbers without scales. The built-in ones are in `workbench.formats.number_formats`, one file each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from workbench.errors import RecipeError
from workbench.util.about import About
from workbench.util.registry import Registry

WIDEST = 8  # bits of a code: codes are bytes
OFFSET = "offset"  # what files call integers whose zero points are no integers


@dataclass(frozen=True)
class NumberFormat:
    """Every fact of one number format. `FORMATS.register` refuses facts that do not fit together.

    bits: of a code, 1 to 8, or 16 of a cast; None: integers of any whole width from 2 to 8.
    levels: the numbers that codes stand for, by code; values go to the nearest, halfway between two to the
        lower one, or with `even` to that of even code.
    encode, decode: in place of levels, float32 values that are divided by their scale to the nearest codes
        (uint8 of the same shape), and codes to their numbers (float32, before scaling).
    largest: the largest magnitude that a code stands for; scales are what brings a group's range to it.
    zero_code: the code of 0, which weights that are pruned have.
    scale_dtype: of stored scales: float16 (float32 in layers where its range does not do), or float32.
    searches: whether a range that is narrower than the weights can have less squared error.
    cast: the dtype of 16-bit numbers without scales.
    """

    name: str
    label: str
    bits: int | None
    about: tuple[About, ...] = ()
    levels: tuple[float, ...] | None = None
    even: bool = False
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    largest: float | None = None
    zero_code: int | None = None
    scale_dtype: torch.dtype = torch.float16
    searches: bool = True
    cast: torch.dtype | None = None

    @property
    def affine(self) -> bool:
        """Return whether codes are integers on an affine grid."""
        return self.bits is None

    def encoded(self, values: Tensor) -> Tensor:
        """Return the nearest codes, uint8, of float32 values over their scale, in the same shape;
        `RecipeError` for a format without codes.
        """
        if self.levels is not None:
            places = torch.bucketize(values, bounds(self.levels, self.even, values.device))
            return code_table(self.levels, values.device)[places]
        if self.encode is None:
            raise RecipeError(f"number format {self.name!r} has no codes of its own")
        return self.encode(values)

    def decoded(self, codes: Tensor) -> Tensor:
        """Return the numbers, float32, that codes stand for, in the same shape; `RecipeError` for a format
        without codes.
        """
        if self.levels is not None:
            return level_table(self.levels, codes.device)[codes.int()]
        if self.decode is None:
            raise RecipeError(f"number format {self.name!r} has no codes of its own")
        return self.decode(codes)

    def most(self) -> float:
        """Return the largest magnitude of a code; `RecipeError` where there is none."""
        if self.largest is None:
            raise RecipeError(f"number format {self.name!r} states no largest magnitude")
        return self.largest

    def zero(self) -> int:
        """Return the code of zero; `RecipeError` where there is none."""
        if self.zero_code is None:
            raise RecipeError(f"number format {self.name!r} states no code of zero")
        return self.zero_code


def refuse(record: NumberFormat, reason: str) -> None:
    """Raise `RecipeError` with the reason why a format cannot be registered."""
    raise RecipeError(f"number format {record.name!r} cannot be registered: {reason}")


def check(record: NumberFormat) -> None:
    """Refuse a format whose facts are missing or contradict one another, by trying all of its codes.

    Raises:
        RecipeError: says which fact, and what was found instead.

    """
    codes = record.levels or record.encode or record.decode
    if record.name == OFFSET:
        refuse(record, "the name stands for integers whose zero points are no integers")
    if record.affine:
        if codes or record.cast:
            refuse(record, "without bits it is integers on an affine grid, which have no codes of their own")
    elif record.cast is not None:
        if codes or record.bits != 8 * record.cast.itemsize:
            refuse(record, f"a cast to {record.cast} has {8 * record.cast.itemsize} bits and no codes")
    else:
        check_facts(record)
        check_codes(record)


def check_facts(record: NumberFormat) -> None:
    """Refuse a format with codes that lacks a fact about them."""
    missing = [name for name in ("largest", "zero_code") if getattr(record, name) is None]
    if record.levels is None:
        missing += [name for name in ("encode", "decode") if getattr(record, name) is None]
    if missing:
        refuse(record, f"it states no {', no '.join(missing)}")
    bits = int(record.bits or 0)
    if not 1 <= bits <= WIDEST:
        refuse(record, f"bits={record.bits} should be from 1 to {WIDEST}")
    if record.levels is not None and len(record.levels) != 1 << bits:
        refuse(record, f"{bits} bits have {1 << bits} codes; levels are {len(record.levels)}")
    if record.scale_dtype not in {torch.float16, torch.float32}:
        refuse(record, f"scale_dtype={record.scale_dtype} should be torch.float16 or torch.float32")


def check_codes(record: NumberFormat) -> None:
    """Refuse codes that do not decode to what the facts say, or do not come back."""
    codes = torch.arange(1 << int(record.bits or 0), dtype=torch.int32).to(torch.uint8)
    numbers = record.decoded(codes)
    finite = numbers[torch.isfinite(numbers)]
    if float(record.decoded(codes.new_tensor([record.zero()]))) != 0.0:
        refuse(record, f"zero_code={record.zero_code} does not decode to 0")
    if float(finite.abs().max()) != record.largest:
        refuse(record, f"largest={record.largest}, but codes reach {float(finite.abs().max()):g}")
    if not torch.equal(record.decoded(record.encoded(finite)), finite):
        refuse(record, "numbers that codes stand for do not come back from encode and decode")


FORMATS: Registry[NumberFormat] = Registry("number format", check)


# --- formats that are a table of levels


@cache
def level_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the levels by code, float32 [codes]."""
    return torch.tensor(levels, device=device)


@cache
def code_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the codes of the different levels from the lowest to the highest, uint8 [levels]; of equal
    levels the first.
    """
    return torch.tensor([levels.index(level) for level in sorted(set(levels))], device=device).to(torch.uint8)


@cache
def bounds(levels: tuple[float, ...], even: bool, device: torch.device) -> Tensor:
    """Return the midpoints between neighbouring levels, float32 [levels - 1], up to which the lower one is
    nearest.

    A midpoint itself goes to the lower level, or with `even` to the level whose code is even.
    """
    ordered = sorted(set(levels))
    middle = torch.tensor(ordered, dtype=torch.float64)
    midpoints = ((middle[1:] + middle[:-1]) / 2).float()
    if even:
        upper = torch.tensor([levels.index(level) % 2 == 0 for level in ordered[1:]])
        midpoints = torch.where(upper, torch.nextafter(midpoints, torch.tensor(-torch.inf)), midpoints)
    return midpoints.to(device)
