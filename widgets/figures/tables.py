"""Measurements to HTML; every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from workbench.measure.card import notes, quality_words, touched_share, verdict
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
    """Return the model and the recipe that the report is about."""
    return f"<p><b>{escape(job.model)}</b> &middot; <code>{escape(repr(job.recipe))}</code></p>"


def verdict_box(point: Measurement) -> str:
    """Return the verdict sentence, to stand out."""
    return f'<p class="verdict">{escape(verdict(point))}</p>'


def summary_table(point: Measurement) -> str:
    """Return everything measured at this point."""
    rows = summary(point)
    return table([{"": what, "dense": dense, "compressed": compressed} for what, dense, compressed in rows])


def layer_table(point: Measurement) -> str:
    """Return one row a layer."""
    return table(layer_rows(point))


def provenance_table(point: Measurement) -> str:
    """Return where the numbers come from."""
    return table([{"": name, " ": value} for name, value in provenance_rows(point)], header=False)


def points_table(points: Sequence[Measurement]) -> str:
    """Return one row a point, smallest file first, every number with its interval."""
    return table([point_row(point) for point in sorted(points, key=lambda p: p.sizes.file_bytes)])


def point_row(point: Measurement) -> dict[str, str]:
    """Return a point as one row."""
    quality, speed = point.primary, None if point.latency is None else point.latency.speedup
    return {
        "recipe": point.recipe.label(),
        quality.metric: quality_words(quality).removeprefix(f"{quality.metric} "),
        "file": size(point.sizes.file_bytes),
        "smaller": f"{point.shrink:.2f}x",
        "weights touched": touched_share(point),
        "speed against dense": (
            "" if speed is None else f"{speed.value:.2f}x ({speed.low:.2f} to {speed.high:.2f})"
        ),
    }


def left_out_list(moves: Sequence[Moved]) -> str:
    """Return which points of which slider a report had no time for; nothing if it had."""
    lines = "".join(f"<li>{escape(sentence)}</li>" for move in moves if (sentence := move.words()))
    more = (
        "Made again, this report goes on from here, since no point is measured twice; with"
        " <code>slider_minutes = 0</code> it waits for all."
    )
    return f"<ul>{lines}</ul><p>{more}</p>" if lines else ""


def gates_box(verdicts: Sequence[Verdict]) -> str:
    """Return each gate with whether it held."""
    if not verdicts:
        names = "<code>max_quality_drop</code>, <code>max_file_bytes</code> or <code>min_speedup</code>"
        return f"<p>No gate was set: give {names}.</p>"
    lines = []
    for gate in verdicts:
        outcome = "held" if gate.held else "failed"
        sentence = f"{escape(gate.gate)}: {escape(gate.words)}"
        lines.append(f'<div class="gate {outcome}"><b>{outcome}</b> {sentence}</div>')
    return "".join(lines)


def notes_list(point: Measurement) -> str:
    """Return the notes on model, data and recipe that a reader must know."""
    said = "".join(f"<li>{escape(note)}</li>" for note in notes(point))
    return f"<ul>{said}</ul>" if said else ""
