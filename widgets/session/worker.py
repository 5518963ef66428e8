"""The newest-wins background runner: one thread, one slot, and nothing superseded is ever drawn.

A job is a generator; each value that it yields is a checkpoint, handed to `draw` while the lock is held and
only if no newer job has been submitted. A new job replaces a waiting one and makes the running one stale; a
job asks `stale()` where it can stop early.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from widgets.session.leaving import at_exit, stop_to_leave
from workbench.errors import Cancelled
from workbench.util.garbage import let_go

T = TypeVar("T")
Stale = Callable[[], bool]
Make = Callable[[Stale], Iterator[T]]


@dataclass
class WorkerJob(Generic[T]):
    """One submitted piece of work. `done` is set when it has ended, however it ended."""

    make: Make[T]
    draw: Callable[[T], None]
    generation: int
    quiet: bool = False  # whoever waits for it gets the exception; nobody else is told
    done: threading.Event = field(default_factory=threading.Event)
    finished: bool = False
    error: BaseException | None = None


class Worker(Generic[T]):
    """Runs the newest job on a thread of its own, which starts with the first job."""

    def __init__(
        self, on_error: Callable[[BaseException], None], on_idle: Callable[[], None] = lambda: None
    ) -> None:
        """Start nothing yet.

        Args:
            on_error: called with what the current job or its `draw` raised; never for a superseded job.
            on_idle: called when the current job has ended and none is waiting.

        """
        self.on_error, self.on_idle = on_error, on_idle
        self.changed = threading.Condition(threading.RLock())
        self.generation = 0
        self.waiting: WorkerJob[T] | None = None
        self.running: WorkerJob[T] | None = None
        self.thread: threading.Thread | None = None
        self.closed = False

    @property
    def busy(self) -> bool:
        """Return whether a job that still matters is waiting or running."""
        with self.changed:
            return self.waiting is not None or (
                self.running is not None and self.running.generation == self.generation
            )

    def submit(self, make: Make[T], draw: Callable[[T], None], *, quiet: bool = False) -> WorkerJob[T]:
        """Make this the newest job and return at once.

        Args:
            make: `make(stale)` returns the generator; `stale()` says that a newer job waits, or that this one
                was cancelled.
            draw: called with each yielded value, under the lock, while the job is the newest.
            quiet: leave `on_error` out; the caller looks at the job's `error`.

        Raises:
            RuntimeError: the worker is closed.
        """
        with self.changed:
            if self.closed:
                raise RuntimeError("this panel is closed: make a new one")
            self.cancel()
            self.waiting = job = WorkerJob(make, draw, self.generation, quiet)
            if self.thread is None:
                self.thread = threading.Thread(target=self.live, name="workbench-worker", daemon=True)
                self.thread.start()
            self.changed.notify_all()
            return job

    def cancel(self) -> None:
        """Make what runs and what waits stale; returns at once."""
        with self.changed:
            self.generation += 1
            if self.waiting is not None:
                self.waiting.done.set()
            self.waiting = None

    def run(self, make: Make[T], draw: Callable[[T], None]) -> None:
        """Submit, wait until the job has ended, and raise what it raised: for notebooks without a browser.

        Raises:
            Cancelled: a newer job, `cancel()` or `close()` came before the end.

        """
        job = self.submit(make, draw, quiet=True)
        job.done.wait()
        if job.error is not None:
            raise job.error
        if not job.finished:
            raise Cancelled("a newer job replaced this one before it had ended")

    def close(self, timeout: float = 10.0) -> None:
        """Cancel, end the thread, and refuse further jobs."""
        with self.changed:
            self.closed = True
            self.cancel()
            self.changed.notify_all()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout)

    def live(self) -> None:
        """Run jobs until closed; Python is not left in the middle of one (the thread's body)."""
        ended = at_exit(self.leave)
        try:
            self.loop()
        finally:
            ended()

    def leave(self) -> None:
        """Stop before Python is left."""
        stop_to_leave(self)

    def loop(self) -> None:
        """Run jobs until closed."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting is not None)
                if self.closed:
                    return
                job, self.waiting = self.waiting, None
                self.running = job
            assert job is not None  # noqa: S101  for the type checker
            self.work(job)
            with self.changed:
                self.running = None
                if self.waiting is None and job.generation == self.generation:
                    self.on_idle()
            job.done.set()
            del job  # what it was made of is not kept while nothing is to be done

    def work(self, job: WorkerJob[T]) -> None:
        """Run one job to its end, to its first stale checkpoint, or to its exception."""
        try:
            steps = job.make(lambda: job.generation != self.generation)
            for value in steps:
                with self.changed:
                    if job.generation != self.generation:
                        return
                    job.draw(value)
            job.finished = job.generation == self.generation
        except BaseException as error:  # noqa: BLE001  it belongs to whoever waits, or into the panel
            # Of a compressed model, where its measurement was cancelled
            let_go(error, telling=not isinstance(error, Cancelled))
            job.error = error
            if not isinstance(error, Cancelled):
                self.tell(job, error)

    def tell(self, job: WorkerJob[T], error: BaseException) -> None:
        """Report the exception of a job that still matters."""
        with self.changed:
            if not job.quiet and job.generation == self.generation:
                self.on_error(error)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        """Close."""
        self.close()
