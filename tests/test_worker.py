"""The background runner and the pacer, without a browser: newest wins, cancellation, exceptions, closing."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref

import pytest

from widgets.session.pacer import Pacer
from widgets.session.worker import Worker
from workbench.errors import Cancelled


@pytest.fixture
def failures():
    return []


@pytest.fixture
def worker(failures):
    with Worker(failures.append) as opened:
        yield opened


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def counting(name, drawn, *, gate=None, until=3):
    """Return a job that yields (name, 0), (name, 1), ...; `gate` holds it before every step."""

    def make(stale):
        for index in range(until):
            if gate is not None:
                assert gate.wait(5)
            if stale():
                raise Cancelled(f"{name} stopped at {index}")
            yield name, index

    return make, drawn.append


def test_a_job_is_drawn_checkpoint_by_checkpoint(worker):
    drawn = []
    worker.run(*counting("a", drawn))
    assert drawn == [("a", 0), ("a", 1), ("a", 2)]
    assert not worker.busy


def test_nothing_superseded_is_drawn_and_only_the_newest_waits(worker, failures):
    drawn, gate = [], threading.Event()
    worker.submit(*counting("old", drawn, gate=gate, until=100))
    wait_until(lambda: worker.running is not None)
    middle = [worker.submit(*counting(f"middle {i}", drawn)) for i in range(50)]
    newest = worker.submit(*counting("new", drawn))
    gate.set()
    assert newest.done.wait(5)
    assert newest.finished
    assert drawn == [("new", 0), ("new", 1), ("new", 2)]
    assert all(job.done.is_set() and not job.finished for job in middle)
    assert failures == []


def test_random_storm_shows_no_stale_point(worker):
    drawn, newest = [], [0]

    def job(generation):
        def make(_stale):  # a job that never asks: the worker itself must drop it
            for index in range(5):
                time.sleep(0.0005)
                yield generation, index

        return make

    def draw(value):
        assert value[0] == newest[0]  # under the lock: no submit can come between
        drawn.append(value)

    for generation in range(1, 200):
        with worker.changed:
            newest[0] = generation
            last = worker.submit(job(generation), draw)
        time.sleep(0.001 * (generation % 4))
    assert last.done.wait(5)
    assert last.error is None
    assert drawn[-5:] == [(199, index) for index in range(5)]


def test_cancel_stops_between_checkpoints_and_the_next_job_works(worker):
    drawn, gate = [], threading.Event()
    job = worker.submit(*counting("a", drawn, gate=gate, until=1000))
    wait_until(lambda: worker.running is not None)
    worker.cancel()
    assert not worker.busy
    gate.set()
    assert job.done.wait(5)
    assert isinstance(job.error, Cancelled)
    assert drawn == []
    worker.run(*counting("b", drawn, until=1))
    assert drawn == [("b", 0)]


def test_run_says_that_it_was_replaced(worker):
    gate, drawn = threading.Event(), []
    threading.Timer(0.05, lambda: (worker.cancel(), gate.set())).start()
    with pytest.raises(Cancelled):
        worker.run(*counting("a", drawn, gate=gate))


def test_a_replaced_job_that_never_started_says_so(worker):
    gate, drawn, seen = threading.Event(), [], []
    worker.submit(*counting("first", drawn, gate=gate))
    wait_until(lambda: worker.running is not None)

    def blocked():
        with pytest.raises(Cancelled, match="a newer job replaced"):
            worker.run(*counting("second", drawn))
        seen.append(True)

    thread = threading.Thread(target=blocked)
    thread.start()
    wait_until(lambda: worker.waiting is not None)
    worker.submit(*counting("third", drawn))
    thread.join(5)
    gate.set()
    assert seen == [True]


def test_exceptions_reach_the_callback_and_the_next_job_works(worker, failures):
    def broken(_stale):
        yield 1
        raise ValueError("broken on purpose")

    drawn = []
    job = worker.submit(broken, drawn.append)
    assert job.done.wait(5)
    assert drawn == [1]
    assert [str(error) for error in failures] == ["broken on purpose"]
    worker.run(*counting("b", drawn, until=1))
    assert drawn == [1, ("b", 0)]


def test_exceptions_of_draw_and_of_make_count_too(worker, failures):
    def refuse(_value):
        raise KeyError("draw")

    assert worker.submit(lambda _stale: iter([1]), refuse).done.wait(5)

    def make(_stale):
        raise KeyError("make")

    assert worker.submit(make, print).done.wait(5)
    assert [str(error) for error in failures] == ["'draw'", "'make'"]


def test_run_raises_and_tells_nobody_else(worker, failures):
    def broken(_stale):
        raise ZeroDivisionError("for the caller")
        yield

    with pytest.raises(ZeroDivisionError, match="for the caller"):
        worker.run(broken, print)
    assert failures == []


def test_the_exception_of_a_superseded_job_is_not_shown(worker, failures):
    gate = threading.Event()

    def broken(_stale):
        gate.wait(5)
        raise ValueError("nobody cares any more")
        yield

    drawn = []
    old = worker.submit(broken, print)
    wait_until(lambda: worker.running is not None)
    new = worker.submit(*counting("new", drawn, until=1))
    gate.set()
    assert new.done.wait(5)
    assert old.done.is_set()
    assert failures == []


@pytest.mark.parametrize("raised", [Cancelled, ValueError, MemoryError])
def test_what_a_failed_job_worked_with_is_freed_at_once_not_when_garbage_is_collected(worker, raised):
    class Model:
        pass

    models = []

    def fail(model):
        models.append(weakref.ref(model))
        try:
            {}["first"]
        except KeyError:
            raise raised("second")  # noqa: B904  its context is what is tested

    def make(_stale):
        model = Model()
        yield 1
        [fail(closure()) for closure in [lambda: model]]  # by a closure, as measurements are

    gc.disable()
    try:
        job = worker.submit(make, lambda _value: None, quiet=True)
        assert job.done.wait(5)
        assert isinstance(job.error, raised)
        assert models[0]() is None
        assert (
            raised is Cancelled or "in fail" in job.error.__notes__[0]
        )  # where it came from can still be told
    finally:
        gc.enable()


def test_idle_is_announced_once_per_settled_job():
    idle, drawn = [], []
    with Worker(print, on_idle=lambda: idle.append(1)) as worker:
        worker.run(*counting("a", drawn))
        wait_until(lambda: idle == [1])


def test_close_ends_the_thread_and_refuses_jobs():
    worker, drawn = Worker(print), []
    worker.close()  # before anything ran
    worker = Worker(print)
    worker.run(*counting("a", drawn))
    worker.close()
    assert worker.thread is not None
    assert not worker.thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(*counting("b", drawn))


def test_no_thread_before_the_first_job():
    before = threading.active_count()
    Worker(print)
    Pacer(print)
    assert threading.active_count() == before


def test_the_pacer_draws_the_first_at_once_then_the_newest_at_its_rate():
    drawn, times = [], []
    pacer = Pacer(print, rate_hz=20)

    def draw(index):
        drawn.append(index)
        times.append(time.monotonic())

    start = time.monotonic()
    for index in range(200):
        pacer.post("live", lambda index=index: draw(index))
        time.sleep(0.001)
    assert pacer.flush()
    assert drawn[-1] == 199
    assert times[0] - start < 0.05
    assert drawn == sorted(drawn)
    assert all(later - earlier > 0.045 for earlier, later in itertools.pairwise(times[1:]))
    assert len(times) <= 20 * (times[-1] - start) + 2
    pacer.close()


def test_the_pacer_keeps_slots_apart_and_survives_a_broken_drawing():
    drawn, failures = [], []
    pacer = Pacer(failures.append, rate_hz=100)

    def broken():
        raise ValueError("no drawing")

    pacer.post("bad", broken)
    pacer.post("good", lambda: drawn.append(1))
    assert pacer.flush()
    pacer.post("good", lambda: drawn.append(2))
    assert pacer.flush()
    assert drawn == [1, 2]
    assert [str(error) for error in failures] == ["no drawing"]
    pacer.close()
    pacer.post("good", lambda: drawn.append(3))
    assert drawn == [1, 2]
