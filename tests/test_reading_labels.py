"""Labels: a row means the class of its name, or of its number; what is neither, or both, is refused."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from test_tasks import load, texts

from workbench.errors import DataError
from workbench.tasks import columns
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION, PlainProcessor
from workbench.tasks.reading.labels import Classes, label_numbers
from workbench.tasks.text_classification import TEXT_CLASSIFICATION


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def config(*names, **more):
    return {"id2label": {str(number): name for number, name in enumerate(names)}, **more}


def numbers(values, given, names=None, **options):
    return label_numbers(values, names, Classes.of(given), "d", **options)


@pytest.mark.parametrize(
    ("names", "values", "right"),
    [
        (("3", "7"), [7, 3, 7], [1, 0, 1]),
        (("3", "7"), ["7", "3"], [1, 0]),
        (("3", "7"), [7.0, 3.0], [1, 0]),
        (("1", "0"), [0, 1, 1], [1, 0, 0]),
        (("2010", "2020", "2030"), [2030, 2010], [2, 0]),
        (("-1", "0", "1"), [-1, 1, 0], [0, 2, 1]),
        (("false", "true"), [True, False], [1, 0]),
        (("no", "yes"), [True, False], [1, 0]),
        (("cat", "dog"), [1, 0, "1"], [1, 0, 1]),
        (("cat", "dog"), [" Dog ", "CAT"], [1, 0]),
        (("not_entailment", "entailment"), ["not entailment", "Not-Entailment", "entailment"], [0, 0, 1]),
        (("T-shirt/top", "Shirt"), ["t-shirt / top", "T-shirt_top", "T-shirt%2Ftop", "shirt"], [0, 0, 0, 1]),
        (("US", "us"), ["us", "US"], [1, 0]),
        (("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "bar"), ["cafe\N{COMBINING ACUTE ACCENT}"], [0]),
        (("LABEL_0", "LABEL_1"), ["LABEL_1", 0], [1, 0]),
    ],
)
def test_labels_by_name_or_number(names, values, right):
    assert numbers(values, config(*names))[0] == right


def test_stars_that_count_from_zero_are_numbers_and_said():
    classes, notes = numbers([0, 4, 1], config("1", "2", "3", "4", "5"))
    assert classes == [0, 4, 1]
    assert notes == ("labels of d are numbers of the model's classes, not their names: no class is called 0",)
    classes, notes = numbers([1, 5, 2], config("1", "2", "3", "4", "5"))
    assert classes == [0, 4, 1]
    assert notes == ("labels of d such as 1, 2, 5 are names of the model's classes, not their numbers",)


def test_names_of_label2id_count_too():
    assert numbers(["3"], {"label2id": {"3": 0, "7": 1}})[0] == [0]
    assert numbers([7], {"label2id": {"3": 0, "7": 1}})[0] == [1]
    both = config("LABEL_0", "LABEL_1", label2id={"bad": 0, "good": 1})
    assert numbers(["good", "LABEL_0"], both)[0] == [1, 0]


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (
            ("crane", "dog", "crane"),
            ["dog", "crane"],
            "'crane' of data 'd' names 2 .* numbers 0, 2; give numbers",
        ),
        (("Crane", "crane"), ["CRANE"], "names 2 of the model's classes, numbers 0, 1"),
        (
            ("cat", "dog"),
            ["cat", "bird"],
            "label 'bird' of item 1 in data 'd' is none .* 2 classes: cat, dog",
        ),
        (("cat", "dog"), [1, 2], "label 2 of item 1"),
        (("cat", "dog"), [0, -1], "label -1 of item 1"),
        (("cat", "dog"), [0, 0.5], "label 0.5 of item 1"),
        (("cat", "dog"), ["cat", None], "label None of item 1"),
        (("cat", "dog"), ["cat", float("nan")], "label nan of item 1"),
        (("cat", "dog"), ["cat", ["dog"]], r"label \['dog'\] of item 1"),
        (("C++", "Java"), ["C"], "label 'C' of item 0"),
        (("1", "2"), ["-1"], "label '-1' of item 0"),
    ],
)
def test_labels_that_mean_nothing_or_two_things(names, values, message):
    with pytest.raises(DataError, match=message):
        numbers(values, config(*names))


def test_classes_of_one_name_are_kept_apart():
    twice = config("crane", "dog", "crane")
    assert numbers([0, 2, 1], twice)[0] == [0, 2, 1]
    assert numbers(["dog"], twice)[0] == [1]
    assert columns.classes(twice) == ("crane (0)", "dog", "crane (2)")


def test_names_of_the_data():
    own = ["7", "3"]
    assert numbers([0, 1, 1], config("3", "7"), own)[0] == [1, 0, 0]
    twelve = [f"LABEL_{number}" for number in range(12)]
    sorted_as_folders = sorted(str(number) for number in range(12))  # 0, 1, 10, 11, 2, ...
    classes, _ = numbers(list(range(12)), config(*twelve), sorted_as_folders, folders=True)
    assert classes == [int(name) for name in sorted_as_folders]
    classes, notes = numbers([0, 1], config("cat", "dog"), ["0", "1"], folders=True)
    assert classes == [0, 1]
    assert notes == ("labels of d (0, 1) are the numbers of the model's classes (cat, dog)",)
    with pytest.raises(DataError, match=r"label 'emu' of item 1 .* 2 classes: cat, dog"):
        numbers([0, 1], config("cat", "dog"), ["cat", "emu"])
    with pytest.raises(DataError, match=r"the classes of data 'd' \(emu, owl\) are none of the model's"):
        numbers([0, 1], config("cat", "dog"), ["emu", "owl"], folders=True)


def write(path, labels):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts(len(labels)), labels, strict=True)])
    return path


@pytest.mark.parametrize("word", ["None", "NA", "null", "nan"])
def test_names_that_pandas_takes_for_nothing(tmp_path, word):
    path = write(tmp_path / "d.csv", [word, "some"] * 20)
    loaded = load(TEXT_CLASSIFICATION, config("some", word), path)
    assert {0, 1} == set(loaded.evaluation.labels.tolist())


def test_one_class_is_said(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": 1}) for text in texts(40)))
    loaded = load(TEXT_CLASSIFICATION, config("bad", "good"), path)
    assert any(note.startswith("all 20 evaluation items are of one class, good:") for note in loaded.notes)
    two = load(TEXT_CLASSIFICATION, config("bad", "good"), write(tmp_path / "e.csv", [0, 1] * 20))
    assert not any("one class" in note for note in two.notes)


def grey(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(path)


def read(folder, given):
    return load(IMAGE_CLASSIFICATION, {"num_channels": 1, **given}, folder, processor=PlainProcessor(8, 8))


def right(loaded, *tens):
    """Return whether each picture, of grey 10 * its class + something, has the label of its class."""
    for items in (loaded.evaluation, loaded.calibration, loaded.training):
        levels = (items.inputs["pixel_values"][:, 0, 0, 0] * 255).round().long() // 10
        if levels.tolist() != [tens.index(label) for label in items.labels.tolist()]:
            return False
    return True


@pytest.mark.parametrize(
    "name", ["T-shirt/top", "T-shirt_top", "T-shirt-top", "t-shirt top", "T-shirt%2Ftop"]
)
def test_folders_of_a_class_with_a_slash(tmp_path, name):
    for number in range(8):
        grey(tmp_path / "d" / name / f"{number}.png", number)
        grey(tmp_path / "d" / "Bag" / f"{number}.png", 10 + number)
    assert right(read(tmp_path / "d", config("Bag", "T-shirt/top")), 1, 0)


def test_folders_within_folders_mean_their_last_name(tmp_path):
    for number in range(8):
        grey(tmp_path / "d" / "pets" / "cat" / f"{number}.png", number)
        grey(tmp_path / "d" / "wild" / "large" / "wolf" / f"{number}.png", 10 + number)
    assert right(read(tmp_path / "d", config("wolf", "cat")), 1, 0)


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val"), ("train", "validation")])
def test_folders_of_splits(tmp_path, train, test):
    for number in range(9):
        for split, shade in ((train, 0), (test, 50)):
            grey(tmp_path / "d" / split / "a/b" / f"{number}.png", shade + number)
            grey(tmp_path / "d" / split / "c" / f"{number}.png", shade + 10 + number)
    loaded = read(tmp_path / "d", config("c", "a/b"))
    held_out = (loaded.evaluation.inputs["pixel_values"][:, 0, 0, 0] * 255).round()
    assert len(held_out) == 18
    assert bool((held_out >= 50).all())
    assert [1 - (int(level) // 10) % 5 for level in held_out] == loaded.evaluation.labels.tolist()


def test_a_folder_of_one_class_is_read_and_said(tmp_path):
    for number in range(40):
        grey(tmp_path / "d" / "dog" / f"{number}.png", 5 * number)
    loaded = read(tmp_path / "d", config("cat", "dog"))
    assert set(loaded.evaluation.labels.tolist()) == {1}
    assert any("evaluation items are of one class, dog" in note for note in loaded.notes)


def test_a_folder_without_folders_is_refused(tmp_path):
    for number in range(4):
        grey(tmp_path / "d" / f"{number}.png", number)
    with pytest.raises(DataError, match="a folder of images: one sub-folder a class"):
        read(tmp_path / "d", config("cat", "dog"))
