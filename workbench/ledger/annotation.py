"""Notes and pins."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Annotation:
    """What a user said about a point."""

    note: str = ""
    pinned: bool = False
