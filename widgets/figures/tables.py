"""Measurements to HTML; every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from workbench.measure.card import quality_words, verdict
from workbench.measure.measurement import Measurement
from workbench.measure.summary import layer_rows, provenance_rows, summary
from workbench.report.gates import Verdict
from workbench.report.report import Job
from workbench.report.report_points import Moved
from workbench.util.text import size


def table(rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    """Return rows as an HTML table without an index."""
    import pandas as pd  # 0.3 s, which a panel need not wait for

    return str(pd.DataFrame(rows).to_html(index=False, header=header, border=0, escape=True))


def job_box(job: Job) -> str:
    """Return what the report is about."""
    return f"<p><b>{escape(job.model)}</b> &middot; <code>{escape(repr(job.recipe))}</code></p>"


def verdict_box(point: Measurement) -> str:
    """Return the verdict sentence, to stand out."""
    return f'<p class="verdict">{escape(verdict(point))}</p>'


def summary_table(point: Measurement) -> str:
    """Return everything measured at this point."""
    return table(
        [{"": what, "dense": dense, "compressed": compressed} for what, dense, compressed in summary(point)]
    )


def layer_table(point: Measurement) -> str:
    """Return one row a layer."""
    return table(layer_rows(point))


def provenance_table(point: Measurement) -> str:
    """Return where the numbers come from."""
    return table([{"": name, " ": value} for name, value in provenance_rows(point)], header=False)


def points_table(points: Sequence[Measurement]) -> str:
    """Return one row a point, smallest file first, every number with its interval."""
    return table(
        [
            {
                "recipe": p.recipe.label(),
                p.primary.metric: quality_words(p.primary).removeprefix(f"{p.primary.metric} "),
                "file": size(p.sizes.file_bytes),
                "smaller": f"{p.shrink:.2f}x",
                "speed against dense": (
                    ""
                    if p.latency is None
                    else (
                        f"{p.latency.speedup.value:.2f}x ({p.latency.speedup.low:.2f} to"
                        f" {p.latency.speedup.high:.2f})"
                    )
                ),
            }
            for p in sorted(points, key=lambda p: p.sizes.file_bytes)
        ]
    )


def left_out_list(moves: Sequence[Moved]) -> str:
    """Return which points of which slider a report had no time for; nothing if it had."""
    found = "".join(f"<li>{escape(words)}</li>" for one in moves if (words := one.words()))
    more = (
        "Made again, this report goes on from here, since no point is measured twice; with"
        " <code>slider_minutes = 0</code> it waits for all."
    )
    return f"<ul>{found}</ul><p>{more}</p>" if found else ""


def gates_box(verdicts: Sequence[Verdict]) -> str:
    """Return each gate with whether it held."""
    if not verdicts:
        return (
            "<p>No gate was set: give <code>max_quality_drop</code>, <code>max_file_bytes</code> or"
            " <code>min_speedup</code>.</p>"
        )
    lines = [
        f'<div class="gate {"held" if v.held else "failed"}"><b>{"held" if v.held else "failed"}</b>'
        f" {escape(v.gate)}: {escape(v.words)}</div>"
        for v in verdicts
    ]
    return "".join(lines)


def notes_list(point: Measurement) -> str:
    """Return what a reader must know about model and data."""
    return (
        f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in point.warnings)}</ul>" if point.warnings else ""
    )
