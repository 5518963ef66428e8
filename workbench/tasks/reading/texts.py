"""Which columns of a table hold what a model reads: one text, the two texts of a pair, or a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import DataError

TEXT_NAMES = ("text", "sentence", "content", "document", "review")
LABEL_NAMES = ("label", "labels", "class", "category")
# In the order in which a model is given them
PAIRS = (
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("question", "text"),
    ("question", "document"),
    ("question", "answer"),
    ("query", "passage"),
    ("query", "document"),
    ("query", "text"),
    ("query", "answer"),
    ("claim", "evidence"),
)
# word1 and word2, text_a and text_b, text and text_pair
NUMBERED = re.compile(r"(?P<stem>.+?)(?:[ _-]?(?P<digit>[12])|[ _-](?P<letter>a|b|pair))")
SECOND = {"2", "b", "pair"}
IDS = {"id", "ids", "idx", "index", "uid", "uuid", "guid", "url", "hash", "md5", "sha1", "sha256", "path"}
OF_ROW = re.compile(
    r".*[ _-](?:id|idx|uid|uuid|url|hash|path|index)|__index_level_\d+__|(?:file)[ _-]?(?:name|path)?"
)
CHATS = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True)
class ReadColumns:
    """Columns that are read: one of texts or of conversations, or the two of a pair; and those that are not,
    though they hold texts.
    """

    columns: tuple[str, ...]
    unread: tuple[str, ...] = ()
    chat: bool = False
    noun: str = "texts"

    def notes(self, label: str | None = None) -> tuple[str, ...]:
        """Return a line on the columns that are read, none where they are no choice."""
        if label is None and not self.unread and not self.chat:
            return ()
        what = (
            f"conversations of column {self.columns[0]!r} are written by the model's chat template"
            if self.chat
            else f"pairs of texts are read from columns {self.columns[0]!r} and {self.columns[1]!r}"
            if len(self.columns) > 1
            else f"{self.noun} are read from column {self.columns[0]!r}"
        )
        labels = f", labels from {label!r}" if label is not None else ""
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return (what + labels + unread,)


def plain(name: str) -> str:
    """Return a column's name without differences of case and outer spaces."""
    return name.strip().casefold()


def named(names: Sequence[str], wanted: Iterable[str]) -> str | None:
    """Return the first of some columns that is there, whatever its case."""
    there = {plain(name): name for name in reversed(names)}
    return next((there[name] for name in wanted if name in there), None)


def strings(features: Mapping[str, Any]) -> list[str]:
    """Return the columns of strings that are neither labels nor names of rows."""
    return [
        name
        for name, feature in features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
        and plain(name) not in {*LABEL_NAMES, *IDS}
        and not plain(name).startswith(("label_", "label "))
        and not OF_ROW.fullmatch(plain(name))
    ]


def within(feature: Any) -> Any:
    """Return the feature of a list's entries, None for what is no list."""
    if isinstance(feature, list | tuple):
        return feature[0] if feature else None
    return getattr(feature, "feature", None)


def keys(feature: Any) -> set[str]:
    """Return the fields of what a list holds, also of one that is kept as lists by field."""
    held = within(feature)
    held = feature if held is None and isinstance(feature, Mapping) else held
    return set(held) if isinstance(held, Mapping) else set()


def chats(features: Mapping[str, Any]) -> list[str]:
    """Return the columns of conversations: lists of who says what."""
    return [name for name, feature in features.items() if any(keys(feature) >= wanted for wanted in CHATS)]


def nested(features: Mapping[str, Any]) -> list[str]:
    """Return the columns of lists and records in which there may be texts."""
    return [
        name
        for name, feature in features.items()
        if keys(feature)
        or isinstance(feature, Mapping)
        or type(feature).__name__ == "Json"
        or getattr(within(feature), "dtype", None) in ("string", "large_string")
    ]


def pairs(columns: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs among some columns, each in the order in which a model is given it."""
    there = {plain(name): name for name in columns}
    both = [
        (there[first_name], there[second_name])
        for first_name, second_name in PAIRS
        if first_name in there and second_name in there
    ]
    for name, column in there.items():
        match = NUMBERED.fullmatch(name)
        if match is None or (match["digit"] or match["letter"]) not in SECOND:
            continue
        stem = match["stem"]
        first = (
            [stem]
            if match["letter"] == "pair"
            else [f"{stem}{name[len(stem) : -1]}{'1' if match['digit'] else 'a'}"]
        )
        both += [(there[first_name], column) for first_name in first if first_name in there]
    return both


def text_columns(name: str, features: Mapping[str, Any], *, two: bool, conversations: bool) -> ReadColumns:
    """Return the columns that a model reads.

    A pair where the model may be given one (`two`), else the column of a usual name, else the only one of
    strings that is neither label nor the name of a row. `conversations`: lists of who says what may be read.

    Raises:
        DataError: none, or several that could be it; the message names them and what would work.
    """
    candidates, lists = strings(features), nested(features)
    both = pairs(candidates) if two else []
    if len(both) > 1:
        listed = " or ".join(f"{first} and {second}" for first, second in both)
        raise DataError(f"data {name!r} have several pairs of texts, {listed}; keep one of them")
    if both:
        return ReadColumns(both[0], tuple(c for c in candidates if c not in both[0]))
    by_name = [column for column in candidates if plain(column) in TEXT_NAMES]
    talks = chats(features)
    if len(by_name) == 1 and (not talks or plain(by_name[0]) == TEXT_NAMES[0]):
        return ReadColumns((by_name[0],), tuple(c for c in (*candidates, *lists) if c != by_name[0]))
    if conversations and not by_name and len(talks) == 1:
        return ReadColumns((talks[0],), (*candidates, *(c for c in lists if c != talks[0])), chat=True)
    if len(candidates) == 1 and not lists:
        return ReadColumns((candidates[0],))
    listed = ", ".join(features)
    wanted = "expected texts in a column 'text' or 'sentence'"
    if len(candidates) + len(lists) > 1:
        several = ", ".join((*candidates, *lists))
        wanted += f", and {several} could each hold them: name the one to be read 'text'" + (
            ", or those of a pair 'sentence1' and 'sentence2'" if two else ""
        )
    elif lists:
        wanted += f", and {lists[0]} holds lists: write them as texts"
    raise DataError(f"data {name!r} have columns {listed}; {wanted}")
