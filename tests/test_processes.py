"""Servers end with their kernels, panels end with their cell, and Python is left with exit code 0."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ipywidgets.widgets import widget as widget_module
from lab import TOKEN, answers, free_port, wait_for

from widgets import Explorer
from widgets.session import earlier_panels
from widgets.session.worker import Worker
from workbench.cli.serve import lab_command
from workbench.cli.serve_app import app_command

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


# --- servers


def post(url: str) -> dict:
    with urllib.request.urlopen(urllib.request.Request(url, method="POST")) as reply:  # noqa: S310  our own
        return json.loads(reply.read())


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("command", ["lab", "app"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name)
def test_a_signal_ends_the_server_and_its_kernels_and_removes_its_folder(tmp_path, command, number):
    port, runtime = free_port(), tempfile.mkdtemp(prefix="wb-", dir="/tmp")
    folders = {
        name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "TMPDIR")
    }
    (tmp_path / "tmpdir").mkdir()
    served = subprocess.Popen(
        [sys.executable, "-m", "workbench", command, "--no-browser", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # What a shell starts in the background would ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  no lock is held
        env={**os.environ, **folders, "JUPYTER_RUNTIME_DIR": runtime, "JUPYTER_TOKEN": TOKEN},
    )
    try:
        address = f"http://127.0.0.1:{port}/api"
        wait_for(lambda: answers(f"{address}?token={TOKEN}"), 60)
        post(f"{address}/kernels?token={TOKEN}")
        family = psutil.Process(served.pid).children(recursive=True)
        assert len(family) >= 2  # the server and its kernel
        left = list((tmp_path / "tmpdir").glob("workbench-lab-*"))
        assert len(left) == (1 if command == "lab" else 0)
        served.send_signal(number)
        assert served.wait(30) == 0
        wait_for(lambda: all(map(is_gone, family)), 5, lambda: family)
        assert list((tmp_path / "tmpdir").glob("workbench-lab-*")) == []
        assert not answers(f"{address}?token={TOKEN}")
    finally:
        for process in (
            [*psutil.Process(served.pid).children(recursive=True)] if served.poll() is None else []
        ):
            process.kill()
        served.kill()
        served.wait()


def test_kernels_that_nobody_is_connected_to_are_culled():
    for command in (lab_command(Path("/a/b.ipynb"), Path("s")), app_command(Path("/a/b.ipynb"))):
        options = dict(word.lstrip("-").partition("=")[::2] for word in command)
        assert 60 <= int(options["MappingKernelManager.cull_idle_timeout"]) <= 24 * 3600
        assert 0 < int(options["MappingKernelManager.cull_interval"]) <= 60
        assert "MappingKernelManager.cull_connected" not in options  # an open page keeps its kernel


# --- leaving Python

BUSY = """
import threading, torch
from widgets.session.worker import Worker

def job(stale):
    big = torch.randn(700, 700)
    while not stale():
        for _ in range(20):
            big = (big @ big).tanh()
        started.set()
        yield None

workers = []
for _ in range(2):
    started = threading.Event()
    worker = Worker(print)
    worker.submit(job, lambda _: None)
    started.wait()
    workers.append(worker)
{end}
"""
ENDS = {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1, "del workers, worker": 0, "import sys; sys.exit()": 0}


@pytest.mark.parametrize(("end", "expected"), ENDS.items(), ids=map(str, ENDS))
def test_python_is_left_with_its_own_exit_code_while_workers_compute(end, expected):
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", BUSY.format(end=end)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert ended.returncode == expected, ended.stderr
        assert "terminate" not in ended.stderr


PANEL = """
import time
from widgets import Explorer
panel = Explorer("fashion-cnn", device="cpu", ledger={where!r}, evaluation_items=64, offline=True)
{wait}
"""
MOMENTS = {
    "while it loads": "",
    "a little later": "time.sleep(0.7)",
    "while it measures": "while panel.session.bench is None: time.sleep(0.05)",
    "a moment into that": "while panel.session.bench is None: time.sleep(0.05)\ntime.sleep(0.4)",
}


@pytest.mark.slow
@pytest.mark.parametrize("wait", MOMENTS.values(), ids=MOMENTS)
def test_a_script_that_ends_with_a_panel_open_exits_with_0(tmp_path, wait):
    code = PANEL.format(where=str(tmp_path / "l.journal"), wait=wait)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_worker_that_has_ended_is_not_kept_for_the_end_of_python(monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr("atexit.unregister", registered.remove)
    worker = Worker(print)
    worker.run(lambda _: iter([1]), lambda _: None)
    assert len(registered) == 1
    worker.close()
    assert registered == []
    reference = weakref.ref(worker)
    del worker
    gc.collect()
    assert reference() is None


# --- running a cell again


def test_making_a_panel_again_closes_the_one_before_and_frees_its_model(tmp_path):
    begin, before = threading.active_count(), len(widget_module._instances)
    benches = []
    for _ in range(3):
        panel = Explorer(
            "fashion-cnn", device="cpu", ledger=tmp_path / "l.journal", evaluation_items=16, offline=True
        )
        wait_for(lambda opened=panel: opened.session.bench is not None, 60)
        benches.append(weakref.ref(panel.session.bench))
        widgets_of_one = len(widget_module._instances) - before
        gc.collect()
        assert [reference() is None for reference in benches] == [*[True] * (len(benches) - 1), False]
        assert threading.active_count() <= begin + 4
        assert widgets_of_one < 1000
    model = weakref.ref(panel.session.bench.task.model)
    panel.close()
    gc.collect()
    assert benches[-1]() is None
    assert model() is None
    wait_for(lambda: threading.active_count() <= begin, 20)
    assert len(widget_module._instances) == before


class Shell:
    """As much of IPython's shell as is asked."""

    def __init__(self) -> None:
        self.meta, self.execution_count, self.user_global_ns = {}, 0, {}
        self.cell, self.run = "", ""

    def get_parent(self) -> dict:
        return {"header": {"msg_id": self.run}, "metadata": {"cellId": self.cell} if self.cell else {}}


class Panel(SimpleNamespace):
    """Has weak references, as panels do."""

    def close(self) -> None:
        self.closed = True


def test_a_cell_that_runs_again_closes_what_it_made_before_and_no_other(monkeypatch):
    shell = Shell()
    monkeypatch.setattr(earlier_panels, "shell_of", lambda: shell)

    def run(cell: str, number: str, count: int) -> list[Panel]:
        shell.cell, shell.run = cell, number
        panels = [Panel(made_by=None, closed=False) for _ in range(count)]
        for panel in panels:
            earlier_panels.close_earlier(panel, None)
        return panels

    first, beside = run("a", "1", 2), run("b", "2", 1)
    assert not any(panel.closed for panel in [*first, *beside])  # two panels of one cell live side by side
    second = run("a", "3", 2)
    assert all(panel.closed for panel in first)
    assert not any(panel.closed for panel in [*second, *beside])
    run("a", "4", 1)
    assert all(panel.closed for panel in second)
    assert not beside[0].closed


def test_without_cell_ids_a_cell_is_known_by_its_text(monkeypatch):
    shell = Shell()
    monkeypatch.setattr(earlier_panels, "shell_of", lambda: shell)
    space = shell.user_global_ns
    space["make"] = lambda: (
        earlier_panels.close_earlier(panel := Panel(made_by=None, closed=False), None) or panel
    )
    panels = []
    for number, name in enumerate(["<cell 1>", "<cell 2>", "<cell 1>"]):
        shell.run = str(number)
        exec(compile("panel = make()", name, "exec"), space)  # noqa: S102
        panels.append(space["panel"])
    assert [panel.closed for panel in panels] == [True, False, False]


SCRIPT = """
from widgets.session import earlier_panels
import types, sys
class Panel(types.SimpleNamespace):
    def close(self): self.closed = True
def make(asked=1):
    panel = Panel(made_by=None, closed=False)
    earlier_panels.close_earlier(panel, asked)
    return panel
def caller():
    frame = sys._getframe(1)
    while frame.f_code.co_name in ("close_earlier", "make"):
        frame = frame.f_back
    return frame
earlier_panels.caller = caller
made = []
for _ in range(3):
    panel = make()
    made.append(panel)
print([one.closed for one in made])
made = [make() for _ in range(3)]
print([one.closed for one in made])
made = []
for asked in range(3):
    other = make(asked)
    made.append(other)
print([one.closed for one in made])
"""


def test_in_a_script_a_panel_made_anew_for_the_same_variable_closes_the_one_before():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        "[True, True, False]",
        "[False, False, False]",
        "[False, False, False]",
    ]
