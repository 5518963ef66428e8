"""A measurement as rows of words, for a terminal and for a page."""

from __future__ import annotations

import math

from workbench.compress.core.coverage import share_words
from workbench.compress.core.layer_report import LayerReport
from workbench.measure.card import divergence_words, nothing_known, speed_words, touched_words
from workbench.measure.measurement import Measurement
from workbench.metrics.metrics import metric_named
from workbench.util.text import size

LAYER_COLUMNS = (
    "layer",
    "shape",
    "share of weights",
    "weights stored",
    "zeros",
    "rank",
    "bits",
    "relative error",
    "what happened",
)


def summary(point: Measurement) -> list[tuple[str, str, str]]:
    """Return (what, dense, compressed) rows of everything measured at this point."""
    before, after, latency = point.dense_sizes, point.sizes, point.latency
    rows = [
        (q.metric, metric_named(q.metric).interval(q.dense), metric_named(q.metric).interval(q.compressed))
        for q in point.quality
    ]
    rows += [
        (f"paired change of {q.metric}", "", metric_named(q.metric).change_words(q.change))
        for q in point.quality
    ]
    if point.flips is not None:
        share = f"{point.flips.value:.1%} [{point.flips.low:.1%}, {point.flips.high:.1%}]"
        rows.append(("answers that changed", "", share))
    if point.kl is not None:
        rows.append(("KL to dense", "", divergence_words(point)))
    rows += [
        (
            name.replace("_", " "),
            f"{getattr(before, name):,}",
            f"{getattr(after, name):,} ({getattr(before, name) / getattr(after, name):.2f}x smaller)",
        )
        for name in ("theoretical_bytes", "packed_bytes", "file_bytes")
    ]
    rows.append(("weights touched by the recipe", "", touched_words(point)))
    if latency is not None:
        where = f"batch {latency.batch} of {'x'.join(map(str, latency.input_shape))}"
        rows.append(
            (
                f"latency, median and 95th percentile ({where})",
                f"{latency.dense_median_ms:.2f}, {latency.dense_p95_ms:.2f} ms",
                f"{latency.median_ms:.2f}, {latency.p95_ms:.2f} ms",
            )
        )
        if latency.real_time_factors is not None:
            factors = latency.real_time_factors
            rows.append(
                (
                    "real-time factor: seconds of work per second of sound",
                    f"{factors[0]:.3f}",
                    f"{factors[1]:.3f}",
                )
            )
        rows.append(("speed against dense", "", speed_words(point)))
        rows.append(("run by", "", "; ".join((f"runtime {point.context.runtime}", *point.kernels))))
    if point.peak_memory_bytes is not None:
        rows.append(
            ("peak memory of that batch", size(point.dense_peak_memory_bytes), size(point.peak_memory_bytes))
        )
    if point.cache is not None:
        kept = point.cache
        rows.append(
            (
                f"keys and values kept of {kept.context:,} tokens, bytes",
                f"{kept.dense:,}",
                f"{kept.compressed:,} ({kept.dense / kept.compressed:.2f}x smaller)",
            )
        )
    if point.margin is not None:
        rows.append(
            (
                "evaluation items read",
                "",
                (
                    f"{point.items:,} of {point.items_total:,}: stopped on purpose, the change of"
                    f" {point.primary.metric} was known to"
                    f" ±{metric_named(point.primary.metric).amount(point.margin)}"
                ),
            )
        )
    if point.predicted is not None:
        rows.append((f"{point.predicted.metric} as predicted before", "", told(point)))
    rows += [(f"not measured: {name}", "", why) for name, why in point.missing.items()]
    return rows


def layer_rows(point: Measurement) -> list[dict[str, str]]:
    """Return one row a layer: shape, what is stored now, relative error, what was applied or why not; then
    one for each sort of parameter beside the layers that was left as it was.
    """
    covered = point.coverage
    total = None if covered is None else covered.weights
    rows = [
        {
            "layer": row.name,
            "shape": "x".join(map(str, row.shape)),
            "share of weights": share_of(row, total),
            "weights stored": f"{row.weights:,}",
            "zeros": "" if row.sparsity is None else f"{row.sparsity:.1%}",
            "rank": "" if row.rank is None else str(row.rank),
            "bits": "" if row.bits is None else str(row.bits),
            "relative error": "" if row.relative_error is None else f"{row.relative_error:.4f}",
            "what happened": row.outcome,
        }
        for row in point.layers
    ]
    if covered is None:
        return rows
    return rows + [
        dict.fromkeys(LAYER_COLUMNS, "")
        | {
            "layer": part.name,
            "share of weights": share_words(part.weights / covered.weights),
            "weights stored": f"{part.weights:,}",
            "what happened": f"{part.reason} ({part.tensors} tensors)" if part.tensors > 1 else part.reason,
        }
        for part in covered.untouched
        if not part.layers
    ]


def share_of(row: LayerReport, total: int | None) -> str:
    """Return a layer's share of the dense model's weights in words, "" where it is unknown or the weight is
    counted under another name.
    """
    counted_elsewhere = not row.weights and row.relative_error is None
    return "" if total is None or counted_elsewhere else share_words(math.prod(row.shape) / total)


def provenance_rows(point: Measurement) -> list[tuple[str, str]]:
    """Return where the numbers come from."""
    context, provenance = point.context, point.provenance
    return [
        ("model", f"{context.model_name} (weights {context.model_fingerprint})"),
        ("data", f"{context.data_name} (items {context.data_fingerprint})"),
        (
            "evaluation, calibration, training items",
            (
                f"{point.items:,}, {provenance.calibration_items:,}, {provenance.training_items:,};"
                " no evaluation item is among the others"
            ),
        ),
        (
            "intervals",
            (
                f"{point.primary.confidence:.0%}, joint over {point.primary.looks} look(s), paired with the"
                " dense model on the same items"
            ),
        ),
        ("recipe", repr(point.recipe)),
        ("ledger key", point.key),
        ("device", context.device_name),
        (
            "measured",
            (
                f"{provenance.time}; compression {provenance.compress_seconds:.2f} s, evaluation"
                f" {provenance.evaluate_seconds:.2f} s"
            ),
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
        ("git revision", provenance.git_revision or "not in a git work tree"),
    ]


def told(row: Measurement) -> str:
    """Return the prediction of a point in words, and whether it held, "" if there was none; where nothing
    was known, that.
    """
    if row.predicted is None:
        return ""
    if row.predicted.unknown:
        return f"unknown: {nothing_known(row.predicted.unknown, 'it')}"
    metric, guess = metric_named(row.predicted.metric), row.predicted.quality
    held = guess.low <= row.primary.compressed.value <= guess.high
    return (
        f"{metric.words(guess.value)} [{metric.words(guess.low)},"
        f" {metric.words(guess.high)}]{' (a guess)' if row.predicted.wide else ''}:"
        f" {'held' if held else 'did not hold'}"
    )
