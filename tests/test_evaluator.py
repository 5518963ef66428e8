"""The evaluator's shortcuts: logits reduced piece by piece, blocks that are not computed again."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import structure_models
import tiny_tasks
import torch
from tiny_tasks import CLASSES, VOCABULARY, spread, tiny_task
from torch import nn

import workbench as wb
from workbench.compress import compress
from workbench.compress.quantization.activations import Activations
from workbench.measure.evaluation.block_chain import alike, find_chain
from workbench.measure.evaluation.chunked_head import Head, Headless, find_head
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.measure.evaluation.prefix_reuse import KeptPrefix
from workbench.metrics.scores import Scores
from workbench.modules.layer import find_layers
from workbench.modules.substitution import with_stand_ins
from workbench.tasks import score
from workbench.tasks.base import Items, Task
from workbench.tasks.likelihood import Unprojected
from workbench.util.fast_path import Refusals

ALL = sorted(structure_models.BUILDERS)
LANGUAGE = ("llama", "gpt2", "untied", "grouped", "scaled")
DEPTHS = {
    "bert": 0,
    "mixtral": 0,
    "llama": 1,
    "gpt2": 1,
    "grouped": 3,
    "scaled": 2,
    "resnet": 3,
    "bottleneck": 4,
}  # blocks that can be left out; one alone is not worth it, and a tied head is the embedding too
PARTS = ("loss", "correct", "weight", "answers")


def evaluator_of(task: Task, **settings) -> Evaluator:
    settings = {
        "fused": False
    } | settings  # bits are compared with those of the model run as it is; see test_fused_blocks.py
    return Evaluator(task, task.evaluation.to(next(task.model.parameters()).device), **settings)


def plain(task: Task, model: nn.Module, count: int | None = None) -> Scores:
    """Return the model's scores, batch by batch, by its own forward."""
    return Scores.join(
        [score(task.kind, model, items) for items in task.evaluation[:count].batches(task.batch_size)]
    )


def alone(task: Task, name: str) -> nn.Module:
    """Return a model of which one layer is compressed."""
    return compress(task, wb.Recipe(wb.Prune(sparsity=0.5, targets=(name,))), shared=True).model


def same(left: Scores, right: Scores) -> bool:
    return all(torch.equal(getattr(left, part), getattr(right, part)) for part in PARTS)


# --- the head and its cross entropy


@pytest.mark.parametrize("name", LANGUAGE)
def test_losses_agree_with_whole_logits_in_float64(name, device):
    task = structure_models.task_of(name, device)
    scores = evaluator_of(task).scores(task.model, [], 48)
    exact = copy.deepcopy(task.model).double()
    with torch.no_grad():
        logits = exact(input_ids=task.evaluation.inputs["input_ids"].to(device)).logits[:, :-1].cpu()
    labels = task.evaluation.labels
    loss = torch.logsumexp(logits, -1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(scores.loss, loss.mean(1), rtol=1e-6 if device == "cpu" else 5e-6, atol=0)
    assert torch.equal(scores.answers, logits.argmax(-1))
    assert torch.equal(scores.correct, (logits.argmax(-1) == labels).double().mean(1))


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_model_is_run_without_its_head_and_logits_come_in_chunks(name, monkeypatch):
    task = structure_models.task_of(name)
    evaluator, shapes = evaluator_of(task), []
    head = task.model.get_output_embeddings()
    assert evaluator.head(type(task.model)) == Head("lm_head", VOCABULARY)
    monkeypatch.setattr("workbench.tasks.likelihood.CHUNK", 20 * VOCABULARY)
    monkeypatch.setattr(
        type(head),
        "forward",
        lambda self, given, real=type(head).forward: (
            shapes.append(tuple(given.shape)) if self is head else None,
            real(self, given),
        )[1],
    )
    evaluator.scores(task.model, [], 16)
    width = task.model.config.hidden_size
    assert shapes == [(20, width)] * 5 + [(16 * 7 - 100, width)]


def test_a_destroyed_language_model_still_gets_a_number():
    task = tiny_task("llama")
    model = copy.deepcopy(task.model)
    model.model.norm.weight.data.fill_(math.nan)
    scores = evaluator_of(task).scores(model, [], 16)
    assert scores.loss.tolist() == [math.inf] * 16
    assert scores.correct.tolist() == [0.0] * 16


def test_what_is_done_after_the_head_keeps_the_models_own_logits():
    class Capped(type(tiny_tasks.llama())):
        def forward(self, *args, **named):
            outputs = super().forward(*args, **named)
            return dataclasses.replace(outputs, logits=torch.tanh(outputs.logits / 30) * 30)

    torch.manual_seed(0)
    task = tiny_task("llama")
    capped = Capped(task.model.config).eval()
    task = dataclasses.replace(task, model=spread(capped).requires_grad_(False))
    assert find_head(task.model, task.evaluation, Refusals()) is None
    assert same(evaluator_of(task).scores(task.model, [], 48), plain(task, task.model))


def test_gemma_caps_its_logits():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=3.0,
        sliding_window=4,
    )
    task = tiny_task("llama", model=spread(Gemma2ForCausalLM(config)))
    assert find_head(task.model, task.evaluation, Refusals()) is None
    name = next(name for name in find_layers(task.model)[0] if ".layers.3." in name)
    evaluator, model = evaluator_of(task), alone(task, name)
    assert evaluator.unchanged_blocks(model) == 3
    assert same(evaluator.scores(model, [], 48), plain(task, model))
    assert same(evaluator.scores(model, [], 48), plain(task, model))


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_rounds_its_inputs_together_is_not_taken_apart(bias):
    task = tiny_task("untied")
    together = (
        Activations(targets=("lm_head",), activation_granularity="tensor")
        if bias
        else Activations(targets=("lm_head",))
    )
    model = compress(task, wb.Recipe(together), shared=True).model
    evaluator = evaluator_of(task)
    assert (evaluator.prepared(model) is model) is bias
    assert torch.allclose(evaluator.scores(model, [], 48).loss, plain(task, model).loss, rtol=1e-6)


def test_logits_to_be_made_are_sliced_as_made_ones():
    head, states = nn.Linear(5, 9), torch.randn(3, 4, 5)
    logits = torch.cat(list(Unprojected(states, head, 9)[:, :-1].chunks(2)))
    assert torch.allclose(logits, head(states)[:, :-1].reshape(-1, 9))


def test_taking_the_head_off_leaves_the_model_as_it_is():
    task = tiny_task("llama")
    before, modules = tiny_tasks.weights(task.model), list(task.model.modules())
    headless = Headless(task.model, Head("lm_head", VOCABULARY))
    headless(input_ids=task.evaluation.inputs["input_ids"][:2])
    assert list(task.model.modules()) == modules
    assert tiny_tasks.same(before, tiny_tasks.weights(task.model))
    assert headless.body.model is task.model.model


# --- blocks that are not computed again


@pytest.fixture
def one_thread():
    """Some CPU products do not give the same bits twice with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ALL)
def test_every_single_layer_scores_the_same_bits(name, device, one_thread):
    task = structure_models.task_of(name, device)
    used, evaluator = [], evaluator_of(task, graphs=False)
    for layer in find_layers(task.model)[0]:
        model = alone(task, layer)
        whole = evaluator_of(task, budget=0, graphs=False).scores(model, [], 48)
        for _ in range(2):  # what the first run kept, the second one starts from
            scores = evaluator.scores(model, [], 48)
            assert same(scores, whole), layer
        used.append(evaluator.unchanged_blocks(model))
    assert 0 in used
    assert max(used) == DEPTHS.get(name, 2)


@pytest.mark.parametrize(
    ("threads", "noise", "left_out"),
    [(1, 0.0, True), (1, 1e-7, False), (2, 0.0, True), (2, 1e-7, True), (2, 1e-3, False)],
)
def test_with_several_threads_the_same_to_rounding_is_enough(monkeypatch, threads, noise, left_out):
    task = structure_models.task_of("grouped")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    runs: list[float] = []

    def noisy(model, items):
        scores = score(task.kind, model, items)
        runs.append(noise)
        return dataclasses.replace(scores, loss=scores.loss * (1 + noise * len(runs)))

    assert (find_chain(task.model, noisy, task.evaluation[:1], Refusals()) is not None) == left_out
    assert len(runs) == 2


@pytest.mark.parametrize("several", [False, True])
def test_readings_agree_only_with_finite_losses_and_the_same_answers(several):
    scores = Scores(torch.tensor([2.0, 3.0]), torch.zeros(2), torch.ones(2), torch.tensor([1, 2]))
    assert alike(scores, scores, several=several)
    assert (
        alike(scores, dataclasses.replace(scores, loss=torch.tensor([2.00001, 3.0])), several=several)
        == several
    )
    assert not alike(scores, dataclasses.replace(scores, loss=torch.tensor([2.0001, 3.0])), several=several)
    assert not alike(scores, dataclasses.replace(scores, answers=torch.tensor([1, 3])), several=several)
    for bad in (math.inf, math.nan):  # what NaN in the place of hidden states makes
        assert not alike(scores, dataclasses.replace(scores, loss=torch.tensor([2.0, bad])), several=several)


def test_blocks_before_the_changed_one_are_not_run():
    task = structure_models.task_of("grouped")
    model = alone(task, "model.layers.2.mlp.up_proj")
    runs: list[int] = []
    evaluator = evaluator_of(task)
    real = type(model.model.layers[0]).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model.model.layers[0]),
            "forward",
            lambda self, *args, **named: (runs.append(self.self_attn.layer_idx), real(self, *args, **named))[
                1
            ],
        )
        evaluator.scores(model, [], 48)
        first, runs[:] = list(runs), []
        evaluator.scores(model, [], 48)
    assert first[-9:] == [0, 1, 2] * 3
    assert runs == [2] * 3


def test_a_changed_embedding_norm_or_cache_leaves_nothing_out():
    task = structure_models.task_of("grouped")
    evaluator = evaluator_of(task)
    assert evaluator.unchanged_blocks(alone(task, "model.layers.1.mlp.up_proj")) == 1
    assert evaluator.unchanged_blocks(alone(task, "lm_head")) == (
        0 if task.model.config.tie_word_embeddings else 3
    )
    for recipe in (
        wb.Recipe(wb.Prune(sparsity=0.3, pattern="layers")),
        wb.Recipe(wb.KVCache(kv_bits=4)),
        wb.Recipe(wb.Prune(sparsity=0.5)),
    ):
        assert evaluator.unchanged_blocks(compress(task, recipe, shared=True).model) == 0
    assert evaluator.unchanged_blocks(task.model) == 0
    assert (
        evaluator.unchanged_blocks(
            compress(task, wb.Recipe(wb.Prune(sparsity=0.5, targets=("model.layers.2.*",)))).model
        )
        == 0
    )  # nothing is shared


@pytest.mark.parametrize("change", ["hook", "forward", "buffer", "class", "number"])
def test_any_change_of_a_block_is_seen(change):
    task = structure_models.task_of("grouped")
    evaluator, model = evaluator_of(task), alone(task, "model.layers.2.mlp.up_proj")
    assert evaluator.unchanged_blocks(model) == 2
    attention = model.model.layers[1].self_attn
    if change == "hook":
        attention.q_proj.register_forward_hook(lambda module, given, output: output + 1)
    elif change == "forward":
        attention.q_proj.forward = lambda given: given
    elif change == "buffer":
        attention.q_proj.register_buffer("more", torch.ones(1))
    elif change == "class":
        attention.q_proj.__class__ = type("Other", (nn.Linear,), {})
    else:
        attention.scaling = 0.5
    assert evaluator.unchanged_blocks(model) == 1


class Chained(nn.Module):
    """Blocks in a row whose outputs may be read once more at the end, or that may work in place or return
    more."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.blocks, self.head = (
            way,
            nn.ModuleList(nn.Linear(6, 6) for _ in range(4)),
            nn.Linear(6, CLASSES),
        )

    def forward(self, pixel_values):
        states, seen = pixel_values.flatten(1), []
        for block in self.blocks:
            states = block(states) if self.way != "twice" else block(block(states))
            if self.way == "in place":
                states.relu_()
            elif self.way == "new":
                states = states * 1.5
            seen.append(states)
        if self.way == "skip":
            states = states + seen[1]
        return type("Output", (), {"logits": self.head(states)})


@pytest.mark.parametrize(
    ("way", "chained"),
    [("plain", True), ("skip", False), ("in place", False), ("twice", False), ("new", False)],
)
def test_only_a_plain_chain_is_cut(way, chained):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Chained(way).eval().requires_grad_(False)
    items = Items(
        {"pixel_values": torch.randn(48, 6, generator=generator)},
        torch.randint(CLASSES, (48,), generator=generator),
    )
    task = dataclasses.replace(tiny_task("vit"), model=model, evaluation=items)
    chain = find_chain(model, lambda variant, some: score(task.kind, variant, some), items[:1], Refusals())
    assert (chain is not None) is chained
    evaluator = evaluator_of(task)
    for _ in range(2):
        changed = compress(task, wb.Recipe(wb.Prune(sparsity=0.5, targets=("blocks.3",))), shared=True).model
        assert same(evaluator.scores(changed, [], 48), plain(task, changed))
    assert evaluator.unchanged_blocks(changed) == (3 if chained else 0)


def test_kept_states_stay_within_the_budget_and_one_block_does_not_push_out_itself():
    kept = KeptPrefix(100)
    states = torch.zeros(10)  # 40 bytes
    kept.put("a", 1, states)
    kept.put("b", 1, states)
    kept.put("c", 1, states)
    assert set(kept.states) == {("a", 1), ("b", 1)}
    assert kept.nbytes == 80
    kept.put("a", 3, states)
    assert set(kept.states) == {("b", 1), ("a", 3)}
    assert kept.nearest("a", 2) == (0, None)
    assert kept.nearest("a", 4)[0] == 3
    kept.put("d", 2, torch.zeros(99))
    assert kept.nbytes <= 100


def test_without_a_budget_nothing_is_kept():
    task = structure_models.task_of("grouped")
    evaluator = evaluator_of(task, budget=0)
    evaluator.scores(alone(task, "model.layers.2.mlp.up_proj"), [], 48)
    assert not evaluator.prefix.kept.states


def test_a_stand_in_answers_for_its_module():
    model = structure_models.task_of("grouped").model
    replaced = with_stand_ins(model, {"model.layers.1.mlp.act_fn": nn.Identity()})
    assert isinstance(replaced.model.layers[1].mlp.act_fn, nn.Identity)
    assert not isinstance(model.model.layers[1].mlp.act_fn, nn.Identity)
    assert replaced.model.layers[0] is model.model.layers[0]
    assert replaced.model.layers[1].self_attn is model.model.layers[1].self_attn


def test_the_sensitivity_of_layers_is_what_it_was_without_shortcuts(tmp_path):
    task = structure_models.task_of("grouped")
    quick, slow = (wb.Bench(task, ledger=tmp_path / f"{i}.journal", progress=False) for i in range(2))
    slow.setting = dataclasses.replace(slow.setting, evaluator=evaluator_of(task, budget=0))
    recipe = wb.Recipe(wb.Quantize(weight_bits=3, group_size=8))
    assert list(quick.sensitivity(recipe)) == list(slow.sensitivity(recipe))
    assert quick.setting.evaluator.prefix.kept.states
