"""How many of the things that were read were treated specially, and how: for notes."""

from __future__ import annotations

from collections import Counter


class Tally:
    """Counts things as they are read, and what was done to some of them.

    Items are made when they are taken, so that what was done is known only afterwards: `notes` is asked last.
    """

    def __init__(self, noun: str) -> None:
        """Start with none; `noun` is what is counted, in the plural: "pictures"."""
        self.noun, self.read = noun, 0
        self.done: Counter[str] = Counter()

    def add(self, *done: str) -> None:
        """Count one thing, and what was done to it: such as "have more than 8 bits a pixel, scaled to 8"."""
        self.read += 1
        self.done.update(dict.fromkeys(done, 1))

    def notes(self) -> tuple[str, ...]:
        """Return a line for each thing done: "3 of 150 pictures are ..."."""
        return tuple(
            f"{count:,} of {self.read:,} {self.noun} {what}" for what, count in sorted(self.done.items())
        )
