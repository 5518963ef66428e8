"""Points as one flat table: every number with its interval, units in the column names.

To files that pandas reads back.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import LedgerError
from workbench.ledger.annotation import Annotation
from workbench.measure.measurement import Measurement
from workbench.metrics.metrics import metric_named
from workbench.metrics.quality import Estimate, Quality
from workbench.util.markup import spreadsheet_text
from workbench.util.saving import PART

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".csv", ".jsonl")


def points_frame(
    rows: Iterable[Measurement], annotations: Mapping[str, Annotation] | None = None
) -> pd.DataFrame:
    """Return one row a point, in the order given; what was not measured is missing, never 0.

        frame = bench.ledger.frame()      # the same with this ledger's notes and pins

    `_low` and `_high` are the ends of an interval at `confidence`. `recipe_json` is what `METHODS.from_json`
    and the option `--recipe` take; `key` is the ledger's (read it back as text: `pandas.read_csv(path,
    dtype={"key": str})`).
    """
    import pandas as pd

    said = annotations or {}
    return pd.DataFrame([flat(row, said.get(row.key, Annotation())) for row in rows])


def flat(row: Measurement, said: Annotation) -> dict[str, Any]:
    """Return a point as one flat record."""
    context, provenance, latency = row.context, row.provenance, row.latency
    record: dict[str, Any] = {
        "key": row.key,
        "recipe": row.recipe.label(),
        "pinned": said.pinned,
        "note": said.note,
    }
    for quality in row.quality:
        record |= flat_quality(quality)
    record |= spread("changed_answers_fraction", row.flips) | spread("kl_to_dense_nats", row.kl)
    for name in ("theoretical_bytes", "packed_bytes", "file_bytes"):
        record |= {name: getattr(row.sizes, name), f"dense_{name}": getattr(row.dense_sizes, name)}
    record |= {
        "weights": None if row.coverage is None else row.coverage.weights,
        "touched_fraction": None if row.coverage is None else row.coverage.share,
    }
    for name in ("median_ms", "p95_ms", "dense_median_ms", "dense_p95_ms"):
        record[f"latency_{name}"] = None if latency is None else getattr(latency, name)
    if latency is not None and latency.real_time_factors is not None:  # of speech alone
        record |= dict(
            zip(("dense_real_time_factor", "real_time_factor"), latency.real_time_factors, strict=True)
        )
    record |= spread("speedup_ratio", None if latency is None else latency.speedup)
    record |= {
        "latency_batch_items": context.latency_batch,
        "latency_rounds": None if latency is None else latency.rounds,
        "peak_memory_bytes": row.peak_memory_bytes,
        "dense_peak_memory_bytes": row.dense_peak_memory_bytes,
        "items": row.items,
        "items_total": row.items_total,
        "confidence": row.primary.confidence,
        "looks": row.primary.looks,
        "kl_items": row.kl_items,
        "kl_answers": row.kl_answers,
        "calibration_items": provenance.calibration_items,
        "training_items": provenance.training_items,
        "compress_seconds": provenance.compress_seconds,
        "evaluate_seconds": provenance.evaluate_seconds,
        "measured_at_utc": provenance.time,
        "model": context.model_name,
        "model_fingerprint": context.model_fingerprint,
        "data": context.data_name,
        "data_fingerprint": context.data_fingerprint,
        "device": context.device,
        "device_name": context.device_name,
        "workbench_version": context.workbench_version,
        "runtime": context.runtime,
        "kernels": "; ".join(row.kernels),
        "no_kernel": "; ".join(row.no_kernel),
        "warnings": "; ".join(row.warnings),
        "missing": "; ".join(f"{name}: {why}" for name, why in row.missing.items()),
        "recipe_python": repr(row.recipe),
        "recipe_json": row.recipe.to_json(),
    }
    return record


def flat_quality(quality: Quality) -> dict[str, Any]:
    """Return one metric of both models and its paired change."""
    value, change = metric_named(quality.metric).columns
    return (
        spread(value, quality.compressed)
        | spread(f"dense_{value}", quality.dense)
        | spread(change, quality.change)
    )


def spread(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """Return an estimate as three columns."""
    values = (None,) * 3 if estimate is None else (estimate.value, estimate.low, estimate.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def save_points(
    rows: Sequence[Measurement], path: str | Path, annotations: Mapping[str, Annotation] | None = None
) -> Path:
    """Write points to `path` and return where they are.

    A file that is there already is kept, and the new name is numbered.

    `.csv` writes the table of `points_frame`; `.jsonl` writes one whole measurement a line (per-layer report
    included), which `Measurement.from_json` reads, with `note` and `pinned` beside it.

    Raises:
        LedgerError: nothing to write, another ending, or the place cannot be written.
    """
    target = Path(path).expanduser()
    if target.suffix not in FORMATS:
        raise LedgerError(
            f"cannot export points to {str(path)!r}: the name must end in {' or '.join(FORMATS)}"
        )
    if not rows:
        raise LedgerError(f"cannot export points to {str(path)!r}: nothing is measured yet")
    text = (
        table_text(rows, annotations or {})
        if target.suffix == ".csv"
        else lines_text(rows, annotations or {})
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return write_new(target, text)
    except OSError as error:
        raise LedgerError(
            f"cannot write {str(target)!r}: {error.strerror}; give another folder, such as"
            f" {str(Path.home() / target.name)!r}"
        ) from None


def table_text(rows: Sequence[Measurement], annotations: Mapping[str, Annotation]) -> str:
    """Return points as CSV; floats are written so that they come back as they were.

    A text that a spreadsheet would compute begins with `'` there: notes and names come from anywhere.
    """
    buffer = io.StringIO()
    frame = points_frame(rows, annotations)
    frame = frame.map(as_text).rename(columns=as_text)
    frame.to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue()


def lines_text(rows: Sequence[Measurement], annotations: Mapping[str, Annotation]) -> str:
    """Return points as lines of JSON."""
    said = [annotations.get(row.key, Annotation()) for row in rows]
    lines = [
        json.dumps({"pinned": mark.pinned, "note": mark.note, "measurement": json.loads(row.to_json())})
        for row, mark in zip(rows, said, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines)


def as_text(value: Any) -> Any:
    """Return a value of a table such that a spreadsheet shows it, and does not compute it."""
    return spreadsheet_text(value) if isinstance(value, str) else value


def write_new(target: Path, text: str) -> Path:
    """Write to `target`, or to `name-2`, `name-3`, ... beside it where that is taken: all of it or nothing.

    It is written under another name first, and gets its own once it is whole.
    """
    side = target.with_name(f".{target.name}-{os.getpid()}-{time.monotonic_ns()}{PART}")
    try:
        with side.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        number = 1
        while True:
            place = target if number == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
            try:
                put(side, place)
            except FileExistsError:
                number += 1
            else:
                return place
    finally:
        side.unlink(missing_ok=True)


def put(side: Path, place: Path) -> None:
    """Give a file its name, unless that is taken.

    Raises:
        FileExistsError: it is.

    """
    try:
        place.hardlink_to(side)
    except FileExistsError:
        raise
    except OSError:  # a disk without links
        place.open("x").close()
        side.replace(place)
