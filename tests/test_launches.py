"""How many kernels a slider's move asks a GPU for: a number for each shape of layer, not for each layer."""

from __future__ import annotations

import pytest
import torch
from launches import Launches
from tiny_tasks import tiny_task

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.recipe import Recipe
from workbench.tasks.base import Task

MOVES = {  # recipe at a position of its slider, kernels and waits that it may ask for
    "magnitude": (lambda at: [wb.Prune(sparsity=0.3 + 0.1 * at)], 200, 2),
    "wanda": (lambda at: [wb.Prune(sparsity=0.3 + 0.1 * at, criterion="wanda")], 260, 2),
    "2:4": (lambda _at: [wb.Prune(sparsity=0.5, pattern="2:4")], 250, 2),
    "round to nearest": (lambda at: [wb.Quantize(weight_bits=3 + at % 2, embeddings="dense")], 220, 1),
    "and the vocabulary": (lambda at: [wb.Quantize(weight_bits=3 + at % 2)], 340, 2),  # one more shape
    "low rank": (lambda at: [wb.LowRank(rank_ratio=0.2 + 0.05 * at)], 190, 2),
    "bits after pruning": (lambda at: [wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3 + at)], 1400, 6),
}


def deep(layers: int) -> Task:
    """Return a Llama of many small blocks in bfloat16, as on a GPU: seven layers a block, of four shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return tiny_task("llama", dtype=torch.bfloat16, model=LlamaForCausalLM(config))


def counted(task: Task, name: str) -> Launches:
    """Return the kernels that a move asks for once all is there that does not depend on the slider."""
    kept, (make, _, _) = Statistics(task), MOVES[name]
    for at in range(4):
        compress(task, Recipe(*make(at)), kept, shared=True)
    with Launches() as launches:
        compress(task, Recipe(*make(4)), kept, shared=True)
    return launches


@pytest.mark.parametrize("name", MOVES)
def test_a_move_asks_for_few_kernels_and_hardly_waits(name):
    launches = counted(deep(20), name)
    _, kernels, waits = MOVES[name]
    assert launches.total <= kernels, launches.counts.most_common()
    assert launches.waits <= waits


@pytest.mark.parametrize("name", [name for name in MOVES if name != "bits after pruning"])
def test_twice_as_many_layers_ask_for_no_more_kernels(name):
    assert counted(deep(16), name).total == counted(deep(8), name).total


def test_the_counter_counts_kernels_and_not_views():
    ones = torch.ones(4, 4)
    with Launches() as launches:
        ones.view(16).t().detach()[2:].unsqueeze(0)
        (ones + 1).mul_(2)
        torch.empty(3)
    assert launches.counts == {"add": 1, "mul_": 1}
    with Launches() as launches:
        bool((ones > 0).all())
    assert launches.waits == 1
