"""What reads a GGUF file comes with the workbench's own dependencies, without any extra."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def closure() -> set[str]:
    """Return the distributions that a plain install brings, themselves and what they need."""
    waiting = [
        Requirement(line)
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    found: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        if name in found and not wanted.extras:
            continue
        found.add(name)
        for line in needs:
            need = Requirement(line)
            if need.marker is None or any(
                need.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)
            ):
                waiting.append(need)
    return found


def plain_site(folder: Path) -> Path:
    """Make a folder of packages that holds what a plain install brings, and nothing else."""
    folder.mkdir()
    for name in closure():
        for file in metadata.distribution(name).files or []:
            link = folder / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(
                    Path(str(file.locate())).absolute().parents[len(file.parts) - 1] / file.parts[0]
                )
    return folder


# Reads a GGUF file in a process that sees nothing of what a plain install does not bring
READ = """
import sys
from pathlib import Path

import gguf, numpy as np

folder = Path(sys.argv[1])
writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
writer.add_context_length(64); writer.add_embedding_length(32); writer.add_block_count(1)
writer.add_feed_forward_length(64); writer.add_head_count(2); writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5); writer.add_rope_freq_base(10000.0); writer.add_vocab_size(64)
writer.add_tokenizer_model("gpt2"); writer.add_tokenizer_pre("smollm")
words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 93)), "AB"]
writer.add_token_list(words); writer.add_token_types([3, 3, 3] + [1] * 61); writer.add_token_merges(["A B"])
writer.add_bos_token_id(1); writer.add_eos_token_id(2)
made = np.random.default_rng(0)
shapes = {"token_embd.weight": (64, 32), "output_norm.weight": (32,), "output.weight": (64, 32)}
for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
    shapes[f"blk.0.{name}.weight"] = (32, 32)
for name, shape in {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}.items():
    shapes[f"blk.0.{name}.weight"] = shape
for name in ("attn_norm", "ffn_norm"):
    shapes[f"blk.0.{name}.weight"] = (32,)
gate = None
for name, shape in shapes.items():
    value = made.standard_normal(shape).astype(np.float32)
    if len(shape) == 2 and name != "token_embd.weight":
        packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q4_1)
        gate = packed if "gate" in name else gate
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    else:
        writer.add_tensor(name, value)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()

from transformers.utils import is_accelerate_available, is_gguf_available
from workbench.hub.wheel_archive import convert_gguf

assert is_gguf_available() and is_accelerate_available()  # what transformers itself asks
(folder / "model").mkdir()
convert_gguf(folder / "tiny.gguf", folder / "model")
from safetensors.numpy import load_file
weights = load_file(folder / "model" / "model.safetensors")
gate = gguf.quants.dequantize(gate, gguf.GGMLQuantizationType.Q4_1)
assert np.array_equal(weights["model.layers.0.mlp.gate_proj.weight"], gate)
print(weights["model.embed_tokens.weight"].shape)
"""


def test_a_plain_install_reads_a_gguf_file(tmp_path):
    plain = closure()
    assert {"torch", "transformers", "gguf", "accelerate", "psutil"} <= plain
    assert not {"pytest", "ruff", "hypothesis", "mypy"} & plain
    site = plain_site(tmp_path / "site")
    ended = subprocess.run(
        [sys.executable, "-S", "-c", READ, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT)))},
    )
    assert ended.returncode == 0, ended.stderr
    assert "(64, 32)" in ended.stdout
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_without_accelerate_transformers_refuses_in_words_that_the_user_sees(tmp_path, monkeypatch):
    from workbench.errors import ModelError
    from workbench.hub.wheel_archive import convert_gguf

    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: False)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"x\.gguf cannot be converted"):
        convert_gguf(tmp_path / "x.gguf", tmp_path)
