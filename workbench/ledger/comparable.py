"""Which points may be set side by side."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice
from operator import attrgetter

from workbench.measure.measurement import Context, Measurement


def comparable(rows: list[Measurement], context: Context, most: int | None = None) -> list[Measurement]:
    """Return the complete rows of the same model, data and device, whatever version of the workbench measured
    them; the newest `most`, None all.
    """
    same = attrgetter(*(field.name for field in fields(context) if field.name != "workbench_version"))
    wanted = same(context)
    return list(
        islice((row for row in reversed(rows) if row.complete and same(row.context) == wanted), most)
    )[::-1]
