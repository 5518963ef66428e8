"""Which split, which column and which label: what a data set's rows mean to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.errors import DataError

TEXT_NAMES = ("text", "sentence", "content", "document", "review")
IMAGE_NAMES = ("image", "img", "picture")
LABEL_NAMES = ("label", "labels", "class", "category")
HELD_OUT_NAMES = ("test", "validation", "valid", "dev", "eval")


@dataclass(frozen=True)
class Raw:
    """Rows as they were found: `datasets.Dataset` by split name."""

    name: str
    splits: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a model's classes, in the order of its outputs; none if the config has none."""
    names = config.get("id2label") or {i: f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


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
        label = next((column for column in LABEL_NAMES if column in rows.column_names), None)
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


def text_column(name: str, rows: Any) -> str:
    """Return the column that holds texts: by its usual names, else the only one of strings that is no label.

    Raises:
        DataError: none, or several that could be it.

    """
    strings: list[str] = [
        c
        for c, feature in rows.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    for wanted in TEXT_NAMES:
        if wanted in strings:
            return wanted
    others: list[str] = [c for c in strings if c not in LABEL_NAMES]
    if len(others) != 1:
        raise DataError(
            f"data {name!r} have columns {', '.join(rows.column_names)}; expected texts in a column 'text' or"
            " 'sentence'"
        )
    return others[0]


def text_columns(name: str, rows: Any) -> tuple[str, str]:
    """Return the columns of texts and labels.

    Raises:
        DataError: a column is missing; the message lists those that are there.

    """
    return text_column(name, rows), _label_column(name, rows, "texts in a column 'text' or 'sentence'")


def image_columns(name: str, rows: Any) -> tuple[str, str]:
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
    return item, _label_column(name, rows, "images in a column 'image'")


def undecoded(rows: Any, column: str) -> Any:
    """Return the rows with a column of images left as bytes, so that one broken picture can be named."""
    if type(rows.features[column]).__name__ != "Image":
        return rows
    from datasets import Image

    return rows.cast_column(column, Image(decode=False))


def _label_column(name: str, rows: Any, items: str) -> str:
    """Return the column of labels: by its usual names, else the only one typed as a class."""
    for wanted in LABEL_NAMES:
        if wanted in rows.column_names:
            return wanted
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

    Names are matched to the model's classes whatever their case; where a data set's own class names are all
    unknown to the model but as many as its classes, their numbers are used and a note says so.

    Raises:
        DataError: a label that is none of the classes, with the item's number and the classes.
    """
    class_names = classes(config)
    by_name = {label.casefold(): number for number, label in enumerate(class_names)}
    values = list(rows[column])
    notes: tuple[str, ...] = ()
    names = getattr(rows.features[column], "names", None)
    if names:
        matched = [label for label in names if label.casefold() in by_name]
        folder = type(rows.features[rows.column_names[0]]).__name__ == "Image" and rows.column_names == [
            "image",
            column,
        ]
        if matched:
            values = [
                names[value] if isinstance(value, int) and 0 <= value < len(names) else value
                for value in values
            ]
        elif len(names) != len(class_names) or (folder and not _numbered(class_names)):
            raise DataError(
                f"the classes of data {name!r} ({_some(names)}) are none of the model's classes"
                f" ({_some(class_names)})"
            )
        else:
            notes = (
                (
                    f"labels of {name} ({_some(names)}) are matched to the model's classes"
                    f" ({_some(class_names)}) by number, not by name"
                ),
            )
    return [_number(value, row, by_name, class_names, name) for row, value in enumerate(values)], notes


def _numbered(class_names: tuple[str, ...]) -> bool:
    """Return whether the classes have no names of their own: LABEL_0, LABEL_1 and so on."""
    return all(label == f"LABEL_{number}" for number, label in enumerate(class_names))


def _number(value: Any, row: int, by_name: Mapping[str, int], class_names: tuple[str, ...], name: str) -> int:
    """Return one label as a class number."""
    if isinstance(value, str) and value.casefold() in by_name:
        return by_name[value.casefold()]
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    whole = isinstance(number, bool | int) or (isinstance(number, float) and number.is_integer())
    if whole and 0 <= number < len(class_names):
        return int(number)
    raise DataError(
        f"label {value!r} of item {row} in data {name!r} is none of the model's {len(class_names)} classes:"
        f" {_some(class_names)}"
    )


def _some(names: Any) -> str:
    """Return a list of names, cut after ten."""
    listed = list(names)
    return ", ".join(listed[:10]) + (f", ... ({len(listed)} in all)" if len(listed) > 10 else "")
