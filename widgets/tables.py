"""Measurements to HTML; every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from workbench.card import verdict
from workbench.gates import Verdict
from workbench.measure.measurement import Measurement
from workbench.summary import layer_rows, provenance_rows, summary


def table(rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    """Return rows as an HTML table without an index."""
    return str(pd.DataFrame(rows).to_html(index=False, header=header, border=0, escape=True))


def verdict_box(point: Measurement) -> str:
    """Return the verdict sentence, to stand out."""
    return f'<p class="verdict">{escape(verdict(point))}</p>'


def summary_table(point: Measurement) -> str:
    """Return everything measured at this point."""
    return table([{"": what, "dense": dense, "compressed": compressed} for what, dense, compressed in summary(point)])


def layer_table(point: Measurement) -> str:
    """Return one row a layer."""
    return table(layer_rows(point))


def provenance_table(point: Measurement) -> str:
    """Return where the numbers come from."""
    return table([{"": name, " ": value} for name, value in provenance_rows(point)], header=False)


def points_table(points: Sequence[Measurement]) -> str:
    """Return the verdict of each point, smallest file first."""
    return table([{"recipe": p.recipe.label(), "what it costs and saves": verdict(p).split(": ", 1)[1]} for p in sorted(points, key=lambda p: p.sizes.file_bytes)])


def gates_box(verdicts: Sequence[Verdict]) -> str:
    """Return each gate with whether it held."""
    if not verdicts:
        return "<p>No gate was set: give <code>max_quality_drop</code>, <code>max_file_bytes</code> or <code>min_speedup</code>.</p>"
    lines = [f'<div class="gate {"held" if v.held else "failed"}"><b>{"held" if v.held else "failed"}</b> {escape(v.gate)}: {escape(v.words)}</div>' for v in verdicts]
    return "".join(lines)


def notes_list(point: Measurement) -> str:
    """Return what a reader must know about model and data."""
    return "".join(f"<li>{escape(note)}</li>" for note in point.warnings)
