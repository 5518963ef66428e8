"""Which split, which column and which label: what a data set's rows mean to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.errors import DataError
from workbench.tasks.reading import labels, texts
from workbench.tasks.reading.labels import Classes, class_names, told_apart
from workbench.tasks.reading.texts import LABEL_NAMES, ReadColumns

IMAGE_NAMES = ("image", "img", "picture")
HELD_OUT_NAMES = ("test", "validation", "valid", "dev", "eval")


@dataclass(frozen=True)
class Raw:
    """Rows as they were found: `datasets.Dataset` by split name."""

    name: str
    splits: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a model's classes, in the order of its outputs, LABEL_0 and so on if the config has
    none; those of one name with their numbers.
    """
    return told_apart(class_names(config))


def not_one_class(config: Mapping[str, Any]) -> str:
    """Return why a model's head does not choose one class (several labels an item, or a regression), "" if it
    does.
    """
    problem = config.get("problem_type")
    if problem in (None, "single_label_classification"):
        return ""
    return f"the model's problem_type is {problem!r}, and single_label_classification only is scored"


def held_out(raw: Raw) -> str | None:
    """Return the split to evaluate on, or None when there is only one.

    Hidden test labels (all below 0) do not count.
    """
    if len(raw.splits) < 2:
        return None
    for name in (
        n for wanted in HELD_OUT_NAMES for n in raw.splits if n == wanted or n.startswith(wanted + "_")
    ):
        rows = raw.splits[name]
        label = texts.named(rows.column_names, LABEL_NAMES)
        if label is None or not len(rows) or any(value != -1 for value in rows[label]):
            return name
    return None


def train_name(raw: Raw, held_out_name: str | None) -> str:
    """Return the split to calibrate and train on.

    Raises:
        DataError: nothing but the held-out split.

    """
    others = [name for name in raw.splits if name != held_out_name]
    if not others:
        raise DataError(
            f"data {raw.name!r} have no split to calibrate and train on; splits: {', '.join(raw.splits)}"
        )
    return "train" if "train" in others else others[0]


def text_column(name: str, rows: Any) -> ReadColumns:
    """Return the column of texts, or of conversations.

    Raises:
        DataError: none, or several that could be it.

    """
    return texts.text_columns(name, rows.features, two=False, conversations=True)


def text_columns(name: str, rows: Any) -> tuple[ReadColumns, str]:
    """Return the column of texts, or the two of a pair, and that of labels.

    Raises:
        DataError: a column is missing, or there are several; the message lists those that are there.

    """
    chosen = texts.text_columns(name, rows.features, two=True, conversations=False)
    return chosen, _label_column(name, rows, "texts in a column 'text' or 'sentence'")


def image_columns(name: str, rows: Any) -> tuple[ReadColumns, str]:
    """Return the columns of images and labels.

    Raises:
        DataError: a column is missing; the message lists those that are there.

    """
    typed: list[str] = [c for c, feature in rows.features.items() if type(feature).__name__ == "Image"]
    if not typed:
        raise DataError(
            f"data {name!r} have columns {', '.join(rows.column_names)}, none of them images; "
            "image classification expects a column 'image' and a column 'label', or a folder of images"
        )
    item = next((c for c in IMAGE_NAMES if c in typed), typed[0])
    others = tuple(column for column in typed if column != item)
    return ReadColumns((item,), others, noun="pictures"), _label_column(
        name, rows, "images in a column 'image'"
    )


def undecoded(rows: Any, column: str) -> Any:
    """Return the rows with a column of images left as bytes, so that one broken picture can be named."""
    if type(rows.features[column]).__name__ != "Image":
        return rows
    from datasets import Image

    return rows.cast_column(column, Image(decode=False))


def _label_column(name: str, rows: Any, items: str) -> str:
    """Return the column of labels: by its usual names, else the only one typed as a class."""
    if (by_name := texts.named(rows.column_names, LABEL_NAMES)) is not None:
        return by_name
    typed: list[str] = [c for c, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"]
    if len(typed) != 1:
        raise DataError(
            f"data {name!r} have columns {', '.join(rows.column_names)}; expected {items} and labels in a"
            " column 'label' (a folder of images: one sub-folder a class)"
        )
    return typed[0]


def label_numbers(
    rows: Any, column: str, config: Mapping[str, Any], name: str
) -> tuple[list[int], tuple[str, ...]]:
    """Return every row's label as the number of one of the model's classes, and notes.

    See `workbench.tasks.reading.labels.label_numbers`.

    Raises:
        DataError: a label that is none of the classes, with the item's number and the classes.
    """
    folders = rows.column_names == ["image", column] and type(rows.features["image"]).__name__ == "Image"
    names = getattr(rows.features[column], "names", None)
    return labels.label_numbers(list(rows[column]), names, Classes.of(config), name, folders=folders)
