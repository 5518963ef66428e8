"""Tasks: which kind a config names, how answers are scored, how data become disjoint items, and what is
refused."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from workbench.errors import DataError, ModelError
from workbench.metrics.scores import Scores
from workbench.tasks import columns, data, score, sources
from workbench.tasks.base import Items
from workbench.tasks.ctc import FRAME_RECOGNITION
from workbench.tasks.data import ItemCounts, Reading
from workbench.tasks.fashion_mnist import SLICE
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION, PlainProcessor, grey_items
from workbench.tasks.language_modelling import LANGUAGE_MODELLING, window_items, windows
from workbench.tasks.registry import KINDS
from workbench.tasks.sentence_similarity import SENTENCE_SIMILARITY
from workbench.tasks.speech_recognition import SPEECH_RECOGNITION
from workbench.tasks.text_classification import TEXT_CLASSIFICATION

VIT = {
    "architectures": ["ViTForImageClassification"],
    "image_size": 8,
    "num_channels": 3,
    "id2label": {"0": "cat", "1": "dog"},
}
BERT = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "NEGATIVE", "1": "POSITIVE"}}


class Words:
    """A tokenizer of whole words, with the two calls that the tasks make."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text, *, max_length=None, **_):
        number = lambda word: self.ids.setdefault(word, len(self.ids) + 1)  # noqa: E731
        if isinstance(text, str):
            return {"input_ids": [number(word) for word in text.split()]}
        rows = [[number(word) for word in line.split()][:max_length] for line in text]
        if max_length is None:
            return {"input_ids": rows}
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Answers(nn.Module):
    """A model that gives fixed logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.fixed = logits

    def forward(self, **_):
        return SimpleNamespace(logits=self.fixed)


def texts(count: int) -> list[str]:
    return [f"word{i} and word{i + 1} again" for i in range(count)]


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def load(kind, config, named, *, sizes=(None, None, None), processor=None, **options):
    reading = Reading(config, processor or Words(), options.pop("context", None))
    return data.load(kind, reading, named, kind.sizes.limited(*sizes), progress=False, **options)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


# --- kinds


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("ViTForImageClassification", IMAGE_CLASSIFICATION),
        ("DeiTForImageClassificationWithTeacher", IMAGE_CLASSIFICATION),
        ("DistilBertForSequenceClassification", TEXT_CLASSIFICATION),
        ("Wav2Vec2ForCTC", FRAME_RECOGNITION),
        ("LlamaForCausalLM", LANGUAGE_MODELLING),
        ("GPT2LMHeadModel", LANGUAGE_MODELLING),
    ],
)
def test_kind_of_architecture(architecture, kind):
    assert KINDS.of({"architectures": [architecture]}) is kind


def test_kinds_that_the_class_name_alone_does_not_say():
    assert KINDS.of({"architectures": ["BertModel"], "model_type": "bert"}) is SENTENCE_SIMILARITY
    assert (
        KINDS.of(
            {
                "architectures": ["WhisperForConditionalGeneration"],
                "model_type": "whisper",
                "is_encoder_decoder": True,
            }
        )
        is SPEECH_RECOGNITION
    )


def test_kind_of_a_transformers_config():
    from transformers import ViTConfig

    assert KINDS.of(ViTConfig(architectures=["ViTForImageClassification"])) is IMAGE_CLASSIFICATION


def test_kind_of_model_type_alone_when_only_one_fits():
    assert KINDS.of({"model_type": "resnet"}) is IMAGE_CLASSIFICATION
    with pytest.raises(
        ModelError,
        match="names no architecture, and model type 'gpt2' can do text classification, language modelling",
    ):
        KINDS.of({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"]},
            "T5ForConditionalGeneration is for a task that the workbench does not run; it runs image",
        ),
        (
            {"architectures": ["LlamaModel"], "model_type": "llama"},
            "LlamaModel is for a task that the workbench does not run",
        ),
        (
            {"architectures": ["ViTModel"], "model_type": "vit"},
            "ViTModel is for a task that the workbench does not run",
        ),
        ({"architectures": ["BertLMHeadModel"], "is_encoder_decoder": True}, "does not run"),
        (
            {**BERT, "problem_type": "multi_label_classification"},
            "problem_type is 'multi_label_classification'",
        ),
    ],
)
def test_other_tasks_are_refused(config, message):
    with pytest.raises(ModelError, match=message):
        KINDS.of(config)


# --- scores


def test_score_of_classes_agrees_with_a_loop():
    logits, labels = (
        torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 3, 4, 0, 1]),
    )
    scores = score(IMAGE_CLASSIFICATION, Answers(logits), Items({"pixel_values": torch.zeros(7, 1)}, labels))
    for i in range(7):
        odds = np.exp(logits[i].double().numpy())
        assert scores.loss[i].item() == pytest.approx(-np.log(odds[labels[i]] / odds.sum()), rel=1e-5)
    assert scores.correct.tolist() == (logits.argmax(-1) == labels).double().tolist()
    assert scores.weight.tolist() == [1.0] * 7
    assert (scores.loss.dtype, scores.correct.dtype, scores.answers.dtype) == (
        torch.float64,
        torch.float64,
        torch.int64,
    )
    assert scores.answers.shape == (7,)


def test_score_of_windows_shifts_once_and_ignores_padding():
    ids = torch.tensor([[3, 1, 4, 1], [2, 0, 2, 0]])
    items = window_items(ids)
    assert items.labels.tolist() == [[1, 4, 1], [0, 2, 0]]
    items.labels[1, 2] = -100
    logits = torch.full((2, 4, 5), 0.0)
    # Right, right, wrong; right, wrong
    logits[0, 0, 1] = logits[0, 1, 4] = logits[0, 2, 2] = logits[1, 0, 0] = logits[1, 1, 1] = 20.0
    scores = score(LANGUAGE_MODELLING, Answers(logits), items)
    assert scores.weight.tolist() == [3.0, 2.0]
    assert scores.correct.tolist() == pytest.approx([2 / 3, 1 / 2])
    assert scores.loss.tolist() == pytest.approx([20 / 3, 20 / 2], rel=1e-4)
    assert scores.answers.shape == (2, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_destroyed_model_still_gets_a_number(bad):
    logits = torch.tensor([[bad, 0.0], [5.0, 0.0]])
    scores = score(
        TEXT_CLASSIFICATION, Answers(logits), Items({"input_ids": torch.zeros(2, 1)}, torch.tensor([0, 0]))
    )
    assert scores.loss[0] == torch.inf
    assert scores.correct.tolist() == [0.0, 1.0]
    assert scores.loss[1] < 0.01


@pytest.mark.parametrize("chunks", [{"CHUNK": 30}, {"CACHED": 30}, {"CHUNK": 70, "CACHED": 30}])
def test_reduction_by_chunks_changes_nothing(monkeypatch, chunks):
    import workbench.tasks

    logits, items = torch.randn(4, 9, 11), window_items(torch.randint(11, (4, 9)))
    whole = score(LANGUAGE_MODELLING, Answers(logits), items)
    for name, size in chunks.items():
        monkeypatch.setattr(workbench.tasks.likelihood, name, size)
    chunked = score(LANGUAGE_MODELLING, Answers(logits), items)
    assert torch.equal(whole.loss, chunked.loss)
    assert torch.equal(whole.answers, chunked.answers)


def test_scores_join():
    part = Scores(*(torch.ones(2) for _ in range(4)))
    assert len(Scores.join([part, part])) == 4


# --- items


def test_windows_do_not_overlap_and_drop_the_short_one():
    tokenizer = Words()
    ids = windows(["a b c", "d e", "f g"], tokenizer, context=3)
    assert ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert windows(["a b c d e f g"], tokenizer, context=3, limit=1).shape == (1, 3)


def test_grey_items_scale():
    items = grey_items(np.array([[[0, 255]]], np.uint8), np.array([1], np.uint8), mean=0.5, std=0.25)
    assert items.inputs["pixel_values"].tolist() == [[[[-2.0, 2.0]]]]
    assert items.labels.dtype == torch.int64


def test_plain_processor_resizes_and_scales():
    pixels = PlainProcessor(4, 6)([Image.new("RGB", (10, 10), (255, 0, 51))])["pixel_values"]
    assert pixels.shape == (1, 3, 4, 6)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


# --- data


def disjoint(loaded):
    held_out = set(loaded.evaluation.fingerprints)
    return not held_out & set(loaded.calibration.fingerprints) and not held_out & set(
        loaded.training.fingerprints
    )


def test_one_split_is_cut_in_three(tmp_path):
    path = write_csv(tmp_path / "reviews.csv", [(text, i % 2) for i, text in enumerate(texts(40))])
    loaded = load(TEXT_CLASSIFICATION, BERT, path, sizes=(None, 5, 10))
    assert (len(loaded.evaluation), len(loaded.calibration), len(loaded.training)) == (20, 5, 10)
    assert disjoint(loaded)
    assert loaded.labels == ("NEGATIVE", "POSITIVE")
    again = load(TEXT_CLASSIFICATION, BERT, path, sizes=(None, 5, 10))
    reseeded = load(TEXT_CLASSIFICATION, BERT, path, sizes=(None, 5, 10), seed=1)
    assert loaded.evaluation.fingerprint == again.evaluation.fingerprint != reseeded.evaluation.fingerprint


def test_copies_of_evaluation_items_are_dropped_and_counted(tmp_path):
    folder = tmp_path / "split"
    folder.mkdir()
    write_csv(folder / "train.csv", [(text, 0) for text in texts(30)])
    write_csv(folder / "test.csv", [(text, 1) for text in [*texts(5), *(f"new {i}" for i in range(20))]])
    loaded = load(TEXT_CLASSIFICATION, BERT, folder)
    assert len(loaded.evaluation) == 25
    assert disjoint(loaded)
    assert len(loaded.calibration) + len(loaded.training) == 25
    assert any(note.startswith("5 items of") and "dropped" in note for note in loaded.notes)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_reads_the_same(tmp_path, suffix):
    rows = [
        {"sentence": text, "label": "positive" if i % 3 else "Negative"} for i, text in enumerate(texts(40))
    ]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(rows).to_parquet(path)
    elif suffix in {".csv", ".tsv"}:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if suffix == ".csv" else "\t").writerows(
                [("sentence", "label"), *((row["sentence"], row["label"]) for row in rows)]
            )
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    loaded = load(TEXT_CLASSIFICATION, BERT, path)
    assert (
        int(loaded.evaluation.labels.sum() + loaded.calibration.labels.sum() + loaded.training.labels.sum())
        == 26
    )  # 40 less every third


def test_plain_text_becomes_windows(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(texts(400)))
    loaded = load(LANGUAGE_MODELLING, {"max_position_embeddings": 64}, path, sizes=(8, 4, 8), context=16)
    assert loaded.evaluation.inputs["input_ids"].shape == (8, 16)
    assert loaded.evaluation.labels.shape == (8, 15)
    assert disjoint(loaded)
    assert "windows of 16 tokens" in loaded.notes
    with pytest.raises(
        DataError, match="context=100: a window needs at least 2 tokens and at most the model's 64"
    ):
        load(LANGUAGE_MODELLING, {"max_position_embeddings": 64}, path, context=100)
    with pytest.raises(DataError, match="less text than one window of 5000 tokens"):
        load(LANGUAGE_MODELLING, {}, path, context=5000)


def test_python_docs_are_always_here():
    loaded = load(LANGUAGE_MODELLING, {}, sources.PYTHON_DOCS, sizes=(4, 2, 2), context=32)
    assert len(loaded.evaluation) == 4
    assert any("help pages of Python" in note for note in loaded.notes)


def test_default_text_falls_back_and_says_why():
    loaded = load(LANGUAGE_MODELLING, {}, None, sizes=(4, 2, 2), context=32, offline=True)
    assert loaded.name == "python-docs"
    assert any(
        "python-docs was used, since wikitext-2 cannot be fetched: offline was asked for" in note
        for note in loaded.notes
    )


def pictures(folder, names, count=8):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 10), (number * 100, i * 20, 7)).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_of_images(tmp_path):
    loaded = load(
        IMAGE_CLASSIFICATION, VIT, pictures(tmp_path / "pets", ["Cat", "dog"]), processor=PlainProcessor(8, 8)
    )
    assert loaded.evaluation.inputs["pixel_values"].shape == (8, 3, 8, 8)
    for items in (
        loaded.evaluation,
        loaded.calibration,
        loaded.training,
    ):  # red is 0 for cats, 100 / 255 for dogs
        assert (items.inputs["pixel_values"][:, 0, 0, 0] > 0).long().tolist() == items.labels.tolist()
    assert any("only 8 evaluation items" in note for note in loaded.notes)


def test_grey_models_get_grey_pictures(tmp_path):
    loaded = load(
        IMAGE_CLASSIFICATION,
        {**VIT, "num_channels": 1},
        pictures(tmp_path / "pets", ["cat", "dog"]),
        processor=PlainProcessor(8, 8),
    )
    assert loaded.evaluation.inputs["pixel_values"].shape == (8, 1, 8, 8)


def test_a_given_dataset_with_class_names():
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    def made(names):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"text": texts(40), "label": [i % 2 for i in range(40)]}, features=features)

    swapped = load(TEXT_CLASSIFICATION, BERT, made(["positive", "negative"]))
    assert not any("by number" in note for note in swapped.notes)
    plain = load(TEXT_CLASSIFICATION, BERT, made(["neg", "pos"]))
    assert any("by number, not by name" in note for note in plain.notes)
    assert torch.equal(swapped.evaluation.labels, 1 - plain.evaluation.labels)
    with pytest.raises(
        DataError,
        match=(
            r"the classes of data 'given dataset' \(a, b, c\) are none of the model's classes \(NEGATIVE,"
            r" POSITIVE\)"
        ),
    ):
        load(TEXT_CLASSIFICATION, BERT, made(["a", "b", "c"]))
    hidden = DatasetDict(
        {
            "train": made(["neg", "pos"]),
            "validation": made(["neg", "pos"]),
            "test": made(["neg", "pos"]).map(lambda _: {"label": -1}),
        }
    )
    assert columns.held_out(columns.Raw("x", dict(hidden))) == "validation"


# --- bad data


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("x", 0), ("y", 7), ("z", 1)],
            "label 7 of item 1 in data .* is none of the model's 2 classes: NEGATIVE, POSITIVE",
        ),
        (
            [("x", "positive"), ("y", "neutral"), ("z", "negative")],
            "label 'neutral' of item 1 .* classes: NEGATIVE, POSITIVE",
        ),
        ([("x", 0), ("y", -1), ("z", 1)], "label -1 of item 1"),
        ([("x", 0.5), ("y", 1), ("z", 1)], "label 0.5 of item 0"),
        ([("x", 0), ("y", 1)], "hold 2 items; at least 3 are needed"),
        ([], "cannot be read|at least 3"),
    ],
)
def test_bad_labels_and_too_few(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load(TEXT_CLASSIFICATION, BERT, write_csv(tmp_path / "d.csv", rows))


def test_tiny_evaluation_sets_are_noted(tmp_path):
    loaded = load(
        TEXT_CLASSIFICATION, BERT, write_csv(tmp_path / "d.csv", [("x", 0), ("y", 1), ("z", 1), ("w", 0)])
    )
    assert any("only 2 evaluation items" in note for note in loaded.notes)


def test_all_items_equal(tmp_path):
    with pytest.raises(DataError, match=r"leave 0 items to calibrate and train on \(5 dropped"):
        load(TEXT_CLASSIFICATION, BERT, write_csv(tmp_path / "d.csv", [("same", 0)] * 10))


def test_data_that_do_not_fit_the_task(tmp_path):
    path = write_csv(tmp_path / "d.csv", [(text, 0) for text in texts(9)])
    with pytest.raises(
        DataError,
        match="columns text, label, none of them images; image classification expects a column 'image'",
    ):
        load(IMAGE_CLASSIFICATION, VIT, path)
    with pytest.raises(DataError, match="columns image, label; expected texts in a column 'text'"):
        load(TEXT_CLASSIFICATION, BERT, pictures(tmp_path / "pets", ["cat", "dog"]))
    with pytest.raises(
        DataError,
        match=(
            r"'fashion-mnist-slice' are grey images of 28x28 in 10 classes .* this model does text"
            r" classification"
        ),
    ):
        load(TEXT_CLASSIFICATION, BERT, SLICE)
    with pytest.raises(
        DataError, match=r"columns words, label; expected texts|columns words, points; expected texts"
    ):
        load(
            TEXT_CLASSIFICATION,
            BERT,
            write_csv(tmp_path / "e.csv", [(text, 0) for text in texts(9)], header=("words", "points")),
        )
    with pytest.raises(DataError, match="none of the model's classes"):
        load(
            IMAGE_CLASSIFICATION,
            VIT,
            pictures(tmp_path / "birds", ["hawk", "owl"]),
            processor=PlainProcessor(8, 8),
        )


def test_a_broken_picture_is_named(tmp_path):
    folder = pictures(tmp_path / "pets", ["cat", "dog"])
    for path in (folder / "cat").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"image item .* cannot be read as a picture|cannot be read"):
        load(IMAGE_CLASSIFICATION, VIT, folder, processor=PlainProcessor(8, 8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python-dcos", "unknown data 'python-dcos'; nearest: python-docs"),
        ("./nothing.csv", "data './nothing.csv': there is no such file or folder"),
        (42, "data must be a name, a path"),
    ],
)
def test_unknown_data(name, message):
    with pytest.raises(DataError, match=message):
        load(TEXT_CLASSIFICATION, BERT, name)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.docx").write_bytes(b"1")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.json").write_text('{"text": ')
    (tmp_path / "nothing").mkdir()
    for name, message in (
        ("x.docx", "unknown kind of file '.docx'; known: .jsonl"),
        ("empty.jsonl", "the file is empty"),
        ("broken.json", "cannot be read"),
        ("nothing", "holds neither images, nor files"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load(TEXT_CLASSIFICATION, BERT, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_sizes():
    assert LANGUAGE_MODELLING.sizes.limited() == ItemCounts(64, 32, 256)
    assert IMAGE_CLASSIFICATION.sizes.limited(evaluation=7) == ItemCounts(7, 512, 5000)
    with pytest.raises(DataError, match="calibration_items=0: give at least 1"):
        IMAGE_CLASSIFICATION.sizes.limited(calibration=0)
