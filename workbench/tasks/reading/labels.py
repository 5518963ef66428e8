"""Labels: which of a model's classes a row's label means, by name or by number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

from workbench.errors import DataError

# Between the letters of a name: a folder cannot have a slash in its name, and people write one of these
BETWEEN = re.compile(
    "(?<=\\w)\\s*[-_\\s/\\\\:\N{DIVISION SLASH}\N{FRACTION SLASH}\N{FULLWIDTH SOLIDUS}]\\s*(?=\\w)"
)
SHOWN = 3  # names in a note


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a model's classes as its config.json gives them, in the order of its outputs.

    LABEL_0, LABEL_1 and so on where it gives none.
    """
    names = config.get("id2label")
    numbers = config.get("label2id") or {}
    if not names and sorted(numbers.values()) == list(range(len(numbers))) and numbers:
        names = {number: name for name, number in numbers.items()}
    names = names or {i: f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Return names for tables and plots: classes of one name with their numbers, `crane (134)`."""
    return tuple(f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names))


def some(names: Sequence[str]) -> str:
    """Return a list of names, cut after ten."""
    listed = list(names)
    return ", ".join(listed[:10]) + (f", ... ({len(listed)} in all)" if len(listed) > 10 else "")


def plain(name: str) -> str:
    """Return a name without differences of case, spaces, and how its accents are stored (some systems keep
    the letters of a folder's name and their accents apart).
    """
    return " ".join(normalize("NFC", name).split()).casefold()


def loose(name: str) -> str:
    """Return a name also without differences of what stands between its words, or for a slash in a folder's
    name (`T-shirt_top`, `T-shirt%2Ftop`).
    """
    return plain(BETWEEN.sub(" ", unquote(name)))


@dataclass(frozen=True)
class Classes:
    """A model's classes, to be found by name: `names` in the order of its outputs, `also` other names by
    number.
    """

    names: tuple[str, ...]
    also: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Classes:
        """Return the classes of a config.json, from its `id2label` and `label2id`."""
        names = class_names(config)
        also = tuple(
            (str(name), number)
            for name, number in (config.get("label2id") or {}).items()
            if isinstance(number, int) and 0 <= number < len(names)
        )
        return cls(names, also)

    @cached_property
    def tables(self) -> tuple[dict[str, set[int]], ...]:
        """Return the numbers by name: as written, then without case, then without what stands between."""
        numbers: tuple[dict[str, set[int]], ...] = ({}, {}, {})
        for name, number in (*((name, i) for i, name in enumerate(self.names)), *self.also):
            for table, key in zip(numbers, (name.strip(), plain(name), loose(name)), strict=True):
                table.setdefault(key, set()).add(number)
        return numbers

    @property
    def numbered(self) -> bool:
        """Whether the classes have no names of their own: LABEL_0, LABEL_1 and so on."""
        return all(name == f"LABEL_{number}" for number, name in enumerate(self.names))

    def number(self, name: str, data: str) -> int | None:
        """Return the number of the class of this name, None where there is none.

        Raises:
            DataError: two classes have this name.
        """
        for table, key in zip(self.tables, (name.strip(), plain(name), loose(name)), strict=True):
            numbers = sorted(table.get(key, ()))
            if len(numbers) > 1:
                raise DataError(
                    f"label {name!r} of data {data!r} names {len(numbers)} of the model's classes, numbers"
                    f" {', '.join(map(str, numbers))}; give numbers instead of names"
                )
            if numbers:
                return numbers[0]
        return None

    def has(self, value: Any) -> bool:
        """Return whether a value is the number of a class."""
        return (number := whole(value)) is not None and 0 <= number < len(self.names)


def whole(value: Any) -> int | None:
    """Return a whole number, None for what is none."""
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value.strip()):
        return int(value)
    return None


def label_numbers(
    values: Sequence[Any], names: Sequence[str] | None, classes: Classes, data: str, *, folders: bool = False
) -> tuple[list[int], tuple[str, ...]]:
    """Return every row's label as the number of one of the model's classes, and notes.

    Args:
        values: a label for each row.
        names: the data's own names of classes, which whole `values` are places in; None if they have none.
        classes: the model's.
        data: what the data are called.
        folders: whether the names are those of folders, which say nothing by their order.

    Names are matched to the model's classes whatever their case, spaces and hyphens. Numbers are the names of
    classes where all of them are, else the numbers of classes.

    Raises:
        DataError: a label that is none of the classes, or two of them; the message has the item's number and
            the classes.
    """
    if names is None:
        numbers, notes = of_values(values, classes, data)
    else:
        places, notes = of_names(names, classes, data, folders=folders)
        numbers = {
            value: places[value]
            for value in {value for value in values if isinstance(value, int)}
            if value in places
        }
    for row, value in enumerate(values):
        if not isinstance(value, str | int | float) or value not in numbers:
            shown = names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
            raise DataError(
                f"label {shown!r} of item {row} in data {data!r} is none of the model's"
                f" {len(classes.names)} classes: {some(classes.names)}"
            )
    return [numbers[value] for value in values], notes


def of_values(values: Sequence[Any], classes: Classes, data: str) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Return the numbers of the classes that the labels of a column mean, and notes."""
    kinds = sorted({value for value in values if isinstance(value, str | bool | int | float)}, key=str)
    named = {value: number for value in kinds if (number := classes.number(written(value), data)) is not None}
    counts = [value for value in kinds if whole(value) is not None]
    numbered = {
        value: number for value in counts if classes.has(value) and (number := whole(value)) is not None
    }
    if not counts or all(value in named for value in counts):
        renumbered = [written(value) for value in counts if named[value] != whole(value)]
        note = (
            f"labels of {data} such as {some(renumbered)} are names of the model's classes, not their numbers"
        )
        return named, (*([note] if renumbered else []), *otherwise(named, classes, data))
    by_word = {value: number for value, number in named.items() if value not in counts}
    stranger = next(written(value) for value in counts if value not in named)
    note = (
        f"labels of {data} are numbers of the model's classes, not their names: no class is called {stranger}"
    )
    doubtful = any(value in named for value in counts)
    return by_word | numbered, (*([note] if doubtful else []), *otherwise(by_word, classes, data))


def written(value: Any) -> str:
    """Return a label as a name: 3.0 is 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def of_names(
    names: Sequence[str], classes: Classes, data: str, *, folders: bool
) -> tuple[dict[int, int], tuple[str, ...]]:
    """Return the numbers of the classes that a data set's own names mean, by their places, and notes."""
    numbers = dict[int, int]()
    for place, name in enumerate(names):
        number = classes.number(name, data)
        if number is None and folders:  # within folders of another purpose
            number = classes.number(name.rsplit("/", 1)[-1], data)
        if number is not None:
            numbers[place] = number
    if numbers:
        return numbers, otherwise({names[place]: number for place, number in numbers.items()}, classes, data)
    theirs = classes.names
    if names and all(classes.has(name) for name in names):
        return (
            {place: int(name) for place, name in enumerate(names)},
            ()
            if list(names) == [str(number) for number in range(len(theirs))] and classes.numbered
            else (
                f"labels of {data} ({some(names)}) are the numbers of the model's classes ({some(theirs)})",
            ),
        )
    if len(names) != len(theirs) or (folders and not classes.numbered):
        raise DataError(
            f"the classes of data {data!r} ({some(names)}) are none of the model's classes ({some(theirs)})"
        )
    note = (
        f"labels of {data} ({some(names)}) are matched to the model's classes ({some(theirs)}) by number, not"
        " by name"
    )
    return {place: place for place in range(len(names))}, (note,)


def otherwise(numbers: Mapping[Any, int], classes: Classes, data: str) -> tuple[str, ...]:
    """Return a note on labels that are written otherwise than the classes they are taken for."""
    also = set(classes.also)
    respelled = [
        f"{name!r} for {classes.names[number]!r}"
        for name, number in numbers.items()
        if isinstance(name, str)
        and plain(name) != plain(classes.names[number])
        and (name, number) not in also
    ]
    if not respelled:
        return ()
    more = f" and {len(respelled) - SHOWN} more" if len(respelled) > SHOWN else ""
    return (f"labels of {data} are taken by name: {', '.join(respelled[:SHOWN])}{more}",)
