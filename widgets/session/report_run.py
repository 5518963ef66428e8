"""The report notebook in a process of its own: started, watched and stopped from the panel.

A process keeps the panel's own free, runs papermill with its kernel, and can be stopped at any moment. What
it measures goes to the same ledger, so that points that are there are not measured again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from workbench.compress.registry import METHODS
from workbench.errors import RecipeError, WorkbenchError
from workbench.recipe import Recipe
from workbench.tasks.registry import KINDS
from workbench.util.configuration import OneOf


@dataclass(frozen=True)
class ReportState:
    """Where a report stands: `done` of `total` cells; `page` once it is written, `message` if it failed."""

    state: Literal["running", "done", "stopped", "failed"]
    page: Path
    done: int = 0
    total: int = 0
    message: str = ""


def report_command(
    model: str, recipe: Recipe, settings: Mapping[str, Any], output: Path, name: str
) -> list[str]:
    """Return the command that writes the report of a recipe with the panel's own settings.

    Args:
        model: as given to `workbench.Bench`.
        recipe: passed whole, so that also what flat options cannot say arrives.
        settings: of the bench: data, device, ledger, evaluation_items, runtime, placement, offline; None is
            left out.
        output: the directory.
        name: of the notebook and the page.

    Raises:
        RecipeError: a step's method was defined in the notebook itself, where another process cannot find it.
    """
    plugins = plugins_of(recipe)
    loaded = [word for plugin in plugins for word in ("--plugin", plugin)]
    arguments = [sys.executable, "-m", "workbench", *loaded, "report", model, "--recipe", recipe.to_json()]
    for option in ("data", "device", "ledger", "evaluation_items", "runtime", "placement"):
        if settings.get(option) is not None:
            arguments += [f"--{option.replace('_', '-')}", str(settings[option])]
    offline = ["--offline"] if settings.get("offline") else []
    return [*arguments, *offline, "--output", str(output), "--name", name]


def plugins_of(recipe: Recipe) -> list[str]:
    """Return the modules outside the workbench that a recipe's methods come from, what their options name
    (criteria, number formats), and kinds of task.

    Raises:
        RecipeError: one of them was defined in the notebook itself.

    """
    used = dict[str, str]()  # what is used, by the module that defines it
    for step in recipe:
        used.setdefault(METHODS.step(step.kind()).__module__, type(step).__name__)
        for name, info in step.options().items():
            for note in info.metadata:
                value = getattr(step, name)
                if isinstance(note, OneOf) and value in note.registry:
                    used.setdefault(note.registry.modules[value], f"{note.registry.what} {value!r}")
    if "__main__" in used:
        raise RecipeError(
            f"{used['__main__']} is defined in this notebook, and a report runs in a process of its own:"
            " move it to a module that can be imported"
        )
    kinds = [type(kind).__module__ for kind in KINDS if type(kind).__module__ != "__main__"]
    return [module for module in dict.fromkeys([*used, *kinds]) if not module.startswith("workbench.")]


def free_name(folder: Path, stem: str) -> str:
    """Return `stem`, or `stem-2`, `stem-3`, ... if a report of that name is there."""
    number, name = 1, stem
    while (folder / f"{name}.html").exists() or (folder / f"{name}.ipynb").exists():
        number += 1
        name = f"{stem}-{number}"
    return name


class ReportRun:
    """One report at a time. `on_change` gets a `ReportState` from a thread whenever there is news."""

    def __init__(self, on_change: Callable[[ReportState], None], every_s: float = 0.5) -> None:
        """Start nothing yet."""
        self.on_change, self.every_s = on_change, every_s
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    @property
    def running(self) -> bool:
        """Return whether a report is being made."""
        return self.thread is not None and self.thread.is_alive()

    def start(self, command: list[str], page: Path) -> None:
        """Start a report and return at once.

        Raises:
            WorkbenchError: one is running, or the directory cannot be written.

        """
        with self.lock:
            if self.running:
                raise WorkbenchError("a report is being made already: stop it first, or wait")
            try:
                page.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=page.parent).close()
            except OSError as error:
                raise WorkbenchError(
                    f"cannot write a report to {str(page.parent)!r}: {error.strerror}; give another folder"
                ) from None
            self.stopping.clear()
            args = (command, page)
            self.thread = threading.Thread(target=self.watch, args=args, name="workbench-report", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """Ask the report to stop; what it has measured by then is in the ledger."""
        self.stopping.set()

    def close(self, timeout: float = 15.0) -> None:
        """Stop, and wait for the end."""
        self.stop()
        if self.thread is not None:
            self.thread.join(timeout)

    def watch(self, command: list[str], page: Path) -> None:
        """Run the command to its end (the thread's body)."""
        state = ReportState("running", page)
        self.on_change(state)
        with tempfile.TemporaryFile() as log:
            try:
                self.process = subprocess.Popen(  # noqa: S603
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self.on_change(replace(state, state="failed", message=f"cannot start the report: {error}"))
                return
            while self.process.poll() is None:
                if self.stopping.wait(self.every_s):
                    end(self.process)
                    break
                now = progress_of(page.with_suffix(".ipynb"))
                if now is not None and now != (state.done, state.total):
                    state = replace(state, done=now[0], total=now[1])
                    self.on_change(state)
            code = self.process.wait()
            log.seek(0)
            text = log.read().decode(errors="replace")
        if self.stopping.is_set():
            self.on_change(replace(state, state="stopped"))
        elif code == 0 and page.is_file():
            self.on_change(replace(state, state="done", done=state.total))
        else:
            self.on_change(replace(state, state="failed", message=reason(text, code)))


def end(process: subprocess.Popen[bytes], patience_s: float = 8.0) -> None:
    """Stop a process as Ctrl-C does, so that papermill ends its kernel; kill it if it does not listen."""
    if os.name == "posix":
        process.send_signal(signal.SIGINT)
    else:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    process.kill()


def progress_of(notebook: Path) -> tuple[int, int] | None:
    """Return (cells done, cells) of a notebook that papermill is executing, None while it cannot be read."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return None  # not there yet, or half written: the next look will tell
    statuses = [cell["metadata"].get("papermill", {}).get("status") for cell in cells]
    return statuses.count("completed"), len(cells)


def reason(text: str, code: int) -> str:
    """Return why a report failed: the command's own message, or the end of what it printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.lower().startswith("error: "):
            return line.removeprefix("error: ")
    return lines[-1] if lines else f"the report ended with exit code {code} and said nothing"
