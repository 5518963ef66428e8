"""Whisper from CTranslate2's file: the same bits under other names, a repaired tokenizer, and what is
refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import speech_models
import torch

from workbench.errors import ModelError
from workbench.hub import ctranslate2
from workbench.tasks import score
from workbench.zoo import load_task


def ct2_file(model, path) -> None:
    """Write a Whisper as CTranslate2 does: fused projections, a zero bias for keys."""
    state = {name: tensor.half().numpy() for name, tensor in model.state_dict().items()}
    variables: dict[str, np.ndarray] = {
        "encoder/num_heads": np.array(2, np.int16),
        "decoder/num_heads": np.array(2, np.int16),
        "decoder/alignment_heads": np.zeros((1, 2), np.int32),
    }
    for side, depth in (("encoder", 1), ("decoder", 2)):
        for i in range(depth):
            a, b = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            norms = {"self_attention": "self_attn_layer_norm", "ffn": "final_layer_norm"} | (
                {"attention": "encoder_attn_layer_norm"} if side == "decoder" else {}
            )
            for block, norm in norms.items():
                variables |= {
                    f"{b}/{block}/layer_norm/{new}": state[f"{a}.{norm}.{old}"]
                    for old, new in (("weight", "gamma"), ("bias", "beta"))
                }
            zero = np.zeros(16, np.float16)
            for kind in ("weight", "bias"):
                projections = [state.get(f"{a}.self_attn.{n}_proj.{kind}", zero) for n in "qkv"]
                variables[f"{b}/self_attention/linear_0/{kind}"] = np.concatenate(projections)
                variables[f"{b}/self_attention/linear_1/{kind}"] = state[f"{a}.self_attn.out_proj.{kind}"]
                variables |= {f"{b}/ffn/linear_{j}/{kind}": state[f"{a}.fc{j + 1}.{kind}"] for j in (0, 1)}
                if side == "decoder":
                    variables[f"{b}/attention/linear_0/{kind}"] = state[f"{a}.encoder_attn.q_proj.{kind}"]
                    variables[f"{b}/attention/linear_1/{kind}"] = np.concatenate(
                        [state.get(f"{a}.encoder_attn.{n}_proj.{kind}", zero) for n in "kv"]
                    )
                    variables[f"{b}/attention/linear_2/{kind}"] = state[f"{a}.encoder_attn.out_proj.{kind}"]
        variables |= {
            f"{side}/layer_norm/{new}": state[f"model.{side}.layer_norm.{old}"]
            for old, new in (("weight", "gamma"), ("bias", "beta"))
        }
        variables[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
    variables |= {
        f"encoder/conv{j}/{kind}": state[f"model.encoder.conv{j}.{kind}"]
        for j in (1, 2)
        for kind in ("weight", "bias")
    }
    variables["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    text = lambda word: struct.pack("<H", len(word) + 1) + word.encode() + b"\0"  # noqa: E731
    kinds = {np.dtype(np.float16): 4, np.dtype(np.int16): 2, np.dtype(np.int32): 3}
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        content += (
            text(name)
            + struct.pack("<B", array.ndim)
            + b"".join(struct.pack("<I", size) for size in array.shape)
        )
        content += struct.pack("<BI", kinds[array.dtype], array.nbytes) + array.tobytes()
    path.write_bytes(content)


@pytest.fixture
def ct2(tmp_path):
    model = speech_models.tiny_whisper()
    folder = tmp_path / "ct2"
    folder.mkdir()
    ct2_file(model, folder / "model.bin")
    (folder / "config.json").write_text(
        json.dumps(
            {"suppress_ids": [5], "suppress_ids_begin": [0], "alignment_heads": [[1, 0]], "lang_ids": [2]}
        )
    )
    speech_models.word_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    return model, folder


def test_ctranslate2_becomes_the_same_model_bit_for_bit(ct2, tmp_path):
    from transformers import WhisperForConditionalGeneration

    model, folder = ct2
    (tmp_path / "out").mkdir()
    ctranslate2.convert_whisper(folder / "model.bin", tmp_path / "out")
    converted = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float16)
    expected = model.half().state_dict()
    assert converted.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state_dict().items())
    assert converted.generation_config.suppress_tokens == [5]
    assert converted.proj_out.weight is converted.model.decoder.embed_tokens.weight
    task = load_task(
        tmp_path / "out", speech_models.sounds(tmp_path / "d", speech_models.words(6)), progress=False
    )
    assert torch.isfinite(score(task.kind, task.model, task.evaluation).loss).all()


def test_a_merge_that_an_archive_lost_is_put_back():
    said = {
        "added_tokens": [{"content": "<|endoftext|>"}],
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3, "bb": 4, "<|endoftext|>": 5},
            "merges": ["ab b", ["b", "b"]],
        },
    }
    assert ctranslate2.with_all_merges(said)["model"]["merges"] == [["a", "b"], ["ab", "b"], ["b", "b"]]
    said["model"]["merges"] = ["a b", "b b"]
    with pytest.raises(ModelError, match="lacks the merges of 1 tokens, such as 'abb'"):
        ctranslate2.with_all_merges(said)


def test_ctranslate2_that_is_damaged_or_something_else(ct2, tmp_path):
    _, folder = ct2
    whole = (folder / "model.bin").read_bytes()
    (folder / "model.bin").write_bytes(whole[:-100])
    with pytest.raises(
        ModelError, match=r"model.bin is no CTranslate2 model, or is damaged: ValueError: the file ends after"
    ):
        ctranslate2.read(folder / "model.bin")
    (folder / "model.bin").write_bytes(whole.replace(b"encoder/conv1/weight", b"encoder/conv9/weight"))
    with pytest.raises(ModelError, match=r"has no tensor 'encoder/conv1/weight'|conv9"):
        ctranslate2.convert_whisper(folder / "model.bin", tmp_path)
