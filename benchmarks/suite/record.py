"""A result in the making: a JSON file that is whole after every row, so that an interrupted run keeps what it
has measured."""

from __future__ import annotations

import datetime as dt
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from workbench.tasks.base import Task
from workbench.util.device import describe, pick
from workbench.util.environment import git_revision, versions

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Options:
    """How a part is run. `seconds` bounds a part: it ends with the rows that it has, and says so.

    `windows` of `context` tokens are evaluated on a shape; `items` bounds the evaluation items of a named
    model, `dtype` is what it is loaded in (None: the product's choice). `quality_only` ends a slider's move
    when all items are read.
    """

    device: str | None = None
    moves: int = 6
    seconds: float = 200.0
    context: int = 512
    windows: int = 64
    items: int | None = None
    sliders: tuple[str, ...] = ()
    peers: Path | None = None
    ledger_sizes: tuple[int, ...] = (10, 1000, 100_000)
    shapes: tuple[str, ...] = ("wide-128", "wide-256", "wide-512", "wide-1024")
    note: str = ""
    dtype: str | None = None
    quality_only: bool = False

    def task(self, target: str) -> Task:
        """Return a shape of `benchmarks.shapes` with random weights, or a model by name as the product loads
        it."""
        from benchmarks.shapes import SHAPES, random_task
        from workbench.zoo import load_task

        place = pick(self.device)
        if target in SHAPES:
            return random_task(target, place, self.context, self.windows)
        return load_task(
            target, device=place, offline=True, evaluation_items=self.items, dtype=self.dtype, progress=False
        )


@dataclass
class Record:
    """One part's figures on one target. `add` prints a row and writes the file."""

    part: str
    target: str
    what: str
    device: str | None = None
    folder: Path | None = None
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    begun: float = field(default_factory=time.monotonic)
    load_at_start: float = field(default_factory=lambda: os.getloadavg()[0])

    @property
    def path(self) -> Path | None:
        """Return where it is written."""
        return (
            None
            if self.folder is None
            else self.folder / f"{self.part}-{self.target}-{pick(self.device).type}.json"
        )

    @property
    def spent(self) -> float:
        """Return the seconds since the part began."""
        return time.monotonic() - self.begun

    def add(self, **row: Any) -> None:
        """Take a row, print it, write everything."""
        self.rows.append(row)
        print(f"{self.part} {self.target} {self.spent:.0f} s:", row, flush=True)
        self.write()

    def late(self, options: Options, what: str) -> bool:
        """Return whether the part's time is over; then the result says before what."""
        if self.spent < options.seconds:
            return False
        self.stop(f"{options.seconds:g} s were over before {what}")
        return True

    def stop(self, why: str) -> None:
        """Say that rows are missing, and why."""
        self.stopped = why
        print(f"{self.part} {self.target} stopped: {why}", flush=True)
        self.write()

    def as_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        place = pick(self.device)
        load = {
            "average_at_start": round(self.load_at_start, 2),
            "average_at_end": round(os.getloadavg()[0], 2),
            "note": self.note,
        }
        return {
            "part": self.part,
            "target": self.target,
            "what": self.what,
            "command": command(),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "device": describe(place),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "revision": git_revision(),
            "load": load,
            "seconds": round(self.spent, 1),
            **self.settings,
            "stopped": self.stopped,
            "rows": self.rows,
        }

    def write(self) -> None:
        """Write the file, if there is one to be written."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")


def command() -> str:
    """Return the command line as a user would type it."""
    name = Path(sys.argv[0]).name
    return shlex.join(
        ["python", "-m", "benchmarks", *sys.argv[1:]] if name == "__main__.py" else [name, *sys.argv[1:]]
    )


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
