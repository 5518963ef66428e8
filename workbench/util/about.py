"""A line of the table of methods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """A line of the table of methods, for readers: one choice of a method."""

    choice: str  # such as `criterion=wanda`
    source: str  # paper and year
    once: str  # what is computed once per model and kept
    move: str  # what a move of the slider costs after that
    limits: str  # what it does not achieve
