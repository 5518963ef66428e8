"""Fast paths: each is on here, or says why not; what is switched off reaches the point that is measured."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_tasks
import torch
from click.testing import CliRunner
from interpreted import outside, passed

import workbench as wb
from workbench.calibration.disk_cache import ON_DISK
from workbench.cli import workbench
from workbench.compress import compress
from workbench.fast_paths import FAST_PATHS, fast_paths
from workbench.kernels import column_solver, weight_trials
from workbench.kernels.column_solver import COLUMNS
from workbench.kernels.losses import LOSSES
from workbench.kernels.weight_trials import WEIGHT_PASSES
from workbench.measure.evaluation.chunked_head import CHUNKED_HEAD
from workbench.measure.evaluation.cuda_graphs import GRAPHS
from workbench.measure.evaluation.fused_blocks import FUSED
from workbench.modules.sharing import SHARED_COPIES
from workbench.util.device import NEEDS_GPU
from workbench.util.fast_path import FastPath, Refusals, attempted, untried

CPU = torch.device("cpu")


def test_an_error_is_a_reason_in_one_line():
    def broken():
        raise ValueError("no\n  such kernel")

    assert attempted(broken) == "ValueError: no such kernel"
    assert attempted(lambda: "") == ""
    path = FastPath("path", "work", lambda device: "", lambda device: broken())
    assert path.check(CPU) == "ValueError: no such kernel"
    assert FastPath("path", "work", lambda device: "", untried).check(CPU) == ""


def test_refusals_keep_the_first_reason_of_each_path():
    path, second = (FastPath(name, "work", untried) for name in ("one", "other"))
    refusals = Refusals()
    for where, reason in ((path, ""), (second, "b"), (path, "a"), (path, "c")):
        refusals.note(where, reason)
    assert refusals.words() == (
        "slower than it could be: other is off (b)",
        "slower than it could be: one is off (a)",
    )


@outside
def test_interpreted_kernels_that_fail_are_told():
    assert passed("tests/test_fast_paths.py") == 1


def test_kernels_that_fail_are_told_in_the_warnings_of_what_they_would_have_made(place, monkeypatch):
    for module in (weight_trials, column_solver):
        module.refused.cache_clear()
        monkeypatch.setattr(module, "trial", lambda *_: 1 / 0)
    task = tiny_tasks.tiny_task("llama", str(place))
    pruned = compress(task, wb.Recipe(wb.Prune(sparsity=0.5)))
    rounded = compress(task, wb.Recipe(wb.Quantize(weight_bits=4, rounding="gptq")))
    said = "slower than it could be: {} is off (ZeroDivisionError: division by zero)"
    passes, columns = said.format(weight_trials.WEIGHT_PASSES.name), said.format(column_solver.COLUMNS.name)
    assert passes in pruned.warnings
    assert columns not in pruned.warnings
    assert {passes, columns} <= set(rounded.warnings)
    for module in (weight_trials, column_solver):
        module.refused.cache_clear()


# --- the list


GPU_ALONE = {WEIGHT_PASSES, COLUMNS, LOSSES, GRAPHS, FUSED}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("path", FAST_PATHS, ids=lambda path: path.name)
def test_the_pinned_versions_refuse_no_fast_path(path):
    assert path.check(CPU) == (NEEDS_GPU if path in GPU_ALONE else "")


@pytest.mark.gpu
@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("path", FAST_PATHS, ids=lambda path: path.name)
def test_on_a_gpu_every_fast_path_is_on(path):
    assert path.check(torch.device("cuda", 0)) == ""


def test_names_are_told_apart():
    assert len({path.name for path in FAST_PATHS}) == len(FAST_PATHS)


def test_a_library_that_lacks_a_name_switches_paths_off_and_says_so(monkeypatch):
    from transformers import masking_utils

    monkeypatch.delattr(masking_utils, "is_tracing")
    reasons = {state.name: state.off for state in fast_paths("cpu")}
    assert reasons[GRAPHS.name].startswith("transformers ")
    assert reasons[GRAPHS.name].endswith("has no is_tracing, needed for capturing CUDA graphs")


def test_the_disk_says_why_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", "off")
    assert ON_DISK.check(CPU) == "WORKBENCH_CACHE is off"


def test_the_command_lists_them():
    done = CliRunner().invoke(workbench, ["runtimes", "--quick", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    for path in FAST_PATHS:
        assert path.name in done.output
    assert f"off: {NEEDS_GPU}" in done.output


# --- what a model refuses


def test_what_a_model_does_not_allow_is_in_the_warnings_of_its_points(tmp_path):
    class Capped(type(tiny_tasks.llama())):
        def forward(self, *args, **named):
            outputs = super().forward(*args, **named)
            return dataclasses.replace(outputs, logits=torch.tanh(outputs.logits / 30) * 30)

    torch.manual_seed(0)
    task = tiny_tasks.tiny_task("llama", model=Capped(tiny_tasks.llama().config))
    bench = wb.Bench(task, ledger=tmp_path / "points.journal", progress=False)
    point = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))
    reason = "the model's logits are not what its output head makes of its inputs"
    assert point.warnings == (f"slower than it could be: {CHUNKED_HEAD.name} is off ({reason})",)
    plain = wb.Bench(tiny_tasks.tiny_task("llama"), ledger=tmp_path / "plain.journal", progress=False)
    assert plain.measure(wb.Recipe(wb.Prune(sparsity=0.5))).warnings == ()


def test_a_model_that_cannot_share_its_tensors_is_told():
    task = tiny_tasks.tiny_task("vit")
    task.model.beside = [torch.nn.Linear(1, 1)]
    compressed = compress(task, wb.Recipe(wb.Prune(sparsity=0.5)))
    assert any(SHARED_COPIES.name in warning for warning in compressed.warnings)
