"""Notes and names from anywhere are text, and nothing else, in CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tasks import tiny_task

import workbench as wb
from widgets.figures import compare_html, figures, tables
from widgets.panes.dense_line import dense_html
from widgets.panes.history_view import HistoryView, row_of
from widgets.panes.keep_bar import state_html
from widgets.panes.verdict_strip import strip
from widgets.session.report_run import ReportState
from widgets.session.state import PanelState, Past
from workbench.bench import Bench
from workbench.ledger.annotation import Annotation
from workbench.ledger.ledger import Ledger
from workbench.ledger.pareto import tradeoff
from workbench.ledger.table import as_text, save_points
from workbench.measure.card import card
from workbench.measure.measurement import Measurement
from workbench.recipe import Recipe
from workbench.search.compare import comparison
from workbench.util.markup import markdown_code, markdown_text

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>'\"|[a](javascript:alert(3))\n# head `b` **c**"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Measurement:
    where = tmp_path_factory.mktemp("measured") / "points.journal"
    return Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False).measure(
        Recipe(wb.Prune(sparsity=0.5))
    )


def evil(point: Measurement, text: str = EVIL) -> Measurement:
    """A point with this text wherever a text may be."""
    return dataclasses.replace(
        point,
        recipe=Recipe(wb.Prune(sparsity=0.5, targets=("*", f"!{EVIL}"))) if text == EVIL else point.recipe,
        context=dataclasses.replace(
            point.context, model_name=text, data_name=text, device_name=text, workbench_version=text
        ),
        provenance=dataclasses.replace(point.provenance, versions={text: text}, git_revision=text),
        layers=tuple(dataclasses.replace(layer, name=text, outcome=text) for layer in point.layers),
        missing={"latency": text, "peak memory": text},
        latency=None,
        kernels=(text,),
        no_kernel=(text,),
        warnings=(text, text),
    )


# --- spreadsheets

FORMULAS = [
    "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0", " =1+1", "\uff1d1+1",
    '=HYPERLINK("http://x")', "-2+3+cmd|' /C calc'!A0",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS, ids=repr)
def test_no_cell_of_an_exported_table_is_computed_by_a_spreadsheet(tmp_path, measured, text):
    point = evil(measured, text)
    place = save_points([point], tmp_path / "points.csv", {point.key: Annotation(text)})
    with place.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 2
    assert len(rows[0]) == len(rows[1])
    number = re.compile(r"[-+]?(\d+\.?\d*(e[-+]?\d+)?|inf|nan)", re.IGNORECASE)
    for cell in (cell for row in rows for cell in row):
        assert not cell.lstrip(" ").startswith(tuple("=+-@\t\r\n\uff1d")) or number.fullmatch(cell), cell
    note = rows[1][rows[0].index("note")]
    assert note == "'" + text.replace("\r", "\n")


@given(st.text(max_size=20))
def test_any_other_text_of_a_table_comes_back_as_it_was(measured, text):
    frame = pd.DataFrame({"note": [text]})
    shown = frame.map(as_text)["note"][0]
    kept = text.replace("\r\n", "\n").replace("\r", "\n")
    assert shown in {kept, f"'{kept}"}
    assert (shown == kept) is not text.lstrip(" ").startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"))


def test_numbers_below_zero_are_numbers(tmp_path, measured):
    place = save_points([measured], tmp_path / "points.csv")
    frame = pd.read_csv(place, dtype={"key": str})
    changes = [name for name in frame if "change" in name and frame[name].dtype.kind == "f"]
    assert changes
    assert frame["key"][0] == measured.key
    whole = Ledger(tmp_path / "l.journal")
    whole.add(measured)
    for name in changes:
        assert frame[name][0] == pytest.approx(whole.frame()[name][0], nan_ok=True)


def test_lines_of_json_hold_the_text_itself(tmp_path, measured):
    place = save_points([measured], tmp_path / "points.jsonl", {measured.key: Annotation("=1+1")})
    assert json.loads(place.read_text())["note"] == "=1+1"


# --- Markdown


def test_a_card_has_no_heading_row_link_or_html_but_its_own(measured):
    plain, odd = card(measured), card(evil(measured))
    assert odd.count("\n#") == plain.count("\n#") + (0 if measured.warnings else 1)  # Notes
    lines = odd.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) >= 8
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 3, row
    told = "\n".join(line for line in lines if not line.startswith("| recipe | ``"))  # in code, all is text
    assert not re.search(r"<(?!/?$)[a-zA-Z/!]", told)
    assert not re.search(r"\](?<!\\\])\(", told)


MARKDOWN = {
    "a|b": r"a\|b",
    "[a](http://x)": r"[a\](http://x)",
    "![a](http://x)": r"![a\](http://x)",
    "[a]: http://x": r"[a\]: http://x",
    "<b>x</b>": "&lt;b&gt;x&lt;/b&gt;",
    "# head": r"\# head",
    "- item": r"\- item",
    "1. item": r"1\. item",
    "---": r"\---",
    "a *b* _c_ `d` ~~e~~": r"a \*b\* \_c\_ \`d\` \~\~e\~\~",
    "snake_case_name": "snake_case_name",
    "&lt; & co": "&amp;lt; & co",
    "two\nlines\r\n\tand more": "two lines and more",
    "93.1% to 92.3% (-0.8 points, -1.3 to -0.3)": "93.1% to 92.3% (-0.8 points, -1.3 to -0.3)",
    "0.01 [0.01, 0.02] nats": "0.01 [0.01, 0.02] nats",
    "-0.5 points": "-0.5 points",
    "C:\\models": r"C:\\models",
}


@pytest.mark.parametrize(("text", "shown"), MARKDOWN.items(), ids=map(repr, MARKDOWN))
def test_text_reads_as_it_is_in_markdown(text, shown):
    assert markdown_text(text) == shown


@pytest.mark.parametrize("text", [*MARKDOWN, "`", "``", "a`b``c", " `x` ", "", "|`|"])
def test_markdown_makes_nothing_of_it(text):
    mistune = pytest.importorskip("mistune")
    make = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])

    def seen(html: str) -> tuple[str, set[str]]:
        class Reader(HTMLParser):
            text, tags = "", frozenset[str]()

            def handle_starttag(self, tag, attrs):
                self.tags |= {tag}

            def handle_data(self, data):
                self.text += data

        reader = Reader()
        reader.feed(html)
        return " ".join(reader.text.split()), set(reader.tags)

    words = " ".join(text.split())
    bare = re.sub(r"https?://\S*", "", words)  # an address by itself may be a link: it says where it leads
    if bare == words and words:
        assert seen(make(markdown_text(text))) == (words, {"p"})
    if words:
        told, tags = seen(make(f"| a | b |\n|---|---|\n| x | {markdown_code(text)} |\n"))
        table = (
            told.replace("\\|", "|") if "|" in text else told,
            tags,
        )  # GitHub takes the backslash away itself
        assert table == (f"a b x {words}", {"table", "thead", "tbody", "tr", "th", "td", "code"})


# --- HTML


def test_no_text_of_a_point_is_html(measured):
    point, said = evil(measured), {measured.key: Annotation(EVIL, pinned=True)}
    twin = dataclasses.replace(point, key="f" * 16, recipe=Recipe(wb.Quantize(weight_bits=4)))
    past = Past([point, twin], {**said, twin.key: Annotation(EVIL)}, EVIL)
    state = PanelState(point.recipe, point=point, phase="measured", past=past, model=EVIL, doing=EVIL)
    history = HistoryView(lambda _: None, lambda *_: EVIL)
    history.show(state)
    history.export()
    pages = [
        tables.verdict_box(point), tables.summary_table(point), tables.layer_table(point),
        tables.provenance_table(point), tables.points_table([point, twin]), tables.notes_list(point),
        tables.table([row_of(point, past)]),
        compare_html.comparison_html(comparison([point, twin]), past.said),
        dense_html(point), strip(state), history.table.value, history.wrote.value,
        *(state_html(ReportState(kind, page=Path(EVIL), message=EVIL))
          for kind in ("running", "done", "failed", "stopped")),
    ]  # fmt: skip
    for page in pages:
        assert not re.search(r"<(img|script|b>none)", page), page
        assert "onerror=" not in re.sub(r"&lt;img src=x onerror=", "", page), page
    assert sum("&lt;img" in page for page in pages) >= 10


def test_no_text_of_a_point_is_markup_in_a_plot(measured):
    drawn = figures.tradeoff_figure(tradeoff([evil(measured)])).to_json()
    assert "<img" not in drawn.replace("\\u003c", "<")
    assert "<script" not in drawn.replace("\\u003c", "<")
