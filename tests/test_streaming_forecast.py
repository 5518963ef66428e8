"""What a streamed model takes: time, told before and learned from, and the inputs that second moments
hold."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import tiny_tasks
import torch

import workbench as wb
from workbench.calibration import passes
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.modules.layer import find_layers
from workbench.modules.placement import model_bytes, place
from workbench.predict.offload_forecast import Forecast, Pace, forecast, speed_home
from workbench.util.progress import no_progress

RECIPES = {
    "magnitude": wb.Recipe(wb.Prune(sparsity=0.5)),
    "awq": wb.Recipe(wb.Quantize(weight_bits=4, rounding="awq")),
}


def test_the_forecast_counts_passes(tmp_path, monkeypatch):
    bench = wb.Bench(
        tiny_tasks.tiny_task("llama"),
        placement="streamed",
        ledger=tmp_path / "points.journal",
        progress=False,
    )
    size = model_bytes(bench.task.model)
    monkeypatch.setattr(
        "workbench.predict.offload_forecast.speed_to", lambda _: 1e3
    )  # so slow that arithmetic is nothing beside it
    seconds = size / 1e3
    plain = forecast(bench.setting, bench.pace, RECIPES["magnitude"], 16)
    assert plain.pass_seconds == pytest.approx(seconds, rel=0.01)
    assert plain.once_seconds == 0
    assert plain.compress_seconds == pytest.approx(6 * seconds)
    assert plain.first_seconds == pytest.approx(
        plain.compress_seconds + 2 * plain.pass_seconds
    )  # one batch of 16, dense and compressed
    assert plain.all_seconds == pytest.approx(plain.compress_seconds + 6 * plain.pass_seconds)
    monkeypatch.setattr("workbench.predict.offload_forecast.speed_home", lambda _bench, _size: 1e2)
    inputs = {
        (name.rpartition(".")[0], layer.parameter.shape[1])
        for name, layer in find_layers(bench.task.model)[0].items()
        if not layer.table
    }
    home = sum(4 * width**2 for _, width in inputs) / 1e2
    assert forecast(bench.setting, bench.pace, RECIPES["awq"], 16).once_seconds == pytest.approx(
        2 * (seconds + home), rel=0.01
    )  # 24 calibration items in batches of 16
    list(bench.looks(RECIPES["awq"], (16,), again=True, cancelled=None))
    after = forecast(bench.setting, bench.pace, RECIPES["awq"], 16)
    assert after.once_seconds == 0  # second moments are there
    assert after.all_seconds == pytest.approx(
        after.compress_seconds + 3 * after.pass_seconds
    )  # and so are the dense scores
    assert "0.02 MB a pass" in after.words()
    resident = wb.Bench(tiny_tasks.tiny_task("llama"), ledger=tmp_path / "resident.journal", progress=False)
    assert forecast(resident.setting, resident.pace, RECIPES["awq"], 16) is None


def test_the_next_forecast_learns_from_the_last_move(tmp_path, monkeypatch):
    bench = wb.Bench(
        tiny_tasks.tiny_task("llama"),
        placement="streamed",
        ledger=tmp_path / "points.journal",
        progress=False,
    )
    monkeypatch.setattr("workbench.predict.offload_forecast.speed_to", lambda _: 1e6)
    list(bench.stream(wb.Recipe()))
    assert not bench.pace.warm  # the dense model took no memory for compressed weights
    assert bench.pace.compress == 1.0
    list(bench.stream(RECIPES["magnitude"]))
    first = forecast(bench.setting, bench.pace, RECIPES["magnitude"], 16)
    assert first.known
    assert bench.pace.compress == 1.0  # the first move takes memory, which says nothing of the next
    assert "as the move before this one went" in first.words()
    bench.pace.learn(first, 3 * first.compress_seconds, 2 * (first.first_seconds - first.compress_seconds))
    then = forecast(bench.setting, bench.pace, RECIPES["magnitude"], 16)
    assert then.compress_seconds == pytest.approx(3 * first.compress_seconds)
    assert then.pass_seconds == pytest.approx(2 * first.pass_seconds)
    assert then.first_seconds == pytest.approx(
        then.compress_seconds + 2 * (first.first_seconds - first.compress_seconds)
    )
    bench.pace.learn(
        then, then.compress_seconds, then.first_seconds - then.compress_seconds
    )  # as forecast: nothing changes
    assert forecast(bench.setting, bench.pace, RECIPES["magnitude"], 16) == then
    pace = Pace(warm=True)
    pace.learn(Forecast(1, 1.0, 1.0, 5.0, 2.0, 9.0, 9.0), 40.0, 2.0)  # second moments were in it
    assert (pace.compress, pace.read) == (1.0, 1.0)


def test_the_way_home_is_timed(tmp_path):
    bench = wb.Bench(
        tiny_tasks.tiny_task("llama"),
        placement="streamed",
        ledger=tmp_path / "points.journal",
        progress=False,
    )
    assert 1e8 < speed_home(bench.setting, 2**22) < 1e12  # bytes a second, not a millisecond


def test_wanda_takes_no_second_moment_of_a_streamed_model_to_its_device_and_reads_them_once(monkeypatch):
    recipes = [wb.Recipe(wb.Prune(sparsity=sparsity, criterion="wanda")) for sparsity in (0.3, 0.6)]
    resident = [compress(tiny_tasks.tiny_task("llama"), recipe) for recipe in recipes]
    task = tiny_tasks.tiny_task("llama")
    task = dataclasses.replace(task, model=place(task.model, torch.device("cpu"), "streamed"))
    kept = Statistics(task)
    monkeypatch.setattr(
        kept, "second_moment", lambda name: pytest.fail(f"the second moment of {name} is fetched")
    )
    for index, (recipe, expected) in enumerate(zip(recipes, resident, strict=True)):
        compressed = compress(task, recipe, kept)
        for name, tensor in expected.model.state_dict().items():
            assert torch.equal(compressed.model.state_dict()[name], tensor)
        if not index:
            for matrix in kept.moments().matrices.values():
                matrix.fill_(float("nan"))  # nobody looks at them again


@pytest.mark.parametrize("last", [1, 3, 8])
def test_second_moments_of_a_streamed_model_hold_few_inputs(last, monkeypatch):
    monkeypatch.setattr(passes, "LAST_INPUTS", last)
    held: list[weakref.ref[torch.Tensor]] = []
    most: list[int] = []
    plain = passes.patches

    def watched(module, given):
        held.append(weakref.ref(given))
        most.append(sum(reference() is not None for reference in held))
        return plain(module, given)

    monkeypatch.setattr(passes, "patches", watched)
    task = tiny_tasks.tiny_task("llama")
    streamed = passes.second_moments(
        dataclasses.replace(
            task, model=place(tiny_tasks.tiny_task("llama").model, torch.device("cpu"), "streamed")
        ),
        no_progress,
    )
    assert max(most) <= last + 2  # what is held, and what the model itself is working with
    resident = passes.second_moments(task, no_progress)
    assert list(streamed.matrices) == list(resident.matrices)
    for name, matrix in resident.matrices.items():
        assert torch.equal(streamed.matrices[name], matrix)
    assert len({id(matrix) for matrix in streamed.matrices.values()}) == len(
        {id(matrix) for matrix in resident.matrices.values()}
    )
