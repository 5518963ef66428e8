"""A model's folder is read from within, and nothing that it asks for is fetched or run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

import workbench as wb
from workbench.bench import Bench
from workbench.errors import ExportError, ModelError
from workbench.export import check_target
from workbench.recipe import Recipe
from workbench.tasks.registry import KINDS
from workbench.zoo import load_task, local

SMALL = {"evaluation_items": 4, "calibration_items": 4, "training_items": 4, "context": 16}


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_models.llama(tmp_path / "model")


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(" ".join(f"w{(7 * i + j) % 60}" for j in range(12)) for i in range(200)))
    return str(path)


def change(path: Path, **values) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def load(folder: Path, text: str):
    return load_task(str(folder), text, progress=False, **SMALL)


# --- links and indexes


def outside(tmp_path: Path, path: Path) -> Path:
    """Move a file out of its folder, with a link in its place."""
    target = tmp_path / "elsewhere" / path.name
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    path.symlink_to(target)
    return target


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, model, text, name):
    target = outside(tmp_path, model / name)
    with pytest.raises(ModelError, match=rf"{name} leads out of its folder, to {target}: it is not read"):
        load(model, text)


@pytest.mark.parametrize("name", ["normalizer.json", "chat_template.jinja", "vocab.txt", "pytorch_model.bin"])
def test_nor_is_one_that_would_only_be_taken_along(tmp_path, model, text, name):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (model / name).symlink_to(os.path.relpath(secret, model))
    with pytest.raises(ModelError, match=rf"{name} leads out of its folder"):
        load(model, text)


def test_nor_a_folder_that_is_a_link(tmp_path, model, text):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (model / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="1_Pooling/config.json leads out of its folder"):
        load(model, text)


def test_links_within_the_folder_and_other_files_do_no_harm(tmp_path, model, text):
    (model / "model.safetensors").rename(model / "weights.bytes")
    (model / "model.safetensors").symlink_to("weights.bytes")
    (model / "logs").symlink_to(tmp_path)
    (model / "notes.md").symlink_to("/etc/hostname")
    assert load(model, text).model_name == str(model)


def test_the_hubs_own_cache_is_read_and_one_made_like_it_is_not(tmp_path, model, text):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(model.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert load(snapshot, text).model_name == str(snapshot)
    blobs.rename(tmp_path / "secrets")
    blobs.symlink_to(tmp_path / "secrets")
    with pytest.raises(ModelError, match="leads out of its folder"):
        load(snapshot, text)


ELSEWHERE = [
    "../stolen.safetensors",
    "a/../../stolen.safetensors",
    "{absolute}",
    "..\\stolen.safetensors",
    "C:\\stolen.safetensors",
    "\\\\host\\share\\stolen.safetensors",
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_names_files_of_its_folder_alone(tmp_path, text, name):
    model = tiny_models.llama(tmp_path / "model", max_shard_size="4KB")
    index = model / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    assert len(set(weights.values())) > 1
    assert load(model, text).model_name == str(model)
    first = next(iter(weights))
    stolen = tmp_path / "stolen.safetensors"
    shutil.copy(model / weights[first], stolen)
    change(index, weight_map={**weights, first: name.format(absolute=stolen)})
    with pytest.raises(ModelError, match="which is no file of its folder"):
        load(model, text)


def test_an_index_does_not_lead_out_through_a_folder_that_is_a_link(tmp_path, text):
    model = tiny_models.llama(tmp_path / "model", max_shard_size="4KB")
    index = model / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    first = next(iter(weights))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(model / weights[first], tmp_path / "elsewhere" / "stolen.safetensors")
    (model / "more").symlink_to(tmp_path / "elsewhere")
    change(index, weight_map={**weights, first: "more/stolen.safetensors"})
    with pytest.raises(ModelError, match="more/stolen.safetensors leads out of its folder"):
        load(model, text)


def test_a_pickle_is_never_opened(tmp_path, model, text):
    (model / "model.safetensors").unlink()
    torch.save({"run": torch.zeros(1)}, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only as a pickle"):
        load(model, text)


# --- keys that fetch code


@pytest.fixture
def no_kernel(monkeypatch):
    """Let every way to a kernel of a hub end the test."""
    from transformers.integrations import hub_kernels

    for name in ("get_kernel", "load_and_register_attn_kernel", "lazy_load_kernel"):
        monkeypatch.setattr(hub_kernels, name, lambda *_, **__: pytest.fail("a kernel was asked for"))


KERNELS = [
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel@main:attention"},
    {"_attn_implementation_internal": "evil/kernel"},
    {"attn_implementation": "paged|evil/kernel"},
    {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
    {"experts_implementation": "evil/kernel"},
    {"_experts_implementation": {"": "evil/kernel"}},
    {"text_config": {"attn_implementation": "evil/kernel"}},
    {"parts": [{"deep": {"_attn_implementation": "evil/kernel"}}]},
    {"attribute_map": {"innocent": "_attn_implementation"}, "innocent": "evil/kernel"},
    {"transformers_weights": "../../other.safetensors"},
]


@pytest.mark.parametrize("keys", KERNELS, ids=str)
@pytest.mark.parametrize("offline", [True, False])
def test_a_configuration_that_asks_for_code_is_refused(model, text, no_kernel, keys, offline):
    change(model / "config.json", **keys)
    with pytest.raises(ModelError, match="the workbench never fetches or runs it") as caught:
        load_task(str(model), text, progress=False, offline=offline, **SMALL)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="never fetches or runs it"):
        local.load_model(model, KINDS.of({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))


@pytest.mark.parametrize("value", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_what_another_package_would_compute_is_left_out_with_a_note(model, text, no_kernel, key, value):
    plain = load(model, text)
    change(model / "config.json", **{key: value})
    task = load(model, text)
    assert any(f"config.json asks for {key}='{value}', which is left out" in note for note in task.notes)
    assert not any("left out" in note for note in plain.notes)
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(task.model(tokens).logits, plain.model(tokens).logits)


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_what_transformers_has_itself_may_be_asked_for(model, text, value):
    change(model / "config.json", attn_implementation=value)
    assert not any("left out" in note for note in load(model, text).notes)


CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.mark.parametrize("offline", [True, False])
def test_code_that_comes_with_a_known_model_is_not_run_and_that_is_said(tmp_path, model, text, offline):
    marker = tmp_path / "was run"
    for name in ("modeling_evil", "tokenization_evil"):
        (model / f"{name}.py").write_text(CODE.format(marker=str(marker)))
    change(
        model / "config.json",
        auto_map={"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
    )
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    task = load_task(str(model), text, progress=False, offline=offline, **SMALL)
    (note,) = [note for note in task.notes if "code of its own" in note]
    assert "auto_map in config.json, tokenizer_config.json" in note
    assert not marker.exists()


def test_a_tokenizer_that_is_code_alone_is_refused_in_one_line(tmp_path, model, text):
    marker = tmp_path / "was run"
    (model / "tokenization_evil.py").write_text(CODE.format(marker=str(marker)))
    change(
        model / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
    )
    with contextlib.suppress(ModelError):  # unless tokenizer.json is enough
        load(model, text)
    assert not marker.exists()


def test_other_models_that_a_processor_names_are_not_fetched(model, text):
    change(model / "processor_config.json", audio_tokenizer={"audio_tokenizer_name_or_path": "evil/model"})
    with pytest.raises(ModelError, match="audio_tokenizer=.*which is another model"):
        load(model, text)


@pytest.mark.parametrize(
    "keys",
    [
        {"architecture": "hf-hub:evil/model"},
        {"architecture": "resnet18", "model_args": {"checkpoint_path": "/x.pth"}},
    ],
)
def test_a_model_of_timm_is_made_of_its_own_folder(model, text, keys):
    change(
        model / "config.json",
        model_type="timm_wrapper",
        architectures=["TimmWrapperForImageClassification"],
        **keys,
    )
    with pytest.raises(ModelError, match="never fetches or runs it"):
        load(model, text)


# --- exports


@pytest.fixture
def exported(tmp_path, model, text) -> Path:
    bench = Bench(
        str(model),
        text,
        device="cpu",
        ledger=tmp_path / "l.journal",
        progress=False,
        evaluation_items=4,
        calibration_items=4,
        training_items=4,
        context_length=16,
    )
    return bench.export(Recipe(wb.Quantize(weight_bits=8)), tmp_path / "out")


def test_an_export_is_read_from_its_folder_alone_and_asks_for_no_code(tmp_path, exported, no_kernel):
    wb.load(exported)
    assert not [path for path in exported.rglob("*") if path.is_symlink()]
    config = (exported / "config.json").read_text()
    for keys in KERNELS:
        change(exported / "config.json", **keys)
        with pytest.raises(ExportError, match="never fetches or runs it"):
            wb.load(exported)
        (exported / "config.json").write_text(config)
    for name in ("model.safetensors", "compression.json", "config.json", "generation_config.json"):
        place = exported / name
        content = place.read_bytes() if place.exists() else b"{}"
        place.unlink(missing_ok=True)
        (tmp_path / "stolen").write_bytes(content)
        place.symlink_to(tmp_path / "stolen")
        with pytest.raises(ExportError, match=f"{name} leads out of its folder"):
            wb.load(exported)
        place.unlink()
        place.write_bytes(content)
    wb.load(exported)


def dead() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def left(tmp_path: Path, name: str, process: int | str, host: str | None = None, end: str = "") -> Path:
    folder = tmp_path / f".{name}.workbench-{host or socket.gethostname()}-{process}-a1b2c3d4{end}"
    folder.mkdir()
    (folder / "compression.json").write_text("{}")
    return folder


@pytest.mark.skipif(os.name != "posix", reason="whether a process lives is told by POSIX")
def test_what_killed_exports_left_is_cleaned_and_nothing_else(tmp_path):
    out, gone = tmp_path / "out", dead()
    ours = [left(tmp_path, "out", gone), left(tmp_path, "out", gone, end="-old")]
    out.mkdir()
    others = [
        left(tmp_path, "out", os.getpid()),
        left(tmp_path, "out", 1),
        left(tmp_path, "out", gone, "another-machine"),
        left(tmp_path, "out2", gone),
        left(tmp_path, "out", "x"),
    ]
    (tmp_path / ".out-abcdefgh").mkdir()
    (tmp_path / "real").mkdir()
    link = tmp_path / f".out.workbench-{socket.gethostname()}-{gone}-00000000"
    link.symlink_to(tmp_path / "real")
    check_target(out, overwrite=False)
    assert not any(folder.exists() for folder in ours)
    assert all(folder.exists() for folder in [*others, tmp_path / ".out-abcdefgh", tmp_path / "real", link])


@pytest.mark.skipif(os.name != "posix", reason="whether a process lives is told by POSIX")
def test_an_earlier_export_that_was_being_replaced_comes_back(tmp_path):
    gone = dead()
    left(tmp_path, "out", gone, end="-old")
    new = left(tmp_path, "out", gone)
    with pytest.raises(ExportError, match="holds an earlier export"):
        check_target(tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "compression.json").is_file()
    assert not new.exists()


KILLED = """
import os, signal, sys
import workbench.export as export
export.verify = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
import workbench as wb
bench = wb.Bench("fashion-cnn", device="cpu", ledger=sys.argv[1], evaluation_items=16, progress=False)
bench.export(wb.Recipe(), sys.argv[2])
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_an_export_that_is_killed_leaves_nothing_after_the_next(tmp_path):
    out = tmp_path / "exports" / "out"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "l.journal"), str(out)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    (side,) = out.parent.iterdir()
    assert side.name.startswith(".out.workbench-")
    command[2] = KILLED.replace("export.verify =", "unused =")
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert list(out.parent.iterdir()) == [out]
