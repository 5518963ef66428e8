"""Training that is robust: parts of a batch, memory that runs out, looks at held-out items, and going on
exactly."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_tasks import SORTS, TRAINING, same, spread, tiny_task, vit, vocabulary, weights
from transformers import ViTForImageClassification

import workbench as wb
from workbench.compress import compress
from workbench.compress.training import checkpoints
from workbench.compress.training.run import Run
from workbench.compress.training.validation import HeldOut
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import Recipe
from workbench.util.progress import Look, Training

PRUNE = wb.Prune(sparsity=0.5)
BOTH = (PRUNE, wb.Quantize(weight_bits=4))


def distilled(task, *before, training=None, statistics=None, **options):
    step = wb.Distill(**{"temperature": 2, "steps": 6, "distill_batch": 8, "look_every": 0, **options})
    return compress(task, Recipe(*(before or (PRUNE,)), step), statistics, training=training)


def close(task, left, right, atol):
    """Compare answers: weights that these do not depend on (biases of keys) follow the noise of their
    gradients."""
    some = task.training.to(next(left.model.parameters()).device)
    with torch.no_grad():
        expected, logits = (task.kind.logits(compressed.model, some) for compressed in (left, right))
    return torch.allclose(expected, logits, atol=atol)


# --- models that keep tensors between calls


class Remembering(ViTForImageClassification):
    """A model that makes a tensor at its first call and uses it ever after, as BEiT's relative positions and
    the rotary embeddings of several speech models are."""

    kept = None

    def forward(self, pixel_values, **options):
        if self.kept is None:
            self.kept = torch.full((1,), 2.0, device=pixel_values.device)
        outputs = super().forward(pixel_values, **options)
        outputs.logits = outputs.logits * self.kept
        return outputs


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_a_model_that_keeps_tensors_can_be_trained_after_it_was_measured(tmp_path, criterion):
    """What gradients need must not have been made where there can be none."""
    recipe = Recipe(
        wb.Prune(sparsity=0.5, criterion=criterion), wb.Distill(steps=2, distill_batch=8, look_every=0)
    )
    fresh, measured = (tiny_task(model=spread(Remembering(vit().config))) for _ in range(2))
    bench = wb.Bench(measured, device="cpu", ledger=tmp_path / "points.journal", progress=False)
    bench.measure(Recipe(PRUNE))
    assert measured.model.kept is not None
    assert same(weights(compress(fresh, recipe).model), weights(bench.compress(recipe).model))


# --- parts of a batch


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_a_batch_add_up_to_the_whole(sort, device, parts):
    """The last part of three is smaller than the others, and must count for less."""
    task = tiny_task(sort, device)
    whole, cut = distilled(task, hidden_weight=0.1), distilled(task, hidden_weight=0.1, accumulate=parts)
    assert [loss for _, loss in cut.curve] == pytest.approx([loss for _, loss in whole.curve], rel=1e-3)
    assert close(task, whole, cut, 1e-3)


def test_windows_with_unequal_numbers_of_labels_count_by_their_labels():
    task = tiny_task("llama")
    task.training.labels[::2, 1:] = -100
    whole, cut = distilled(task), distilled(task, accumulate=4)
    assert [loss for _, loss in cut.curve] == pytest.approx([loss for _, loss in whole.curve], rel=1e-4)


def test_more_parts_than_items_are_refused():
    with pytest.raises(RecipeError, match="accumulate=9 parts cannot be made of distill_batch=8 items"):
        wb.Distill(temperature=2, distill_batch=8, accumulate=9)


# --- memory that runs out


@pytest.fixture
def cramped(monkeypatch):
    """Let no more than some items fit into memory at once."""

    def most(items):
        plain = torch.nn.Module.__call__

        def call(module, *args, **named):
            pixels = named.get("pixel_values")
            if pixels is not None and len(pixels) > items and torch.is_grad_enabled():
                raise torch.OutOfMemoryError(f"CUDA out of memory for {len(pixels)} images")
            return plain(module, *args, **named)

        monkeypatch.setattr(torch.nn.Module, "__call__", call)

    return most


def test_where_memory_runs_out_it_goes_on_with_smaller_parts_and_says_so(cramped):
    task = tiny_task("vit")
    whole = distilled(task)
    cramped(3)
    compressed = distilled(task)
    assert compressed.recipe == whole.recipe
    assert [loss for _, loss in compressed.curve] == pytest.approx(
        [loss for _, loss in whole.curve], rel=1e-4
    )
    assert close(task, whole, compressed, 1e-3)
    assert compressed.warnings == (
        (
            "distillation ran out of memory at step 0 with 8 items at a time: it went on with 4, their"
            " gradients added up, so that a step still is made of 8"
        ),
        (
            "distillation ran out of memory at step 0 with 4 items at a time: it went on with 2, their"
            " gradients added up, so that a step still is made of 8"
        ),
    )
    assert same(weights(distilled(task, accumulate=4).model), weights(compressed.model))


def test_a_single_item_that_does_not_fit_is_refused(cramped):
    cramped(0)
    with pytest.raises(
        CompressionError, match="distillation ran out of memory at step 0 with one item at a time"
    ):
        distilled(tiny_task("vit"))


# --- looks at held-out items


def test_looks_are_at_items_that_are_not_trained_on():
    task = tiny_task("vit")
    seen: list[Look] = []
    compressed = distilled(
        task, steps=9, look_every=3, training=Training(looked=lambda looks: seen.append(looks[-1]))
    )
    assert [look.step for look in seen] == [0, 3, 6, 9]
    assert {look.items for look in seen} == {TRAINING // 10}
    assert all(look.low <= look.value <= look.high and look.metric == "accuracy" for look in seen)
    assert seen[0].confidence == 0.95
    best = min(seen, key=lambda look: look.loss)
    assert f"kept as after step {best.step}: held-out accuracy" in compressed.report[0].outcome


def test_held_out_items_are_never_drawn(monkeypatch):
    task = tiny_task("vit")
    seen = []
    plain = Run.added
    monkeypatch.setattr(
        Run,
        "added",
        lambda run, drawn, objective: seen.extend(drawn.index.tolist()) or plain(run, drawn, objective),
    )
    distilled(task, steps=20, look_every=10)
    assert max(seen) < TRAINING - TRAINING // 10


def test_what_is_kept_is_the_best_look():
    """A rate that does harm after a while: the best look is not the last, and its weights are what is
    there."""
    task = tiny_task("vit")
    seen: list[Look] = []
    options = {"steps": 30, "look_every": 3, "learning_rate": 0.1}
    compressed = distilled(
        task, *BOTH, training=Training(looked=lambda looks: seen.append(looks[-1])), **options
    )
    best = min(seen, key=lambda look: look.loss)
    assert 0 <= best.step < 30
    held = task.training[TRAINING - TRAINING // 10 :]
    assert float(task.kind.score(compressed.model, held).loss.mean()) == pytest.approx(best.loss, rel=1e-6)
    assert compressed.recipe.get("distill").stop_at == 0
    assert same(weights(distilled(task, *BOTH, **options).model), weights(compressed.model))


def test_ending_it_keeps_the_best_look_and_gives_the_same_bits_again():
    task = tiny_task("vit")
    count = []
    training = Training(lambda curve, steps: count.append(steps), lambda: len(count) == 8)
    compressed = distilled(task, steps=30, look_every=3, learning_rate=0.1, training=training)
    assert compressed.recipe.get("distill").stop_at == 8
    again = compress(task, compressed.recipe)
    assert same(weights(again.model), weights(compressed.model))
    assert again.curve == compressed.curve


def test_too_few_items_to_hold_out_are_said_and_the_last_step_is_kept():
    task = tiny_task("vit")
    object.__setattr__(task, "training", task.training[:19])
    compressed = distilled(task, look_every=2)
    assert compressed.warnings == (
        (
            "look_every=2 is left out: it needs 20 training items, of which a tenth is held out, and 'noise'"
            " has 19; the last step is kept"
        ),
    )
    assert compressed.looks == ()
    assert same(weights(compressed.model), weights(distilled(task).model))


def test_looks_of_two_trainings_stand_one_after_the_other_on_the_curve():
    task = tiny_task("vit")
    counts: list[int] = []
    training = Training(looked=lambda looks: counts.append(len(looks)))
    compressed = compress(
        task,
        Recipe(
            *BOTH,
            wb.QAT(qat_steps=5, qat_batch=8),
            wb.Distill(temperature=2, steps=6, distill_batch=8, look_every=3),
        ),
        training=training,
    )
    assert [look.step for look in compressed.looks] == [5, 8, 11]
    assert counts == [1, 2, 3]
    assert len(compressed.curve) == 11


# --- going on exactly


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tiny_tasks import tiny_task
import workbench as wb
from workbench.compress import compress
from workbench.compress.registry import METHODS
from workbench.util.progress import Training

def watch(curve, steps):
    if len(curve) == 7:
        os.kill(os.getpid(), signal.SIGKILL)

compress(tiny_task({sort!r}), METHODS.from_json(sys.argv[1]), training=Training(watch))
"""


@pytest.mark.parametrize("sort", ["vit", "llama"])
def test_a_killed_training_goes_on_to_the_same_bits(cache, sort):
    recipe = Recipe(
        *BOTH, wb.Distill(temperature=2, steps=12, distill_batch=8, look_every=5, checkpoint_every=3)
    )
    task = tiny_task(sort)
    plain = compress(task, Recipe(*BOTH, wb.Distill(temperature=2, steps=12, distill_batch=8, look_every=5)))
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
    assert compressed.warnings == ("distillation went on from step 6 of 12, where it was saved",)
    assert compressed.curve == plain.curve
    assert same(weights(compressed.model), weights(plain.model))
    assert list(checkpoints.folder().iterdir()) == []


def test_a_training_that_was_ended_can_be_taken_up_again(cache):
    task = tiny_task("vit")
    options = {"steps": 12, "checkpoint_every": 5}
    ended = distilled(task, training=Training(enough=lambda: True), **options)
    assert ended.recipe.get("distill").stop_at == 1
    compressed = distilled(task, **options)
    assert compressed.warnings == ("distillation went on from step 1 of 12, where it was saved",)
    assert same(weights(compressed.model), weights(distilled(task, steps=12).model))


def test_other_options_data_or_weights_do_not_go_on_from_it(cache):
    task = tiny_task("vit")
    distilled(task, steps=12, stop_at=4, checkpoint_every=2)
    for changes in ({"alpha": 0.5}, {"seed": 1}, {"distill_batch": 4}):
        assert distilled(task, steps=12, stop_at=6, checkpoint_every=2, **changes).warnings == ()
    assert distilled(task, wb.Prune(sparsity=0.6), steps=12, stop_at=6, checkpoint_every=2).warnings == ()
    assert distilled(task, steps=12, stop_at=2, checkpoint_every=2).warnings == ()  # it was saved beyond
    assert len(list(checkpoints.folder().glob("*.pt"))) <= checkpoints.MOST


def test_a_damaged_checkpoint_starts_anew(cache):
    task = tiny_task("vit")
    distilled(task, steps=12, stop_at=4, checkpoint_every=2)
    (path,) = checkpoints.folder().glob("*.pt")
    path.write_bytes(path.read_bytes()[:100])
    compressed = distilled(task, steps=12, checkpoint_every=2)
    (said,) = compressed.warnings
    assert said.startswith(f"training started anew: {path} cannot be read (")
    assert same(weights(compressed.model), weights(distilled(task, steps=12).model))


def test_a_folder_that_cannot_be_written_is_refused(cache):
    (cache / "compression-workbench").write_text("a file")
    with pytest.raises(
        CompressionError,
        match="no checkpoint can be written to .*; free space there, or set checkpoint_every=0",
    ):
        distilled(tiny_task("vit"), checkpoint_every=2)


# --- promises, with every option on


@pytest.fixture
def improving(monkeypatch):
    """Make each look better than the one before: on noise the first one may be the best, and nothing would
    have moved."""
    plain = HeldOut.look
    monkeypatch.setattr(
        HeldOut,
        "look",
        lambda held, model, step: dataclasses.replace(plain(held, model, step), loss=-float(step)),
    )


EVERYTHING = {
    "steps": 12,
    "learning_rate": 1e-2,
    "hidden_weight": 0.5,
    "teacher_cache_mb": 16,
    "accumulate": 2,
    "train_precision": "mixed",
    "look_every": 5,
    "checkpoint_every": 4,
    "divergence": "skewed",
}


@pytest.mark.parametrize(
    "before",
    [
        (wb.Prune(pattern="2:4"), wb.Quantize(weight_bits=4)),
        (wb.LowRank(rank_ratio=0.4), wb.Prune(sparsity=0.5)),
        (wb.Prune(sparsity=0.5, pattern="neurons"), wb.Quantize(weight_bits=3)),
    ],
    ids=lambda steps: "+".join(step.label() for step in steps),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_masks_ranks_grids_and_removed_structure_hold(cache, improving, device, dtype, before):
    task = tiny_task("llama", device, dtype)
    dense = weights(task.model)
    start, compressed = compress(task, Recipe(*before)), distilled(task, *before, **EVERYTHING)
    assert same(weights(task.model), dense)
    assert {name: tensor.shape for name, tensor in weights(compressed.model).items()} == {
        name: tensor.shape for name, tensor in weights(start.model).items()
    }
    moved = 0
    for first, last in zip(start.layers, compressed.layers, strict=True):
        last.check()
        assert (first.name, first.rank) == (last.name, last.rank)
        assert last.parameter.dtype == dtype
        if first.mask is not None:
            assert torch.equal(first.mask, last.mask)
            assert (last.matrix()[~last.mask] == 0).all()
        if first.grid is not None and first.name not in vocabulary(start.model):
            assert torch.equal(first.grid.scale, last.grid.scale)
        moved += not torch.equal(first.parameter, last.parameter)
    assert moved > len(compressed.layers) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_a_target_leaves_out_keeps_its_bits(cache, improving, device, dtype):
    task = tiny_task("llama", device, dtype)
    start, compressed = compress(task, Recipe(PRUNE)), distilled(task, **EVERYTHING, targets=("re:up_proj$",))
    after = weights(compressed.model)
    changed = {name for name, tensor in weights(start.model).items() if not torch.equal(tensor, after[name])}
    assert changed == {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}


# --- mixed precision


@pytest.mark.parametrize("sort", SORTS)
def test_small_steps_are_not_rounded_away(sort, device):
    """At a rate of 5e-4 a bfloat16 weight of 1, next to which stands 0.996, stays.

    Held in float32 meanwhile, it gets there in a few steps.
    """
    task = tiny_task(sort, device, torch.bfloat16)
    start = weights(compress(task, Recipe(*BOTH)).model)
    moved = []
    for precision in ("model", "mixed"):
        compressed = distilled(task, *BOTH, steps=60, learning_rate=5e-4, train_precision=precision)
        after = weights(compressed.model)
        assert {tensor.dtype for tensor in compressed.model.parameters()} == {torch.bfloat16}
        moved.append(
            sum(
                int(((tensor == 1) & (after[name] != 1)).sum())
                for name, tensor in start.items()
                if tensor.ndim == 1
            )
        )
        if device == "cpu" and precision == "mixed":
            assert compressed.warnings == (
                (
                    "train_precision='mixed' saves nothing on cpu: weights are held, and the arithmetic is"
                    " done, in float32"
                ),
            )
    assert moved[0] == 0 < moved[1]
