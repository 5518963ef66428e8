"""A thread that writes files while nobody waits: jobs one after the other, and all of them before the process
ends.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable

CALM = 0.3  # seconds before each job: whoever computes now is hardly disturbed


class Writer:
    """Runs jobs in their order on a thread of its own, which starts with the first job and ends when there is
    none left.
    """

    def __init__(self) -> None:
        """Start nothing."""
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.told = self.registered = False
        self.hurry = threading.Event()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done soon."""
        self.jobs.put(job)
        with self.lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self.work, name="statistics to disk", daemon=True)
                self.thread.start()
            if not self.registered:
                self.registered = True
                atexit.register(self.flush)  # a daemon thread would be cut off

    def work(self) -> None:
        """Do jobs until none is left."""
        while True:
            self.hurry.wait(CALM)
            with self.lock:
                if self.jobs.empty():
                    self.thread = None
                    return
                job = self.jobs.get()
            try:
                job()
            except Exception as error:  # noqa: BLE001
                # safetensors raises its own kind for a full disk; nobody waits here who could be told at once
                self.error = error

    def flush(self) -> None:
        """Do what is waiting now, and return when it is done."""
        with self.lock:
            thread = self.thread
        if thread is not None:
            self.hurry.set()
            thread.join()
            self.hurry.clear()

    def take_error(self) -> Exception | None:
        """Return what last went wrong the first time it is asked for, then None: one warning is enough."""
        if self.error is None or self.told:
            return None
        self.told = True
        return self.error
