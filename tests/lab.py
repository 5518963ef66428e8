"""A JupyterLab of its own for browser tests, and the few gestures that they need."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.cli.serve import common_options, lab_command, write_settings
from workbench.cli.serve_app import app_address, app_command, app_environment

TOKEN = "workbench-test"  # noqa: S105  of a server that lives for one test


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(
    notebook: Path,
    folder: Path,
    environment: dict[str, str] | None = None,
    changes: dict[str, str] | None = None,
) -> Iterator[str]:
    """Start `workbench lab` on a copy of a notebook in `folder`, its text changed.

    Yield the address of the notebook.
    """
    copy, settings, port = changed_copy(notebook, folder, changes or {}), folder / "settings", free_port()
    settings.mkdir(exist_ok=True)
    write_settings(settings)
    with running(lab_command(copy, settings, browser=False, port=port), port, folder, environment or {}):
        yield f"http://127.0.0.1:{port}/doc/tree/{copy.name}?reset&token={TOKEN}"


@contextlib.contextmanager
def app(
    notebook: Path,
    folder: Path,
    environment: dict[str, str] | None = None,
    changes: dict[str, str] | None = None,
) -> Iterator[str]:
    """Start `workbench app` on a copy of a notebook in `folder`.

    Yield the address of the page, without the token.
    """
    copy, port = changed_copy(notebook, folder, changes or {}), free_port()
    with running(
        app_command(copy, browser=False, port=port),
        port,
        folder,
        {"JUPYTER_PATH": app_environment()["JUPYTER_PATH"], **(environment or {})},
    ):
        yield f"http://127.0.0.1:{port}{app_address(copy)}"


@contextlib.contextmanager
def notebook7(
    notebook: Path,
    folder: Path,
    environment: dict[str, str] | None = None,
    changes: dict[str, str] | None = None,
) -> Iterator[str]:
    """Start Notebook 7 as it comes, without our settings, on a copy of a notebook in `folder`.

    Yield its address.
    """
    copy, port = changed_copy(notebook, folder, changes or {}), free_port()
    command = [
        sys.executable,
        "-m",
        "notebook",
        "--ip=127.0.0.1",
        f"--ServerApp.root_dir={folder}",
        "--no-browser",
        *common_options(port),
    ]
    with running(command, port, folder, environment or {}):
        yield f"http://127.0.0.1:{port}/notebooks/{copy.name}?token={TOKEN}"


def changed_copy(notebook: Path, folder: Path, changes: dict[str, str]) -> Path:
    text = notebook.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    copy = folder / notebook.name
    copy.write_text(text)
    return copy


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a server with settings of its own while the block runs; its log is lab.log."""
    own = {
        name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    }
    runtime = tempfile.mkdtemp(prefix="wb-", dir="/tmp")  # sockets have short paths
    own["JUPYTER_RUNTIME_DIR"] = runtime
    with (folder / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--IdentityProvider.token={TOKEN}", "--ServerApp.log_level=WARN"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own, **environment},
        )
        try:
            wait_for(
                lambda: answers(f"http://127.0.0.1:{port}/api?token={TOKEN}"),
                60,
                (folder / "lab.log").read_text,
            )
            yield
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()
            shutil.rmtree(runtime, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310  our own server
            return reply.status == 200
    except OSError:
        return False


def wait_for(condition: Any, seconds: float, words: Any = lambda: "") -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s: {words()}")


@dataclass
class Lab:
    """A page with the notebook open."""

    page: Any
    state_folder: Path = Path()

    def open(self, url: str) -> None:
        """Open the notebook and wait until its kernel is idle."""
        self.page.goto(url)
        self.page.wait_for_selector(".jp-NotebookPanel:visible .jp-Cell", timeout=60_000)
        self.idle()

    def open_in_notebook7(self, url: str) -> None:
        """Open the notebook in Notebook 7 and wait until its kernel is idle."""
        self.page.goto(url)
        self.page.wait_for_selector(".jp-NotebookPanel:visible .jp-Cell", timeout=60_000)
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=60_000)

    def idle(self) -> None:
        self.page.wait_for_selector(r"#jp-main-statusbar >> text=/\| Idle/", timeout=60_000)

    def menu(self, name: str, command: str) -> None:
        """Use a menu entry, by its command."""
        self.page.click(f".lm-MenuBar-itemLabel:text-is('{name}')")
        self.page.click(f".lm-Menu-item[data-command='{command}']")

    def run_all(self) -> None:
        """Run every cell.

        Lab drops the request while a kernel starts, so ask again until cells are marked as running.
        """
        for _ in range(5):
            said = self.page.locator(".jp-Dialog").all_inner_texts()
            assert not said, f"a dialog is in the way: {said}"
            self.page.locator(".jp-NotebookPanel:visible .jp-Cell").first.click(position={"x": 60, "y": 8})
            self.menu("Run", "runmenu:run-all")
            with contextlib.suppress(AssertionError):
                wait_for(
                    lambda: any(
                        re.search(r"\[(\*|\d+)\]", text)
                        for text in self.page.locator(".jp-InputPrompt").all_inner_texts()
                    ),
                    3,
                )
                return
        raise AssertionError("Run All never started")

    def restart(self) -> None:
        """Restart the kernel and clear all outputs."""
        self.menu("Kernel", "kernelmenu:restart-and-clear")
        self.page.click(".jp-Dialog button.jp-mod-accept, .jp-Dialog button.jp-mod-warn")
        time.sleep(0.5)
        self.idle()

    def panel(self) -> Any:
        """Wait for the panel and scroll it into view."""
        panel = self.page.locator(".wb-panel")
        panel.wait_for(timeout=60_000)
        self.page.wait_for_selector(".wb-panel .js-plotly-plot .main-svg", timeout=60_000)
        panel.scroll_into_view_if_needed()
        return panel

    def slider(self, name: str) -> Any:
        """Return one step's controls."""
        return self.page.locator(".wb-step").filter(
            has=self.page.locator(".wb-slider .widget-label", has_text=re.compile(f"^{name}$"))
        )

    def readout(self, name: str) -> float:
        return float(self.slider(name).locator(".widget-readout").inner_text())

    def traces(self) -> list[dict[str, Any]]:
        """Return x, y and error bars of every trace in the page."""
        return self.page.evaluate(TRACES)

    def picture(self) -> Any:
        """Return the plot's content: every trace, and title, kind and range of both axes."""
        return [self.traces(), self.page.evaluate(AXES)]

    def state(self) -> str:
        """Return the text of the badge."""
        return self.page.locator(".wb-badge").inner_text()

    def settled(self, seconds: float = 30) -> None:
        """Wait until the point is measured completely."""
        wait_for(lambda: self.state() == "measured", seconds, self.state)

    def settled_on(self, pattern: str, seconds: float = 30) -> None:
        """Wait until the recipe line matches and its point is measured completely."""
        line = self.page.locator(".wb-line code")
        wait_for(
            lambda: re.search(pattern, line.inner_text()) and self.state() == "measured",
            seconds,
            lambda: f"{line.inner_text()} {self.state()}",
        )

    def watch(self) -> None:
        """Start to write down everything that the plot shows, each time it changes."""
        self.page.evaluate(WATCH)

    def seen(self) -> list[dict[str, Any]]:
        """Return the contents of the plot that `watch` has written down, in order."""
        return self.page.evaluate("window.seen")

    def drag(self, name: str, fraction: float, steps: int = 8, *, release: bool = True) -> None:
        """Drag a slider's handle to a fraction of its length with the mouse."""
        slider = self.slider(name)
        slider.scroll_into_view_if_needed()
        handle, track = (
            slider.locator(".noUi-handle").bounding_box(),
            slider.locator(".noUi-base").bounding_box(),
        )
        self.page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
        self.page.mouse.down()
        self.page.mouse.move(
            track["x"] + fraction * track["width"], track["y"] + track["height"] / 2, steps=steps
        )
        if release:
            self.page.mouse.up()


TRACES = """() => document.querySelector('.wb-panel .js-plotly-plot').data.map(t => {
  const plain = v => v._inputArray ? Array.from(v._inputArray) : Array.from(v.length === undefined ? [] : v);
  const list = v => v === undefined || v === null ? [] : plain(v);
  return {name: t.name, x: list(t.x), y: list(t.y),
          up: list(t.error_y && t.error_y.array), down: list(t.error_y && t.error_y.arrayminus)};
})"""

AXES = """() => { const layout = document.querySelector('.wb-panel .js-plotly-plot')._fullLayout;
  return [layout.xaxis, layout.yaxis].map(
    axis => [axis.title.text, axis.type, axis.range.map(end => Number(end.toFixed(6)))]); }"""


WATCH = """() => {
  const plot = document.querySelector('.wb-panel .js-plotly-plot');
  const first = v => v === undefined || v === null || v.length === 0 ? null : v[0];
  window.seen = [];
  const note = () => {
    const [p, m] = [plot.data[5], plot.data[6]];
    window.seen.push({t: performance.now(), line: document.querySelector('.wb-line code').innerText,
                      predicted: first(p.x), measured: first(m.x),
                      bar: m.error_y ? first(m.error_y.array) : null,
                      low: m.error_y ? first(m.error_y.arrayminus) : null});
  };
  if (window.watching) plot.removeListener('plotly_afterplot', window.watching);
  window.watching = note;
  plot.on('plotly_afterplot', note);
  new MutationObserver(note).observe(
    document.querySelector('.wb-line'), {childList: true, subtree: true, characterData: true});
}"""
