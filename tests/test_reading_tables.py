"""Tables and texts as files hold them: separators, encodings, quotation marks; or a refusal that says so."""

from __future__ import annotations

import csv
import json

import pytest
from test_tasks import BERT, load, texts

from workbench.errors import DataError
from workbench.tasks import sources
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.tasks.text_classification import TEXT_CLASSIFICATION


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


ROWS = [
    (f"{text}, caf\N{LATIN SMALL LETTER E WITH ACUTE}; so\N{EM DASH}it {i}", i % 2)
    for i, text in enumerate(texts(40))
]


def table(path, separator=",", encoding="utf-8", rows=ROWS, header=("text", "label")):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


def read(path):
    """Return every row of a file as it is read: (text, label)."""
    rows = sources.read(path, progress=False).splits["train"]
    return list(zip(rows["text"], rows["label"], strict=True))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_the_separator_is_found_and_said(tmp_path, separator, suffix):
    path = table(tmp_path / f"d{suffix}", separator)
    assert read(path) == ROWS
    standard = {".csv": ",", ".tsv": "\t"}[suffix]
    said = [note for note in load(TEXT_CLASSIFICATION, BERT, path).notes if "separated" in note]
    names = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
    assert said == (
        [] if separator == standard else [f"columns of d{suffix} are separated by {names[separator]}"]
    )


def test_splits_may_have_separators_of_their_own(tmp_path):
    table(tmp_path / "train.csv", ";")
    table(tmp_path / "test.csv", ",", "utf-8-sig", [(f"other {text}", label) for text, label in ROWS])
    loaded = load(TEXT_CLASSIFICATION, BERT, tmp_path)
    assert len(loaded.evaluation) == 40
    assert "columns of train.csv are separated by semicolons" in loaded.notes


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_byte_order_marks(tmp_path, encoding, kind):
    path = tmp_path / f"d.{kind}"
    if kind in {"csv", "tsv"}:
        table(path, "," if kind == "csv" else "\t", encoding)
    else:
        rows = [{"text": text, "label": label} for text, label in ROWS]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(lines if kind == "jsonl" else json.dumps(rows, ensure_ascii=False), encoding=encoding)
    assert read(path) == ROWS
    notes = load(TEXT_CLASSIFICATION, BERT, path).notes
    assert any("read as UTF" in note for note in notes) is (encoding != "utf-8-sig")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_mark_is_no_text(tmp_path, encoding):
    path = tmp_path / "d.txt"
    path.write_text("\n".join(texts(400)), encoding=encoding)
    assert next(iter(sources.read(path, progress=False).splits["train"]["text"])) == texts(1)[0]
    assert len(load(LANGUAGE_MODELLING, {}, path, sizes=(8, 4, 8), context=16).evaluation) == 8


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le"])
def test_other_encodings_are_refused_in_one_line(tmp_path, kind, encoding):
    path = tmp_path / f"d.{kind}"
    rows = [f"the {i}, caf\N{LATIN SMALL LETTER E WITH ACUTE}" for i in range(40)]
    lines = {
        "csv": ["text,label", *(f'"{row}",1' for row in rows)],
        "tsv": ["text\tlabel", *(f"{row}\t1" for row in rows)],
        "jsonl": [json.dumps({"text": row, "label": 1}, ensure_ascii=False) for row in rows],
        "json": [json.dumps([{"text": row, "label": 1} for row in rows], ensure_ascii=False)],
        "txt": rows,
    }[kind]
    path.write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(DataError, match="save (the file|it) as UTF-8") as caught:
        sources.read(path, progress=False)
    assert "\n" not in str(caught.value)
    if encoding != "utf-16-le" and kind != "json":
        assert f"line {2 if kind in {'csv', 'tsv'} else 1} holds the byte 0xe9" in str(caught.value)


def test_a_character_that_is_cut_off(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes("\n".join(texts(40)).encode() + "é".encode()[:1])
    with pytest.raises(DataError, match="end within a character of UTF-8"):
        sources.read(path, progress=False)


def test_rows_longer_than_the_header_are_refused(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "\n".join(f"well, number {i},{i % 2}" for i in range(40)))
    with pytest.raises(
        DataError, match="row 1 has 3 cells by commas and the header has 2, .* quotation marks"
    ):
        sources.read(path, progress=False)
    path.write_text("text\n" + "\n".join(f"well, number {i}" for i in range(40)))
    with pytest.raises(DataError, match="row 1 has 2 cells by commas and the header has 1"):
        sources.read(path, progress=False)


def test_a_table_of_one_column(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text\n" + "\n".join(f'"well, number {i}"' for i in range(40)))
    rows = sources.read(path, progress=False).splits["train"]
    assert list(rows["text"]) == [f"well, number {i}" for i in range(40)]


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_quotation_marks_that_open_and_never_close(tmp_path, suffix):
    rows = [('"' * (i % 5 == 0) + f"said {i}", i % 2) for i in range(40)]
    path = tmp_path / f"d{suffix}"
    path.write_text("text\tlabel\n" + "\n".join(f"{text}\t{label}" for text, label in rows))
    assert read(path) == rows
    assert any("quotation marks" in note for note in load(TEXT_CLASSIFICATION, BERT, path).notes)


def test_texts_of_several_lines_stay_whole(tmp_path):
    rows = [(f'one "{i}"\ntwo; three\tfour\n', i % 2) for i in range(40)]
    for suffix, separator in ((".csv", ","), (".tsv", "\t"), (".csv", ";")):
        assert read(table(tmp_path / f"d{suffix}", separator, rows=rows)) == rows


def test_texts_of_more_than_csv_reads_at_once(tmp_path):
    rows = [*ROWS[:5], ("long " * 40_000, 1), *ROWS[5:]]
    for suffix, separator in ((".csv", ","), (".csv", ";"), (".tsv", "\t")):
        assert read(table(tmp_path / f"d{suffix}", separator, rows=rows)) == rows


def test_words_for_nothing_are_texts(tmp_path):
    rows = [
        (word, i % 2) for i, word in enumerate(["None", "NA", "null", "nan", "N/A", "-", "true", "1"] * 5)
    ]
    assert read(table(tmp_path / "d.csv", rows=rows)) == rows


def test_an_empty_cell_is_none(tmp_path):
    path = table(tmp_path / "d.csv", rows=[*ROWS, ("", 1)])
    with pytest.raises(DataError, match="item 40 has None in column 'text'; a text is needed"):
        load(TEXT_CLASSIFICATION, BERT, path)
