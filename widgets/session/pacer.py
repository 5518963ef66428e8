"""Draws at most so many times a second on average, and always the newest: a browser has no way to say that it
cannot keep up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Draw = Callable[[], None]


class Pacer:
    """One thread that owns every drawing.

    Each slot keeps only the newest drawing; after a pause two may follow each other at once.
    """

    def __init__(self, on_error: Callable[[BaseException], None], rate_hz: float = 8.0) -> None:
        """Start nothing yet; `on_error` gets what a drawing raised."""
        self.on_error, self.pause = on_error, 1 / rate_hz
        self.changed = threading.Condition()
        self.slots: dict[str, Draw] = {}
        self.drawing = False
        self.closed = False
        self.thread: threading.Thread | None = None

    def post(self, slot: str, draw: Draw) -> None:
        """Replace what waits in `slot` and return at once."""
        with self.changed:
            if self.closed:
                return
            self.slots[slot] = draw
            if self.thread is None:
                self.thread = threading.Thread(target=self.loop, name="workbench-pacer", daemon=True)
                self.thread.start()
            self.changed.notify_all()

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything posted so far is drawn; False if that took longer than `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.slots and not self.drawing, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Drop what waits and end the thread."""
        with self.changed:
            self.closed = True
            self.slots.clear()
            self.changed.notify_all()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout)

    def loop(self) -> None:
        """Draw until closed (the thread's body)."""
        due = 0.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.slots)
                if self.closed:
                    return
                waiting, self.slots, self.drawing = self.slots, {}, True
            start = time.monotonic()
            for draw in waiting.values():
                self.attempt(draw)
            with self.changed:
                self.drawing = False
                self.changed.notify_all()
            due = max(due, start - self.pause) + self.pause
            time.sleep(max(0.0, due - time.monotonic()))

    def attempt(self, draw: Draw) -> None:
        """Draw, and report what goes wrong; one broken drawing must not end all others."""
        try:
            draw()
        except BaseException as error:  # noqa: BLE001  it is shown in the panel
            self.on_error(error)
