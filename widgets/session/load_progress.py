"""Says twice a second what loads, for how long, and how much of it has been fetched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from html import escape

from workbench.util.text import size
from workbench.zoo.download_progress import arrived_bytes

PAUSE_SECONDS = 0.5


class LoadProgress:
    """A thread that lives while something loads; `show` gets words in HTML, and "" at the end."""

    def __init__(self, show: Callable[[str], None], arrived: Callable[[str], int] = arrived_bytes) -> None:
        """Start nothing yet; `arrived` says how many bytes of a model are on this disk."""
        self.show, self.arrived = show, arrived
        self.changed = threading.Condition()
        self.generation = 0

    def start(self, name: str) -> None:
        """Begin to say that a model loads, in place of the one before."""
        with self.changed:
            self.generation += 1
            self.show(words(name, 0.0, 0))
            args = (name, self.generation)
            threading.Thread(target=self.loop, args=args, name="workbench-loading", daemon=True).start()

    def stop(self) -> None:
        """Say nothing more, and end the thread."""
        with self.changed:
            self.generation += 1
            self.show("")
            self.changed.notify_all()

    def loop(self, name: str, generation: int) -> None:
        """Say it again and again, until something else is to be said (the thread's body)."""
        begin, before = time.monotonic(), self.arrived(name)
        with self.changed:
            while not self.changed.wait_for(lambda: self.generation != generation, PAUSE_SECONDS):
                self.show(words(name, time.monotonic() - begin, self.arrived(name) - before))


def words(name: str, seconds: float, fetched: int) -> str:
    """Return a line on how far loading is, in HTML; `fetched` are bytes."""
    more = f", {size(fetched)} fetched" if fetched > 0 else ""
    return f"loading {escape(name)}: {seconds:.0f} s{more}"
