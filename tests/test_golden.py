"""Golden results: what recipes of every family gave when tests/golden was recorded, on six models.

On the machine that recorded them every tensor and number is the same, bit for bit; on others numbers are
close. With `GOLDEN_BITS=1` another machine fails instead of being skipped. `python tests/record_golden.py`
records them again.
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from typing import Any

import pytest
import torch
from golden_points import FOLDER, Recorder, machine
from golden_recipes import MODELS, recipes_of

# How far numbers may lie apart on two machines: relative, and absolute below 1. Seen between torch's plain
# and its AVX-512 instructions for x86, on 40 items of an earlier list of recipes: 1e-5 where weights are
# only cut, factored or rounded to
# nearest; 0.02 where they are rounded or removed one after another (what one rounding changes is carried on);
# 0.12 where inputs are rounded or something is trained (one rounding changes an answer; one of 40 is 0.025).
CLOSE, CARRIED, TRAINED = 1e-3, 0.1, 0.3
TRAINS = ("Distill", "QAT", "Transfer", "Activations", "KVCache", "train_steps")
CARRIES = ("gptq", "hqq", "sparsegpt", "awq", "Repair")
ELSEWHERE = ("no kernel",)  # texts that depend on the machine


@cache
def golden(model: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{model}.json").read_text())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recorder(request, tmp_path_factory):
    return Recorder(request.param, tmp_path_factory.mktemp("golden"))


def unlike(model: str) -> dict[str, tuple[str, str]]:
    """Return in what this machine is not the one that recorded a model, by name: then and now."""
    then, now = golden(model)["machine"], machine()
    return {
        name: (then.get(name, ""), now.get(name, ""))
        for name in then | now
        if then.get(name) != now.get(name)
    }


def tolerance(what: str, key: str) -> float:
    """Return how far a number of this name may be off for a recipe, which is written out."""
    if what.startswith(("predicted", "sizes", "items", "relative error")):
        return CLOSE
    return (
        TRAINED
        if any(mark in key for mark in TRAINS)
        else CARRIED
        if any(mark in key for mark in CARRIES)
        else CLOSE
    )


def far(old: list[float], new: list[float], most: float) -> bool:
    """Return whether numbers lie further apart than `most`."""
    return len(old) != len(new) or not all(
        a == b or math.isclose(a, b, rel_tol=most, abs_tol=most) for a, b in zip(old, new, strict=True)
    )


def differences(old: dict[str, Any], new: dict[str, Any], *, bits: bool) -> list[str]:
    """Return a line for everything in which two records differ."""
    if "refused" in old or "refused" in new:
        return [f"{side}: {record}" for side, record in (("was", old), ("is", new))] if old != new else []
    plain = ("label", "key", "made", "bytes exact")
    lines = [f"{name}: {old[name]!r} -> {new[name]!r}" for name in plain if old[name] != new[name]]
    for name in old["texts"] | new["texts"]:
        was, now = old["texts"].get(name, []), new["texts"].get(name, [])
        if was != now and (bits or name not in ELSEWHERE):
            lines.append(f"{name}: {was!r} -> {now!r}")
    for name in old["numbers"] | new["numbers"]:
        was, now = old["numbers"].get(name, []), new["numbers"].get(name, [])
        if was != now if bits else far(was, now, tolerance(name, old["steps"])):
            lines.append(f"{name}: {was} -> {now}")
    if bits:
        lines += [
            f"hash of {name}" for name, told in old["hashes"].items() if new["hashes"].get(name) != told
        ]
    return lines


@pytest.mark.parametrize("model", MODELS)
def test_this_is_the_machine_on_which_bits_were_recorded(model):
    difference = unlike(model)
    if difference and os.environ.get("GOLDEN_BITS", "0") != "0":
        pytest.fail(
            f"{model} was recorded on another machine: {difference}; record it here, see"
            " tests/record_golden.py"
        )
    if difference:
        pytest.skip(
            f"bits of {model} are not compared, numbers are: it was recorded on another machine: {difference}"
        )


@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_of_a_model_was_recorded(model):
    assert list(golden(model)["points"]) == recipes_of(model)
    assert sum("refused" not in point for point in golden(model)["points"].values()) >= 60


@pytest.mark.parametrize(
    ("recorder", "recipe"),
    [(model, recipe) for model in MODELS for recipe in recipes_of(model)],
    indirect=["recorder"],
)
def test_a_recipe_gives_what_it_gave(recorder, recipe):
    unequal = differences(
        golden(recorder.name)["points"][recipe], recorder.record(recipe), bits=not unlike(recorder.name)
    )
    assert not unequal, "\n".join(unequal)
