"""A point in a line of a journal: what stands around its layers is read at once, the layers when they are
asked for.
"""

from __future__ import annotations

import json

from workbench.ledger.journal import CREATE_TRIAL, parsed
from workbench.measure.measurement import LAYERS, Measurement
from workbench.measure.stored_layers import StoredLayers

BEGIN = b'"measurement":"'
# The marks around the layers where the point is a string in a line of JSON
QUOTED = tuple(json.dumps(mark)[1:-1].encode() for mark in LAYERS)


def point_in(line: bytes, study: int) -> Measurement | None:
    """Return the measurement in a line that makes a trial of a study by number, None if the line does
    something else.

    Raises:
        pydantic.ValidationError: the trial holds no measurement.
        RecipeError: its recipe cannot be read, see `METHODS.from_json`.
        ValueError: the line is no JSON.
    """
    span = layers_in(line)
    short = line if span is None else line[: span[0]] + line[span[1] :]
    log = parsed(short)
    if log["op_code"] != CREATE_TRIAL or log["study_id"] != study:
        return None
    text = log.get("user_attrs", {}).get("measurement", "")
    if span is None:
        return Measurement.from_json(text)
    return Measurement.from_json(text, StoredLayers(b"[" + line[slice(*span)] + b"]"))


def layers_in(line: bytes) -> tuple[int, int] | None:
    """Return where the layers of the measurement in a line begin and end, None where they are not found for
    certain.

    Within a string of JSON every quote follows a backslash: what looks like the end of a string and the
    beginning of the next is just that, and no text in a point has the marks.
    """
    begin = line.find(BEGIN)
    start, end = line.find(QUOTED[0], begin), line.rfind(QUOTED[1])
    if not 0 < begin < start < end:
        return None
    leaves = any(line.find(edge, begin + len(BEGIN), end) >= 0 for edge in (b'","', b'"},"'))
    return None if leaves else (start + len(QUOTED[0]), end)
