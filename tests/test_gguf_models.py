"""A model in one GGUF file: dequantized to what a loop over its blocks gives, and counted as that file."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import tiny_models
import torch

from workbench.errors import ModelError
from workbench.measure.size import given_sizes
from workbench.zoo import gguf_models, load_task

HIDDEN, INNER, WORDS = 32, 64, 64


def q8_0(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks of 32 numbers as llama.cpp stores them (scale, 32 bytes), and what they mean."""
    rows, meaning = [], []
    for row in matrix:
        blocks, numbers = [], []
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            scale = np.float16(np.abs(block).max() / 127)
            codes = np.clip(np.round(block / np.float32(scale)), -127, 127).astype(np.int8)
            blocks.append(scale.tobytes() + codes.tobytes())
            numbers.extend(np.float32(scale) * codes.astype(np.float32))
        rows.append(np.frombuffer(b"".join(blocks), np.uint8))
        meaning.append(numbers)
    return np.stack(rows), np.array(meaning, np.float32)


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    folder = tmp_path / "model"
    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / "tiny.Q8_0.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    tokens = ["<unk>", "<s>", "</s>", "Ġ", "Ċ", *"0123456789w", "Ġw"]
    tokens += [f"<x{i}>" for i in range(WORDS - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges(["Ġ w"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    meaning = {}
    shapes = {
        "token_embd": (WORDS, HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN, HIDDEN),
        "blk.0.attn_v": (HIDDEN, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    for name, shape in shapes.items():
        blocks, meaning[name] = q8_0(generator.normal(size=shape).astype(np.float32))
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.Q8_0.gguf", meaning


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_file_or_its_folder_is_dequantized_once_and_counted_as_itself(written, by, tmp_path):
    path, meaning = written
    text = str(tiny_models.words_file(tmp_path / "t.txt"))
    given = path if by == "file" else path.parent
    task = load_task(given, text, context=16, progress=False)
    state = task.model.state_dict()
    for name, key in (
        ("token_embd", "model.embed_tokens"),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
    ):
        assert torch.equal(state[f"{key}.weight"], torch.from_numpy(meaning[name]))
    assert given_sizes(task.model).packed_bytes == path.stat().st_size
    assert any("GGUF file tiny.Q8_0.gguf" in note for note in task.notes)
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    load_task(given, text, context=16, progress=False)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")} == first


def test_several_files_parts_and_no_gguf_are_refused_by_name(tmp_path):
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a.Q4_0.gguf", "b.Q8_0.gguf"):
        (folder / name).write_bytes(b"GGUF")
    with pytest.raises(
        ModelError, match=r"holds 2 GGUF files \(a.Q4_0.gguf, b.Q8_0.gguf\): give the path of one"
    ):
        load_task(folder)
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a part of a model: join the parts"):
        load_task(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelError, match=r"a.Q4_0.gguf cannot be converted"):
        load_task(folder / "a.Q4_0.gguf")


def test_a_folder_with_another_model_beside_is_that_model(tmp_path):
    model = tiny_models.llama(tmp_path / "llama")
    (model / "extra.gguf").write_bytes(b"GGUF")
    assert gguf_models.gguf_file(model) is None
