"""Model, data, device and items as traits; loading with progress; giving up."""

from __future__ import annotations

import gc
import threading
import time

import pytest

import workbench as wb
from widgets.explorer import Explorer
from widgets.form.model_picker import OTHER, ModelPicker, data_names, local_folders
from widgets.session.load_progress import LoadProgress, words
from widgets.session.model_choice import ModelChoice
from widgets.session.session import Session
from workbench.util.device import choices
from workbench.zoo import download_progress, models


@pytest.fixture
def picker():
    return ModelPicker(ModelChoice("fashion-vit"))


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_the_catalogue_is_offered_and_a_hub_id_can_be_typed(picker):
    assert list(picker.model.options) == [*(entry.name for entry in models()), OTHER]
    seen = []
    picker.observe(lambda change: seen.append(change["new"]), "choice")
    picker.model.value = "fashion-cnn"
    picker.model.value = OTHER  # nothing is typed yet
    assert seen == [ModelChoice("fashion-cnn")]
    assert picker.fold.layout.display is None
    picker.other.value = "owner/name"
    assert seen[-1] == ModelChoice("owner/name")
    assert not picker.other.continuous_update
    picker.model.value = "fashion-vit"
    assert seen[-1] == ModelChoice("fashion-vit")
    assert picker.other.value == ""


def test_data_device_and_items_are_part_of_the_choice_and_another_model_brings_its_own_data(picker):
    picker.data.value = "pictures/"
    picker.items.value = 64
    picker.device.value = "cpu"
    assert picker.choice == ModelChoice("fashion-vit", "pictures/", "cpu", 64)
    picker.model.value = "fashion-cnn"
    assert picker.choice == ModelChoice("fashion-cnn", None, "cpu", 64)
    picker.items.value = 0
    assert picker.choice.evaluation_items is None


def test_put_shows_without_reacting(picker):
    picker.put(ModelChoice("owner/name", "some/data", "cuda:7", 5))
    assert (
        picker.model.value,
        picker.other.value,
        picker.data.value,
        picker.device.value,
        picker.items.value,
    ) == (OTHER, "owner/name", "some/data", "cuda:7", 5)
    picker.put(ModelChoice("fashion-vit"))
    assert (picker.model.value, picker.device.value, picker.data.value) == ("fashion-vit", "auto", "")


def test_data_names_are_those_of_the_task():
    listed = {entry.name: entry for entry in models()}
    assert data_names(listed["fashion-vit"]) == ("fashion-mnist-slice",)
    assert data_names(listed["smollm2-135m"]) == ("python-docs", "wikitext-2")
    assert data_names(listed["all-MiniLM-L6-v2"]) == ("wordsim353", "sts-b")
    assert data_names(listed["whisper-tiny.en"]) == ("asterisk-prompts",)
    assert set(data_names(None)) == {
        "fashion-mnist-slice",
        "python-docs",
        "wikitext-2",
        "wordsim353",
        "sts-b",
        "asterisk-prompts",
    }


def test_folders_with_a_model_complete(tmp_path, monkeypatch):
    for name in ("a", "b/c", "no/weights"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "a" / "model.safetensors").touch()
    (tmp_path / "b" / "c" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    assert local_folders(Path()) == ("./a", "./b/c")


def test_devices_begin_with_auto_and_the_cpu():
    names = [name for _, name in choices()]
    assert names[:2] == ["auto", "cpu"]
    assert all(name.startswith("cuda:") for name in names[2:])


def test_what_has_arrived_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "x.incomplete").write_bytes(b"12345")
    assert download_progress.arrived_bytes("owner/name") == 5
    assert download_progress.arrived_bytes("fashion-vit") == 0
    assert download_progress.arrived_bytes("./folder") == 0
    assert download_progress.content(tmp_path / "nothing") == 0


def test_load_progress_counts_what_is_fetched_and_ends(monkeypatch):
    monkeypatch.setattr("widgets.session.load_progress.PAUSE_SECONDS", 0.01)
    shown, bytes_here = [], iter(range(1_000_000, 90_000_000, 1_000_000))
    progress = LoadProgress(shown.append, lambda _name: next(bytes_here))
    progress.start("<m>")
    assert until(lambda: any("fetched" in text for text in shown))
    progress.stop()
    assert shown[-1] == ""
    count = len(shown)
    time.sleep(0.1)
    assert len(shown) == count
    assert words("<m>", 3.2, 0) == "loading &lt;m&gt;: 3 s"


def test_giving_up_leaves_the_old_model_and_a_late_one_never_shows(tmp_path, monkeypatch):
    entered, go = threading.Event(), threading.Event()
    loaded = []
    session = Session(ledger=tmp_path / "points.journal", offline=True, progress=False)
    session.on_loaded.subscribe(lambda: loaded.append(session.choice))
    for signal in (session.on_error, session.on_load_error):
        signal.subscribe(pytest.fail)
    first = ModelChoice("fashion-cnn", device="cpu", evaluation_items=32)
    session.loader.load_now(first)
    make = wb.Bench

    def slow(*args, **kwargs):
        entered.set()
        go.wait(20)
        return make(*args, **kwargs)

    monkeypatch.setattr("widgets.session.model_loader.Bench", slow)
    session.load(ModelChoice("fashion-vit", device="cpu", evaluation_items=32))
    assert entered.wait(20)
    session.loader.give_up()
    assert not session.loader.busy
    assert session.run(wb.Recipe(wb.Quantize(weight_bits=8))).context.model_name == "fashion-cnn"
    go.set()
    second = ModelChoice("fashion-cnn", device="cpu", evaluation_items=16)
    session.loader.load_now(second)
    assert loaded == [first, second]
    assert session.bench.task.model_name == "fashion-cnn"
    session.close()


def test_what_is_loaded_is_not_looked_at_for_garbage_in_the_middle_of_a_move_and_closing_ends_that(tmp_path):
    session = Session(ledger=tmp_path / "points.journal", offline=True, progress=False)
    for signal in (session.on_error, session.on_load_error):
        signal.subscribe(pytest.fail)
    try:
        session.loader.load_now(ModelChoice("fashion-cnn", device="cpu", evaluation_items=16))
        session.run(wb.Recipe())
        frozen = gc.get_freeze_count()
        assert frozen > 100_000  # torch and transformers are among them
        assert not any(tracked is session.bench for tracked in gc.get_objects())
        session.loader.load_now(ModelChoice("fashion-cnn", device="cpu", evaluation_items=16))
        session.run(wb.Recipe())
        assert gc.get_freeze_count() < 1.5 * frozen  # the first model was let go of
    finally:
        session.close()
    assert gc.get_freeze_count() == 0


def test_the_panel_loads_what_is_picked_and_goes_back_with_the_reason(tmp_path):
    panel = Explorer(
        "fashion-cnn", ledger=tmp_path / "points.journal", evaluation_items=64, offline=True, device="cpu"
    )
    panel.run(wb.Recipe())
    panel.picker.items.value = 32
    assert until(lambda: panel.session.choice == ModelChoice("fashion-cnn", None, "cpu", 32))
    assert panel.run(wb.Recipe(wb.Quantize(weight_bits=8))).items_total == 32
    panel.picker.data.value = "no-such-data"
    assert until(lambda: panel.picker.choice == panel.session.choice)
    panel.pacer.flush()
    assert "no-such-data" in panel.errors.value
    assert panel.picker.data.value == ""
    assert panel.picker.loading.layout.display == "none"
    assert panel.run(wb.Recipe(wb.Quantize(weight_bits=6))).items_total == 32
    panel.close()
