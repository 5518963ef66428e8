"""Fast paths: each is on here, or says why not; what is switched off reaches the point that is measured."""

from __future__ import annotations

import tiny_tasks
import torch
from interpreted import outside, passed

import workbench as wb
from workbench.compress import compress
from workbench.kernels import column_solver, weight_passes
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
    path, other = (FastPath(name, "work", untried) for name in ("one", "other"))
    found = Refusals()
    for where, reason in ((path, ""), (other, "b"), (path, "a"), (path, "c")):
        found.note(where, reason)
    assert found.words() == (
        "slower than it could be: other is off (b)",
        "slower than it could be: one is off (a)",
    )


@outside
def test_interpreted_kernels_that_fail_are_told():
    assert passed("tests/test_fast_paths.py") == 1


def test_kernels_that_fail_are_told_in_the_warnings_of_what_they_would_have_made(place, monkeypatch):
    for module in (weight_passes, column_solver):
        module.refused.cache_clear()
        monkeypatch.setattr(module, "trial", lambda *_: 1 / 0)
    task = tiny_tasks.tiny_task("llama", str(place))
    pruned = compress(task, wb.Recipe(wb.Prune(sparsity=0.5)))
    rounded = compress(task, wb.Recipe(wb.Quantize(weight_bits=4, rounding="gptq")))
    said = "slower than it could be: {} is off (ZeroDivisionError: division by zero)"
    passes, columns = said.format(weight_passes.WEIGHT_PASSES.name), said.format(column_solver.COLUMNS.name)
    assert passes in pruned.warnings
    assert columns not in pruned.warnings
    assert {passes, columns} <= set(rounded.warnings)
    for module in (weight_passes, column_solver):
        module.refused.cache_clear()
