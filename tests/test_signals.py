"""News of the session: any number of panes hear them, one that fails does not keep them from the others."""

from __future__ import annotations

import threading

import pytest
import tiny_tasks

import workbench as wb
from widgets.explorer import Explorer
from widgets.session.session import Session
from widgets.session.signals import Signal


def broken(*_news):
    raise ValueError("this pane is broken")


def test_everybody_is_told_in_order_and_one_that_raises_stops_nobody():
    heard, errors = [], []
    signal = Signal(errors.append)
    signal.subscribe(lambda news: heard.append(("first", news)))
    signal.subscribe(broken)
    signal.subscribe(lambda news: heard.append(("second", news)))
    signal.emit(1)
    assert heard == [("first", 1), ("second", 1)]
    assert [str(error) for error in errors] == ["this pane is broken"]


def test_unsubscribing_ends_that_subscription_alone_and_may_be_repeated():
    heard = []
    signal = Signal(pytest.fail)
    end, _ = (signal.subscribe(heard.append) for _ in range(2))  # the same function, twice
    signal.emit(1)
    end()
    end()
    signal.emit(2)
    assert heard == [1, 1, 2]


def test_who_unsubscribes_while_it_is_told_keeps_the_news_from_nobody():
    heard = []
    signal = Signal(pytest.fail)
    ends = []
    ends.append(signal.subscribe(lambda: (heard.append("once"), ends[0]())))
    signal.subscribe(lambda: heard.append("always"))
    signal.emit()
    signal.emit()
    assert heard == ["once", "always", "always"]


@pytest.fixture
def session(tmp_path):
    bench = wb.Bench(
        tiny_tasks.tiny_task("vit"), ledger=tmp_path / "points.journal", progress=False, device="cpu"
    )
    opened = Session()
    opened.bench, opened.predictor = bench, bench.predictor()
    yield opened
    opened.close()


def test_a_second_listener_does_not_disconnect_the_first(session):
    """States, points, follow-ups and idle time reach both, and a broken one between them is reported."""
    heard, errors, idle = [], [], threading.Semaphore(0)
    session.on_error.subscribe(errors.append)
    for name in ("one", "other"):
        session.on_state.subscribe(lambda name=name: heard.append((name, session.state.phase)))
        session.on_points.subscribe(lambda name=name: heard.append((name, "points")))
        session.after_measuring(
            lambda _bench, compressed: iter([len(compressed.report)]),
            lambda count, name=name: heard.append((name, count)),
        )
        session.on_idle.subscribe(idle.release)
        if name == "one":
            session.on_state.subscribe(broken)
            session.after_measuring(broken, pytest.fail)
    point = session.run(wb.Recipe(wb.Prune(sparsity=0.5)))
    assert idle.acquire(timeout=30)
    assert idle.acquire(timeout=30)
    for name in ("one", "other"):
        assert {"measured", "points", len(point.layers)} <= {news for who, news in heard if who == name}
    assert {str(error) for error in errors} == {"this pane is broken"}
    assert session.state.phase == "measured"


def test_a_follow_up_may_end(session):
    reports = []
    end = session.after_measuring(lambda *_: iter(["seen"]), reports.append)
    session.run(wb.Recipe(wb.Prune(sparsity=0.4)))
    end()
    session.run(wb.Recipe(wb.Prune(sparsity=0.3)))
    assert reports == ["seen"]


def test_without_a_listener_errors_go_to_the_log(session, capsys):
    session.on_state.subscribe(broken)
    session.run(wb.Recipe(wb.Prune(sparsity=0.4)))
    assert "ValueError: this pane is broken" in capsys.readouterr().err


def test_the_panel_shows_what_a_pane_of_somebody_else_raises_and_goes_on(tmp_path):
    panel = Explorer(
        "fashion-cnn", ledger=tmp_path / "points.journal", evaluation_items=64, offline=True, device="cpu"
    )
    heard = []
    try:
        panel.run(wb.Recipe())
        panel.session.on_state.subscribe(broken)
        panel.session.on_state.subscribe(lambda: heard.append(panel.session.state.phase))
        point = panel.run(wb.Recipe(wb.Prune(sparsity=0.5)))
        assert "ValueError: this pane is broken" in panel.errors.value
        assert heard[-1] == "measured"
        assert panel.plot.figure.data[6].x == (point.sizes.file_bytes / 1e6,)
    finally:
        panel.close()
