"""Transfer while it trains: looks at held-out items, the best of which is kept, and going on exactly.

What Distill has, through the same code.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import KILLED
from tiny_tasks import TRAINING, same, tiny_task, weights

import workbench as wb
from workbench.compress import compress
from workbench.compress.training import checkpoints
from workbench.compress.training.run import Run
from workbench.compress.training.validation import HeldOut
from workbench.errors import CompressionError
from workbench.recipe import Recipe
from workbench.util.progress import Look, Training

PRUNE = wb.Prune(sparsity=0.5)
FAST = {"transfer_steps": 12, "transfer_batch": 8, "transfer_rate": 1e-2, "transfer_look_every": 3}


def taught(task, *, training=None, **options):
    return compress(task, Recipe(PRUNE, wb.Transfer(**FAST | options)), training=training)


def watched(seen: list[Look]) -> Training:
    return Training(looked=lambda looks: seen.append(looks[-1]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def improving(monkeypatch):
    """Make each look better than the one before, so that the last step is what is kept."""
    plain = HeldOut.look
    monkeypatch.setattr(
        HeldOut,
        "look",
        lambda held, model, step: dataclasses.replace(plain(held, model, step), loss=-float(step)),
    )


# --- looks


def test_looks_are_at_the_student_as_it_is_then(sort, device):
    """The first look sees the student before it is taught; no two looks see the same."""
    task, seen = tiny_task(sort, device), []
    taught(task, training=watched(seen), transfer_look_every=4)
    held = task.training[TRAINING - TRAINING // 10 :]
    assert [look.step for look in seen] == [0, 4, 8, 12]
    assert {look.items for look in seen} == {len(held)}
    start = task.kind.score(compress(task, Recipe(PRUNE)).model, held.to(device))
    nats = float((start.loss * start.weight).sum() / start.weight.sum())
    assert seen[0].loss == pytest.approx(math.exp(nats) if seen[0].metric == "perplexity" else nats, rel=1e-5)
    assert len({look.loss for look in seen}) == 4


def test_held_out_items_are_never_drawn(monkeypatch):
    seen = []
    plain = Run.added
    monkeypatch.setattr(
        Run,
        "added",
        lambda run, drawn, objective: seen.extend(drawn.index.tolist()) or plain(run, drawn, objective),
    )
    taught(tiny_task("vit"))
    assert max(seen) < TRAINING - TRAINING // 10


@pytest.mark.parametrize("align", ["none", "geodesic"])
@pytest.mark.parametrize("count", [1, 2])
def test_looks_do_not_change_what_is_learned(improving, align, count):
    """However often the student is looked at, the same items teach it to the same bits."""
    task = tiny_task("vit")
    options = {"align": align, "lora_count": count, "align_projection": "trained"}
    often, seldom = (taught(task, transfer_look_every=every, **options) for every in (1, 11))
    assert len(often.looks) == 13
    assert len(seldom.looks) == 3
    assert often.curve == seldom.curve
    assert same(weights(often.model), weights(seldom.model))


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_kept_is_the_best_look(count):
    """A rate that does harm after a while: the best look is not the last, and its weights are what is there.

    Of several LoRAs, those of their mean.
    """
    task, seen = tiny_task("vit"), []
    options = {"transfer_steps": 30, "transfer_rate": 0.3, "lora_count": count}
    compressed = taught(task, training=watched(seen), **options)
    best = min(seen, key=lambda look: look.loss)
    assert 0 <= best.step < 30
    held = task.training[TRAINING - TRAINING // 10 :]
    assert float(task.kind.score(compressed.model, held).loss.mean()) == pytest.approx(best.loss, rel=1e-6)
    assert compressed.looks == tuple(seen)
    assert any(
        f"kept as after step {best.step}: held-out accuracy {best.value:.4g}" in row.outcome
        for row in compressed.report
    )
    assert same(weights(taught(task, **options).model), weights(compressed.model))


@pytest.mark.parametrize("loras", [1, 2])
def test_ending_it_keeps_the_best_look_and_gives_the_same_bits_again(loras):
    task, count = tiny_task("vit"), []
    training = Training(lambda curve, steps: count.append(steps), lambda: len(count) == 8)
    compressed = taught(task, training=training, transfer_steps=30, transfer_rate=0.3, lora_count=loras)
    assert compressed.recipe.get("transfer").transfer_stop_at == 8
    assert [look.step for look in compressed.looks] == [0, 3, 6, 8]
    again = compress(task, compressed.recipe)
    assert same(weights(again.model), weights(compressed.model))
    assert again.curve == compressed.curve


def test_several_loras_learn_what_each_learns_alone_and_are_averaged():
    """Side by side is only how they are run: the mean of three trained apart, with the seeds that each has,
    is the same."""
    task = tiny_task("vit")
    options = {"transfer_look_every": 0, "align_projection": "trained"}
    together = taught(task, lora_count=3, seed=5, **options)
    alone = [taught(task, seed=5 + index, **options) for index in range(3)]
    for name, tensor in weights(together.model).items():
        mean = torch.stack([weights(single.model)[name].double() for single in alone]).mean(0)
        assert torch.allclose(tensor.double(), mean, atol=1e-6), name
    assert [loss for _, loss in together.curve] == pytest.approx(
        [
            sum(losses) / 3
            for losses in zip(*([loss for _, loss in single.curve] for single in alone), strict=True)
        ],
        rel=1e-5,
    )


def test_looks_are_at_the_mean_of_several(improving):
    task, seen = tiny_task("vit"), []
    compressed = taught(task, training=watched(seen), lora_count=2, transfer_look_every=4)
    scores = task.kind.score(compressed.model, task.training[TRAINING - TRAINING // 10 :])
    assert [look.step for look in seen] == [0, 4, 8, 12]
    assert seen[-1].value == pytest.approx(float(scores.correct.mean()))
    assert any(
        "mean of 2, trained 12 steps" in row.outcome
        and "kept as after step 12: held-out accuracy" in row.outcome
        for row in compressed.report
    )


def test_too_few_items_to_hold_out_are_said_by_the_name_of_the_option():
    task = tiny_task("vit")
    object.__setattr__(task, "training", task.training[:19])
    compressed = taught(task)
    assert compressed.warnings == (
        (
            "transfer_look_every=3 is left out: it needs 20 training items, of which a tenth is held out, and"
            " 'noise' has 19; the last step is kept"
        ),
    )
    assert compressed.looks == ()
    assert same(weights(compressed.model), weights(taught(task, transfer_look_every=0).model))


def test_without_looks_a_recipe_keeps_the_key_that_it_had():
    """Points of ledgers that were measured before there were looks are those without looks."""
    plain, saved, looking = (
        Recipe(PRUNE, wb.Transfer(**options)).key
        for options in (
            {"transfer_look_every": 0},
            {"transfer_look_every": 0, "transfer_checkpoint_every": 5},
            {},
        )
    )
    assert plain == "30a3b7781a92f70a"
    assert len({plain, saved, looking}) == 3


# --- going on exactly


@pytest.mark.parametrize(("sort", "align", "count"), [("vit", "geodesic", 2), ("llama", "none", 1)])
def test_a_killed_training_goes_on_to_the_same_bits(cache, sort, align, count):
    options = {
        **FAST,
        "transfer_look_every": 5,
        "align": align,
        "align_projection": "trained",
        "lora_count": count,
    }
    recipe = Recipe(PRUNE, wb.Transfer(**options, transfer_checkpoint_every=3))
    task = tiny_task(sort)
    plain = compress(task, Recipe(PRUNE, wb.Transfer(**options)))
    script = KILLED.format(tests=str(Path(__file__).parent), sort=sort)
    ended = subprocess.run(
        [sys.executable, "-c", script, recipe.to_json()],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list(checkpoints.folder().glob("*.pt"))) == 1
    compressed = compress(task, recipe)
    assert compressed.warnings == ("transfer went on from step 6 of 12, where it was saved",)
    assert compressed.curve == plain.curve
    assert compressed.looks == plain.looks
    assert same(weights(compressed.model), weights(plain.model))
    assert list(checkpoints.folder().iterdir()) == []


def test_a_training_that_was_ended_can_be_taken_up_again(cache):
    task = tiny_task("vit")
    ended = taught(task, training=Training(enough=lambda: True), transfer_checkpoint_every=5)
    assert ended.recipe.get("transfer").transfer_stop_at == 1
    compressed = taught(task, transfer_checkpoint_every=5, transfer_look_every=3)
    assert compressed.warnings == ("transfer went on from step 1 of 12, where it was saved",)
    assert compressed.curve == taught(task).curve


def test_another_student_or_option_does_not_go_on_from_it(cache):
    task = tiny_task("vit")
    stopped = {"transfer_stop_at": 4, "transfer_checkpoint_every": 2}
    taught(task, **stopped)
    for changes in (
        {"kl_weight": 0.5},
        {"lora_rank": 2},
        {"seed": 1},
        {"align": "mse"},
        {"targets": ("*fc1*",)},
    ):
        assert taught(task, **stopped, **changes).warnings == ()
    step = wb.Transfer(**FAST, **stopped)
    assert compress(task, Recipe(wb.Prune(sparsity=0.6), step)).warnings == ()


def test_a_folder_that_cannot_be_written_is_refused_by_the_name_of_the_option(cache):
    (cache / "compression-workbench").write_text("a file")
    with pytest.raises(
        CompressionError,
        match="no checkpoint can be written to .*; free space there, or set transfer_checkpoint_every=0",
    ):
        taught(tiny_task("vit"), transfer_checkpoint_every=2)
