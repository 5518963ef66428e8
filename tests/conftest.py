"""What every test may use: tiny tasks, a device, a ledger of its own, and the reason for whatever is left
out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_tasks
import torch
from exact_interpreter import round_bfloat16, watch
from hypothesis import HealthCheck, settings
from interpreted import INTERPRETED

from workbench.ledger.ledger import Ledger
from workbench.tasks.base import Task

# The same examples everywhere, with no limit on time: how fast a machine is decides no test of a property.
settings.register_profile(
    "any machine", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

NO_GPU = "needs a CUDA GPU, and torch.cuda.is_available() is False here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what this machine cannot run; `-ra` prints how many and why."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory: pytest.TempPathFactory):
    """Keep the user's own ledgers and cache out of it: both lie in temporary directories, for child processes
    too."""
    home = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home))
        patch.setenv("WORKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TQDM_DISABLE", os.environ.get("TQDM_DISABLE", "1"))
        yield home


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest):
    if request.param == "cpu":
        yield "cpu"
        return
    with torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    ):  # comparisons with float64 need all of float32
        yield request.param


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Give the device on which Triton's kernels run: a GPU, or the CPU where they are interpreted and what
    they touch is watched."""
    if (request.param == "interpreted") is not INTERPRETED:
        pytest.skip("runs in a process in which Triton interprets its kernels, see tests/interpreted.py")
    if not INTERPRETED:
        return torch.device("cuda", 0)
    watch(monkeypatch)
    round_bfloat16(monkeypatch)
    return torch.device("cpu")


@pytest.fixture(params=tiny_tasks.SORTS)
def sort(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def task(sort: str, device: str) -> Task:
    return tiny_tasks.tiny_task(sort, device)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "points.journal")


@pytest.fixture(scope="session")
def fashion_cnn() -> Task:
    """The embedded CNN with all its 2,000 evaluation images; do not change it."""
    from workbench.zoo import load_task

    return load_task("fashion-cnn", offline=True, progress=False)
