"""Sizes are those of the file that was given, tensor by tensor in its own type, and what no step puts on a
grid is stored as there: against the headers of the files, read by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_tasks import tiny_task

import workbench as wb
from workbench.compress import compress
from workbench.export import load
from workbench.measure.card import speed_words
from workbench.measure.size import counted_sizes, given_sizes, sizes
from workbench.modules.checkpoint_types import checkpoint_types, is_exact, main_type
from workbench.zoo import load_task

WIDTH = {"F32": 4, "BF16": 2, "F16": 2}
COUNTS = {"evaluation_items": 8, "calibration_items": 8, "training_items": 8}


def header(path: Path) -> dict[str, tuple[str, int]]:
    """Return (type, bytes) of every tensor of a safetensors file, from its first bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    listed = json.loads(data[8 : 8 + length])
    return {
        name: (about["dtype"], about["data_offsets"][1] - about["data_offsets"][0])
        for name, about in listed.items()
        if name != "__metadata__"
    }


def decoder(folder: Path, dtype: torch.dtype, *, tied: bool = True) -> Path:
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(3)
    config = OlmoConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    OlmoForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny_models.tokenizer_files(folder)
    return folder


def widen(folder: Path, pick) -> None:
    """Store some of a file's tensors in float32: a checkpoint of mixed types."""
    weights = load_file(folder / "model.safetensors")
    widened = {name: tensor.float() if pick(name) else tensor for name, tensor in weights.items()}
    save_file(widened, folder / "model.safetensors", metadata={"format": "pt"})


def bench(folder: Path, tmp_path: Path) -> wb.Bench:
    text = tiny_models.words_file(tmp_path / "words.txt")
    ledger = tmp_path / "points.journal"
    return wb.Bench(
        str(folder), str(text), device="cpu", context_length=16, progress=False, ledger=ledger, **COUNTS
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_the_dense_size_is_that_of_the_file(tmp_path, dtype, tied):
    folder = decoder(tmp_path / "model", dtype, tied=tied)
    setting = bench(folder, tmp_path).setting
    file = folder / "model.safetensors"
    data = sum(count for _, count in header(file).values())
    assert ("lm_head.weight" in header(file)) is not tied
    assert setting.dense_sizes().packed_bytes == data
    assert abs(setting.dense_sizes().file_bytes - file.stat().st_size) <= 64  # of the header
    assert main_type(setting.task.model) == torch.float32
    said = [note for note in setting.task.notes if "runs in float32" in note]
    assert bool(said) is (dtype != torch.float32)


def test_a_file_of_several_types_is_counted_tensor_by_tensor(tmp_path):
    folder = decoder(tmp_path / "model", torch.bfloat16)
    before = sum(count for _, count in header(folder / "model.safetensors").values())
    widen(folder, lambda name: "norm" in name or name.endswith("1.mlp.up_proj.weight"))
    listed = header(folder / "model.safetensors")
    data = sum(count for _, count in listed.values())
    assert data > before
    task = bench(folder, tmp_path).task
    assert given_sizes(task.model).packed_bytes == data
    types = checkpoint_types(task.model)
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    assert {name: names[types[name]] for name in listed} == {name: kind for name, (kind, _) in listed.items()}


RECIPES = {
    "dense": wb.Recipe(),
    "pruned": wb.Recipe(wb.Prune(sparsity=0.5)),
    "solved": wb.Recipe(wb.Prune(sparsity=0.75, criterion="sparsegpt")),
    "low rank": wb.Recipe(wb.LowRank(rank_ratio=0.4)),
    "4 bits": wb.Recipe(wb.Quantize(weight_bits=4)),
    "all": wb.Recipe(
        wb.LowRank(rank_ratio=0.4, targets=("*mlp*",)), wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3)
    ),
    "trained": wb.Recipe(wb.Prune(sparsity=0.5), wb.Distill(temperature=2.0, steps=2)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_on_no_grid_is_stored_as_in_the_file_and_comes_back_bit_for_bit(tmp_path, name):
    folder = decoder(tmp_path / "model", torch.bfloat16)
    opened = bench(folder, tmp_path)
    out = opened.export(RECIPES[name], tmp_path / "out")
    point = opened.measure(RECIPES[name])
    assert (out / "model.safetensors").stat().st_size == point.sizes.file_bytes
    stored = header(out / "model.safetensors")
    sides = (".scale", ".codes", ".mask", ".zero_point")
    assert {kind for key, (kind, _) in stored.items() if not key.endswith(sides)} <= {"BF16"}
    compressed = opened.compress(RECIPES[name])
    loaded, state = load(out).state_dict(), compressed.model.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    grids = {layer.parameter.data_ptr() for layer in compressed.layers if layer.grid is not None}
    assert all(
        is_exact(tensor, torch.bfloat16) for tensor in state.values() if tensor.data_ptr() not in grids
    )
    assert counted_sizes(compressed.model, compressed.layers).file_bytes <= point.sizes.file_bytes * 1.02
    guess = opened.predictor().predict(RECIPES[name])
    assert point.sizes.file_bytes <= guess.file_bytes
    if guess.bytes_exact:
        assert guess.file_bytes == point.sizes.file_bytes


def test_a_recipe_that_changes_nothing_is_as_large_as_the_file(tmp_path):
    point = bench(decoder(tmp_path / "model", torch.bfloat16), tmp_path).measure(wb.Recipe())
    assert point.shrink == pytest.approx(1.0, abs=0.001)
    assert point.latency is not None
    assert point.latency.dense_type == "float32"
    assert "as fast as dense in float32" in speed_words(point)


def test_numbers_that_the_type_of_the_file_does_not_hold_stay_wide():
    task = tiny_task("llama", dtype=torch.bfloat16)
    task.model.float()
    from workbench.modules.checkpoint_types import note_given

    note_given(task.model, dict.fromkeys(task.model.state_dict(), torch.bfloat16))
    narrow = sizes(task.model).packed_bytes
    with torch.no_grad():
        task.model.model.norm.weight.add_(1e-5)
    assert sizes(task.model).packed_bytes == narrow + 2 * task.model.model.norm.weight.numel()


def test_a_model_handed_over_in_memory_counts_as_it_is():
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        task = tiny_task("llama", dtype=dtype)
        count = sum(parameter.numel() for parameter in task.model.parameters())
        assert given_sizes(task.model).packed_bytes == width * count
        assert checkpoint_types(task.model) == {}
        compressed = compress(task, wb.Recipe(wb.LowRank(rank_ratio=0.4)))
        assert {tensor.dtype for tensor in compressed.model.parameters()} == {dtype}


def test_the_same_numbers_in_another_type_of_file_are_another_model(tmp_path):
    narrow = decoder(tmp_path / "narrow", torch.bfloat16)
    wide = decoder(tmp_path / "wide", torch.bfloat16)
    widen(wide, lambda _: True)
    text = str(tiny_models.words_file(tmp_path / "words.txt"))
    narrow_task, wide_task = (
        load_task(folder, text, context=16, progress=False) for folder in (narrow, wide)
    )
    assert torch.equal(narrow_task.model.lm_head.weight, wide_task.model.lm_head.weight)
    assert narrow_task.model_fingerprint != wide_task.model_fingerprint
