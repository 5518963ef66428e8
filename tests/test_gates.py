"""Gates: a limit holds only if the whole interval lies within it."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_tasks import tiny_task

import workbench as wb
from workbench.bench import Bench
from workbench.errors import GateFailed, RecipeError
from workbench.metrics.quality import Estimate
from workbench.recipe import Recipe
from workbench.report.gates import Gates, check, enforce


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    where = tmp_path_factory.mktemp("gates") / "points.journal"
    return Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False).measure(
        Recipe(wb.Quantize(weight_bits=4))
    )


def with_drop(point, value: float, low: float, high: float):
    """Return the point with this loss of accuracy."""
    primary = dataclasses.replace(point.primary, change=Estimate(-value, -high, -low))
    return dataclasses.replace(point, quality=(primary, *point.quality[1:]))


def with_speed(point, value: float, low: float, high: float):
    return dataclasses.replace(
        point, latency=dataclasses.replace(point.latency, speedup=Estimate(value, low, high))
    )


@pytest.mark.parametrize(
    ("drop", "held", "undecided"),
    [
        ((0.002, -0.001, 0.005), True, False),
        ((0.005, 0.0, 0.01), True, False),  # exactly at the limit still holds
        ((0.005, -0.002, 0.012), False, True),
        ((0.02, 0.015, 0.03), False, False),
        ((-0.01, -0.02, 0.0), True, False),
        ((0.01, 0.01, 0.011), False, True),
        ((float("inf"), float("inf"), float("inf")), False, False),
    ],
)
def test_quality_may_not_drop_by_more_than_the_limit(base, drop, held, undecided):
    (verdict,) = check(Gates(max_quality_drop=0.01), with_drop(base, *drop))
    assert verdict.gate == "max_quality_drop"
    assert verdict.held is held
    assert ("not shown to hold, the interval reaches beyond the limit" in verdict.words) is undecided
    assert "limit 0.01, which is 1 point" in verdict.words


@pytest.mark.parametrize(
    ("speed", "held", "undecided"),
    [
        ((1.5, 1.2, 1.8), True, False),
        ((1.1, 1.0, 1.3), True, False),
        ((1.05, 0.9, 1.2), False, True),
        ((0.8, 0.7, 0.9), False, False),
    ],
)
def test_it_must_be_as_fast_as_asked(base, speed, held, undecided):
    (verdict,) = check(Gates(min_speedup=1.0), with_speed(base, *speed))
    assert (verdict.held, "not shown to hold" in verdict.words) == (held, undecided)


def test_a_speed_that_was_not_measured_does_not_hold(base):
    (verdict,) = check(
        Gates(min_speedup=0.1), dataclasses.replace(base, latency=None, missing={"latency": "no clock here"})
    )
    assert not verdict.held
    assert verdict.words == "latency was not measured: no clock here"


def test_file_bytes_are_exact(base):
    size = base.sizes.file_bytes
    assert [check(Gates(max_file_bytes=size + off), base)[0].held for off in (-1, 0, 1)] == [
        False,
        True,
        True,
    ]
    assert f"{size:,} bytes" in check(Gates(max_file_bytes=1), base)[0].words


def test_only_gates_that_are_set_are_checked(base):
    assert check(Gates(), base) == ()
    assert len(check(Gates(max_quality_drop=1, max_file_bytes=10**9, min_speedup=1e-6), base)) == 3
    enforce(check(Gates(max_quality_drop=1, max_file_bytes=10**9, min_speedup=1e-6), base))
    enforce(())


def test_every_gate_that_did_not_hold_is_named(base):
    verdicts = check(
        Gates(max_quality_drop=0, max_file_bytes=1, min_speedup=1e-6), with_drop(base, 0.5, 0.4, 0.6)
    )
    with pytest.raises(
        GateFailed,
        match=(
            r"^max_quality_drop: accuracy drop 50 points \(40 to 60\), limit 0, which is 0 points;"
            r" max_file_bytes: file .* limit 1$"
        ),
    ):
        enforce(verdicts)


@pytest.mark.parametrize(
    "values",
    [
        {"max_quality_drop": -0.1},
        {"max_file_bytes": 0},
        {"max_file_bytes": 1.5},
        {"min_speedup": 0},
        {"min_speedup": "fast"},
        {"max_drop": 1},
    ],
)
def test_limits_that_make_no_sense_are_refused(values):
    (name,) = values
    with pytest.raises(RecipeError, match=rf"Gates.*{name}"):
        Gates(**values)


def test_limits_may_come_as_text():
    assert Gates(max_quality_drop="0.01", max_file_bytes="1000", min_speedup="1") == Gates(
        max_quality_drop=0.01, max_file_bytes=1000, min_speedup=1.0
    )
