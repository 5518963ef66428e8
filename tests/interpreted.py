"""GPU kernels without a GPU: a file of tests again, in a process in which Triton interprets kernels on CPU
tensors."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # decided when Triton is imported: a process of its own


def outside(test):
    """Mark what starts the other process: it needs Triton, and is not started there."""
    test = pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")(test)
    return pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="Triton, whose interpreter this needs, is not installed",
    )(test)


def passed(file: str) -> int:
    """Return how many tests of a file pass with interpreted kernels, those with a `place` that is.

    All others must be skipped.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:benchmark",  # it warns of xdist, with which the outer process may run
        "-k",
        "interpreted",
        file,
    ]
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])
