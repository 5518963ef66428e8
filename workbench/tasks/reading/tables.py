"""Files of text as they come: their encoding, and what separates the columns of a table."""

from __future__ import annotations

import codecs
import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import DataError

# The longer marks first: UTF-32's begins like UTF-16's
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
USUAL = {".csv": ",", ".tsv": "\t"}
BLOCK = 2**20  # bytes
LINES = 20_000  # of a table that are looked at
PLAIN = ("utf-8", "utf-8-sig")


def options(path: Path, builder: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the options with which `datasets` reads a file of text, and notes.

    Args:
        path: a file of text, lines of JSON or a table.
        builder: the name of the builder that reads it: "csv", "json" or "text".

    Raises:
        DataError: bytes that are no text, or rows that no separator makes sense of; what would work is said.
    """
    encoding = encoding_of(path)
    notes: tuple[str, ...] = () if encoding in PLAIN else (f"{path.name} is read as {encoding.upper()}",)
    # Lines of JSON are read by bytes, where the builder knows UTF-8 with and without its mark
    told: dict[str, Any] = {} if encoding == "utf-8" or builder == "json" else {"encoding": encoding}
    if builder == "json" and encoding not in PLAIN:
        told = {"encoding": encoding}
    if builder != "csv":
        return told, notes
    usual = USUAL[path.suffix.lower()]
    separator, quoted = separator_of(path, encoding, usual)
    # Words such as "None", "NA" and "null" are texts and names of classes; only an empty cell is none
    told |= {"sep": separator, "keep_default_na": False, "na_values": [""]}
    if separator != usual:
        notes += (f"columns of {path.name} are separated by {SEPARATORS[separator]}",)
    if not quoted:
        told["quoting"] = csv.QUOTE_NONE
        notes += (f"quotation marks of {path.name} belong to its texts: they do not come in pairs",)
    return told, notes


def encoding_of(path: Path) -> str:
    """Return the encoding of a file: that of its byte order mark, else UTF-8, checked to its end.

    Raises:
        DataError: bytes that are not in that encoding, with the first one's place.
    """
    with path.open("rb") as file:
        head = file.read(4)
        encoding = next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")
        decoder, read, lines = codecs.getincrementaldecoder(encoding)(), 0, 1
        file.seek(0)
        for block in iter(lambda: file.read(BLOCK), b""):
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n")
                raise DataError(
                    f"data {str(path)!r} are not {encoding.upper()}: line {line} holds the byte"
                    f" {error.object[error.start]:#04x}; save the file as UTF-8"
                ) from None
            if "\0" in text:
                raise DataError(
                    f"data {str(path)!r} hold a zero character near byte {read:,}: the file is no text, or"
                    " UTF-16 without its mark; save it as UTF-8"
                )
            read, lines = read + len(block), lines + text.count("\n")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise DataError(
            f"data {str(path)!r} end within a character of {encoding.upper()}: the file is cut off, or saved"
            " in another encoding; save it as UTF-8"
        ) from None
    return encoding


def separator_of(path: Path, encoding: str, usual: str) -> tuple[str, bool]:
    """Return the separator of a table's columns, and whether quotation marks hold cells together.

    The usual one of the file's suffix where the rows fit the header by it, else the only other one by which
    they do. A table of one column has none.

    Raises:
        DataError: rows that are longer than the header by every separator.
    """
    with path.open(encoding=encoding, newline="") as file:
        lines = list(itertools.islice(file, LINES))
    order = (usual, *(separator for separator in SEPARATORS if separator != usual))
    fitting = [separator for separator in order if fits(lines, separator, quoted=True)]
    loose = [separator for separator in order if fits(lines, separator, quoted=False)]
    for quoted, some in ((True, fitting), (False, loose)):
        if len(some) == 1 or usual in some:
            return some[0], quoted and not swallows(lines, some[0])
        if some:
            names = " or ".join(SEPARATORS[separator] for separator in some)
            raise DataError(
                f"data {str(path)!r}: columns could be separated by {names}; save the table with"
                f" {SEPARATORS[usual]}"
            )
    header, *rows = list(cells(lines, usual, quoted=True)) or [[]]
    row, longest = next(
        ((number, len(row)) for number, row in enumerate(rows, 1) if len(row) > len(header)), (0, 0)
    )
    if row:
        raise DataError(
            f"data {str(path)!r}: row {row} has {longest} cells by {SEPARATORS[usual]} and the header has"
            f" {len(header)}, and no other separator fits; put texts that hold {SEPARATORS[usual]} in"
            " quotation marks"
        )
    return usual, True


def cells(lines: Sequence[str], separator: str, *, quoted: bool) -> Iterator[list[str]]:
    """Iterate over the rows of a table that hold anything, up to a cell that is larger than `csv` reads."""
    try:
        for row in csv.reader(
            lines, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        ):
            if row:
                yield row
    except csv.Error:
        return


def fits(lines: Sequence[str], separator: str, *, quoted: bool) -> bool:
    """Return whether a separator makes two or more columns of a header, and no row is longer than that.

    Rows may lack their last cells, as long as most have all.
    """
    rows = list(cells(lines, separator, quoted=quoted))
    width = len(rows[0]) if rows else 0
    whole = sum(len(row) == width for row in rows)
    return width > 1 and all(len(row) <= width for row in rows) and 2 * whole > len(rows)


def swallows(lines: Sequence[str], separator: str) -> bool:
    """Return whether a quotation mark without its second one makes a cell of several rows: each line for
    itself is a whole row.
    """
    rows = list(cells(lines, separator, quoted=True))
    each = list(cells(lines, separator, quoted=False))
    return len(each) > len(rows) and all(len(row) == len(each[0]) for row in each)
