"""Transfer on real and on speaking models: which states count, what an encoder has to do with it, and that it
helps."""

from __future__ import annotations

import pytest
import speech_models
import torch

import workbench as wb
from workbench.compress import compress
from workbench.compress.distillation.aligned_states import points
from workbench.errors import CompressionError
from workbench.recipe import Recipe
from workbench.tasks import score
from workbench.tasks.base import Items
from workbench.zoo import load_task

FAST = {"transfer_steps": 3, "transfer_batch": 4, "transfer_rate": 1e-2}
DEPTH = wb.Prune(sparsity=0.34, pattern="layers")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A tiny Whisper of one encoder and two decoder layers with 24 noises and their words."""
    folder = tmp_path_factory.mktemp("speech")
    return load_task(
        speech_models.whisper(folder / "m"),
        speech_models.sounds(folder / "d", speech_models.words(24)),
        progress=False,
    )


@pytest.fixture(scope="module")
def fashion_vit():
    return load_task("fashion-vit", offline=True, progress=False, evaluation_items=512)


# --- which points are compared


def test_tokens_without_a_label_do_not_count():
    states = torch.arange(12.0).view(2, 3, 2)
    items = Items({"input_ids": torch.zeros(2, 3)}, torch.tensor([[1, -100, 2], [-100, -100, 3]]))
    assert points(states, items).tolist() == [[0, 1], [4, 5], [10, 11]]


def test_frames_of_filling_do_not_count():
    states = torch.arange(12.0).view(2, 3, 2)  # one frame of two of the input's
    items = Items(
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])},
        torch.zeros(2, 5, dtype=torch.long),
    )
    assert points(states, items).tolist() == [[0, 1], [2, 3], [6, 7]]


def test_every_token_of_a_picture_counts_and_every_pixel_of_a_map():
    items = Items({"pixel_values": torch.zeros(2, 1)}, torch.zeros(2, dtype=torch.long))
    assert points(torch.zeros(2, 5, 7), items).shape == (10, 7)
    maps = torch.arange(24.0).view(2, 3, 2, 2)
    assert points(maps, items).shape == (8, 3)
    assert points(maps, items)[0].tolist() == [0, 4, 8]


# --- models that hear


def test_a_decoder_that_is_taught_leaves_the_encoder_out_of_the_alignment(spoken):
    prune = wb.Prune(sparsity=0.5)
    step = wb.Transfer(targets=("re:decoder.layers.*fc1$",), lora_rank=1, align_projection="trained", **FAST)
    start, compressed = compress(spoken, Recipe(prune)).model, compress(spoken, Recipe(prune, step))
    moved = {
        name
        for name, tensor in compressed.model.state_dict().items()
        if not torch.equal(tensor, start.state_dict()[name])
    }
    assert moved == {f"model.decoder.layers.{i}.fc1.weight" for i in range(2)}
    (said,) = {
        row.outcome.split("trainable in all: ")[1].split(" numbers")[0]
        for row in compressed.report
        if "LoRA" in row.outcome
    }
    assert int(said) == 2 * (16 + 32) + 2 * 16 * 16  # two projections, none for the encoder


def test_a_model_that_computes_gradients_as_loaded_gets_none(spoken):
    assert any(parameter.requires_grad for parameter in spoken.model.parameters())  # as transformers loads it
    asked = [parameter.requires_grad for parameter in spoken.model.parameters()]
    compressed = compress(spoken, Recipe(wb.Prune(sparsity=0.5), wb.Transfer(**FAST)), shared=True)
    assert all(
        parameter.grad is None
        for model in (spoken.model, compressed.model)
        for parameter in model.parameters()
    )
    assert [parameter.requires_grad for parameter in spoken.model.parameters()] == asked
    assert (
        compressed.model.proj_out.weight is compressed.model.model.decoder.embed_tokens.weight
    )  # still tied
    assert (
        compressed.model.proj_out.weight.data_ptr() == spoken.model.proj_out.weight.data_ptr()
    )  # and shared with the dense model


def test_a_decoder_cut_in_depth_is_taught_and_heard_again(spoken):
    cut = wb.Prune(sparsity=0.5, pattern="layers", targets=("re:decoder.layers",))
    compressed = compress(spoken, Recipe(cut, wb.Transfer(**FAST)))
    assert len(compressed.model.model.decoder.layers) == 1
    assert torch.isfinite(score(spoken.kind, compressed.model, spoken.evaluation).loss).all()


# --- embedded models


@pytest.mark.slow
@pytest.mark.parametrize("align", ["none", "geodesic"])
def test_a_vision_transformer_cut_in_depth_recovers(fashion_vit, align):
    half = wb.Prune(sparsity=0.5, pattern="layers")
    start = compress(fashion_vit, Recipe(half))
    compressed = compress(fashion_vit, Recipe(half, wb.Transfer(transfer_steps=40, align=align)))
    before, after = (
        float(score(fashion_vit.kind, model, fashion_vit.evaluation).correct.mean())
        for model in (start.model, compressed.model)
    )
    dense = float(score(fashion_vit.kind, fashion_vit.model, fashion_vit.evaluation).correct.mean())
    assert after - before > 0.5 * (dense - before)  # half of what was lost comes back


def test_the_network_that_taught_the_transformer_can_teach_it_again(fashion_vit):
    with pytest.raises(CompressionError, match="hidden states cannot be aligned"):
        compress(fashion_vit, Recipe(wb.Transfer(teachers="fashion-cnn", **FAST)))
    alone = compress(fashion_vit, Recipe(wb.Transfer(teachers="fashion-cnn", align="none", **FAST)))
    both = compress(fashion_vit, Recipe(DEPTH, wb.Transfer(teachers="dense,fashion-cnn", **FAST)))
    assert len(alone.curve) == len(both.curve) == 3
    assert "of the teacher's 697,322" in next(row.outcome for row in alone.report if "LoRA" in row.outcome)
