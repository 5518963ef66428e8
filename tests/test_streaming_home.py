"""On a machine without a GPU: nothing is computed from what lies at home, which on a GPU would be another
device."""

from __future__ import annotations

import dataclasses
import traceback

import pytest
import tiny_tasks
import torch
from test_streaming import RECIPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.modules import offload

AWAY = torch.device("cpu", 0)  # another name of the CPU: to `streaming`, another device
VIEWS = {
    "detach",
    "alias",
    "view",
    "t",
    "transpose",
    "permute",
    "select",
    "slice",
    "expand",
    "unsqueeze",
    "as_strided",
    "unbind",
    "split",
    "empty_like",
    "is_pinned",
    "clone",
    "_to_copy",
}  # or copies


class NothingAtHome(TorchDispatchMode):
    """Notes every operation that computes from a tensor at home."""

    def __init__(self, home: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.home, self.seen = home, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        for tensor in given[:1] if name == "copy_" else given:
            if name not in VIEWS and tensor.numel() > 1 and tensor.untyped_storage().data_ptr() in self.home:
                where = [
                    f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
                    for frame in traceback.extract_stack()
                    if "/workbench/" in frame.filename
                ]
                self.seen.append(f"{name} in {' < '.join(where[:-4:-1])}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def home(monkeypatch):
    """Make everything that goes home or away a copy, and remember what lies at home by its memory."""
    at_home_by_pointer: dict[int, torch.Tensor] = {}
    at_host, taken_home = offload.at_host, offload.taken_home

    def remembered(tensor, *, pinned):
        held = at_host(tensor, pinned=pinned).clone()
        at_home_by_pointer[held.untyped_storage().data_ptr()] = held
        return held

    def belongs_away(tensor, *, pinned):
        held = taken_home(tensor, pinned=pinned)
        held.streams_to = AWAY  # not what the CPU calls itself
        return held

    monkeypatch.setattr(offload, "at_host", remembered)
    monkeypatch.setattr(offload, "taken_home", belongs_away)
    monkeypatch.setattr(offload, "at_device", lambda tensor, _: tensor.clone())
    return at_home_by_pointer


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_computed_from_what_lies_at_home(sort, name, home):
    task = tiny_tasks.tiny_task(sort)
    task = dataclasses.replace(task, model=offload.attach(task.model, AWAY))
    kept = Statistics(task)
    for _ in range(2):  # the second time takes what was kept
        with NothingAtHome(home) as watch:
            compressed = compress(task, RECIPES[name], kept, shared=True)
            Evaluator(task, task.evaluation).scores(compressed.model, [], 20)
        assert len(home) > 10
        assert not watch.seen, sorted(set(watch.seen))


def test_the_watch_sees_what_it_looks_for(home):
    task = tiny_tasks.tiny_task("llama")
    model = offload.attach(task.model, AWAY)
    with NothingAtHome(home) as watch:
        model.lm_head.weight.sum()
    assert [line.split()[0] for line in watch.seen] == ["sum"]
