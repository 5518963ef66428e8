"""What the strip under the plot says about a point besides its numbers."""

import dataclasses

import pytest
from tiny_tasks import tiny_task

import workbench as wb
from widgets.panes.verdict_strip import notes_of
from workbench.bench import Bench
from workbench.metrics.estimate import Estimate
from workbench.recipe import Recipe


@pytest.fixture(scope="module")
def point(tmp_path_factory):
    bench = Bench(
        tiny_task("vit"), device="cpu", ledger=tmp_path_factory.mktemp("ledger") / "x.journal", progress=False
    )
    return bench.measure(Recipe(wb.Quantize(weight_bits=4)))


def with_speed(point, low: float, high: float, kernels: tuple[str, ...] = ()):
    latency = dataclasses.replace(point.latency, speedup=Estimate((low + high) / 2, low, high))
    return dataclasses.replace(point, latency=latency, kernels=kernels)


def test_a_slower_point_says_so_and_what_ran_it(point):
    notes = " ".join(notes_of(with_speed(point, 0.2, 0.4, ("36 layers by torch int8",)), None))
    assert "slower than the dense model here: what 36 layers by torch int8 save is less" in notes
    assert "no kernel makes up" in " ".join(notes_of(with_speed(point, 0.5, 0.9), None))


def test_a_point_that_may_be_as_fast_does_not(point):
    assert "slower" not in " ".join(notes_of(with_speed(point, 0.8, 1.1), None))
    assert "slower" not in " ".join(
        notes_of(dataclasses.replace(with_speed(point, 0.2, 0.4), recipe=Recipe()), None)
    )
