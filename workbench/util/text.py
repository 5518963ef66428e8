"""How numbers, sizes and names read in messages and tables."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(given: str, choices: Iterable[str]) -> str:
    """Return `nearest: a, b` for a mistyped name, or `known: ...` when nothing is close."""
    names = list(choices)
    close = get_close_matches(given, names, n=3, cutoff=0.5)
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(names[:12])}{more}"


def file_name(name: str) -> str:
    """Return a name with a dash for every character that is no letter, digit, `-`, `_` or `.`: one part of a
    path.
    """
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def size(count: float | None) -> str:
    """Return bytes as `4.02 MB` (powers of 1000, as disks and hubs count)."""
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def one_line(error: BaseException) -> str:
    """Return an exception's message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def kind_and_words(error: BaseException) -> str:
    """Return an exception in one line: its kind and the first 200 characters of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
