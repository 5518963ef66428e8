"""The strip under the plot: what a recipe costs and saves, what is only predicted, why nothing is faster."""

from __future__ import annotations

from html import escape

import ipywidgets as ipw

from widgets.session.state import PanelState, Phase
from workbench.measure.card import changed_words, divergence_words, notes, nothing_known, touched_words
from workbench.measure.measurement import Measurement
from workbench.metrics.class_recall import lost_words
from workbench.metrics.metrics import metric_named
from workbench.metrics.quality import Estimate, Quality
from workbench.predict.predictor import Prediction
from workbench.search.compare import time_words
from workbench.util.text import size

TIMES = "\N{MULTIPLICATION SIGN}"
PHASES: dict[Phase, str] = {
    "loading": "loading the model",
    "training": "training",
    "measuring": "predicted",
    "measured": "measured",
    "cancelled": "cancelled",
    "failed": "failed",
    "ready": "",
}


class VerdictStrip(ipw.HTML):
    """Shows the present state in words. Numbers that are predicted say so."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.add_class("wb-strip")

    def show(self, state: PanelState) -> None:
        """Show the present state."""
        self.value = strip(state)


def strip(state: PanelState) -> str:
    """Return the strip as HTML."""
    point, guess = state.point, state.prediction
    if point is None and guess is None:
        return f"<div class='wb-verdict'>{badge(state)}</div>"
    heads = [head_quality(point, guess), head_size(point, guess), head_speed(point, guess)]
    head = "".join(f"<div><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in heads)
    facts = "".join(
        f"<div><span>{escape(name)}</span>{escape(value)}</div>" for name, value in facts_of(point, guess)
    )
    said = "".join(f"<li>{escape(note)}</li>" for note in notes_of(point, guess))
    return (
        f"<div class='wb-verdict' role='status'>{badge(state)}{head}</div>"
        f"<div class='wb-facts'>{facts}</div><ul class='wb-notes'>{said}</ul>"
    )


def badge(state: PanelState) -> str:
    """Return the kind of these numbers as a badge: predicted, measured on so many items, or measured."""
    text, point = PHASES[state.phase], state.point
    if state.doing and state.phase == "measuring":
        text = f"{text}: {state.doing}"
    if point is not None and (not point.complete or point.margin is not None):
        kind = "stopped" if state.phase == "cancelled" else "measured"
        text = f"{kind}: {point.items:,} of {point.items_total:,} items"
        text += ", timing" if state.phase == "measuring" and only_timed(point) else ""
    return f"<div title='{escape(text)}' class='wb-badge wb-{state.phase}'>{escape(text)}</div>"


def only_timed(point: Measurement) -> bool:
    """Return whether quality is known, and only time and memory are still being measured."""
    return point.known_to(point.margin) and point.latency is None and "latency" not in point.missing


def plus_minus(quality: Quality) -> tuple[str, str]:
    """Return the paired change and its interval: `-0.8 points` and `-1.3 to -0.3 at 95%`."""
    change, metric = quality.change, metric_named(quality.metric)
    scale, digits = metric.change_scale, metric.change_digits()
    value, low, high = (signed(scale * end, digits) for end in (change.value, change.low, change.high))
    unit = metric.change_unit and f" {metric.change_unit}"
    return f"{value}{unit}", f"{quality.metric}, {low} to {high} at {quality.confidence:.0%}"


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign and a real minus.

    No minus zero, large ones with two digits that count: `+2,500`.
    """
    if abs(value) >= 1000:
        text = f"{float(f'{value:.2g}'):+,.0f}" if abs(value) < 1e6 else f"{value:+.2g}"
    elif not float(text := f"{value:+.{digits}f}"):
        return f"±{text[1:]}"
    return text.replace("-", "\N{MINUS SIGN}")


def head_quality(point: Measurement | None, guess: Prediction | None) -> tuple[str, str]:
    """Return the quality in large and small words."""
    if point is not None:
        return plus_minus(point.primary)
    if guess is None or guess.quality is None:
        return "?", "quality unknown yet"
    if guess.unknown:
        return "?", f"{nothing_known(guess.unknown, guess.metric)} before it is measured"
    value = metric_named(guess.metric).words(guess.quality.value)
    interval = ": a guess" if guess.wide else f", {span(guess.quality, guess.metric)}"
    return f"~{value}", f"{guess.metric}, predicted{interval}"


def span(estimate: Estimate, metric: str) -> str:
    """Return an interval of a metric."""
    written = metric_named(metric).words
    return f"{written(estimate.low)} to {written(estimate.high)}"


def head_size(point: Measurement | None, guess: Prediction | None) -> tuple[str, str]:
    """Return the size in large and small words."""
    if point is not None:
        dense, mine = size(point.dense_sizes.file_bytes), size(point.sizes.file_bytes)
        return f"{point.shrink:.2f}{TIMES} smaller", f"on disk: {dense} to {mine}"
    if guess is None or guess.file_bytes is None:
        return "?", "size unknown yet"
    return size(guess.file_bytes), "on disk, exact" if guess.bytes_exact else "on disk at most"


def head_speed(point: Measurement | None, guess: Prediction | None) -> tuple[str, str]:
    """Return the speed in large and small words."""
    if point is not None and point.latency is not None:
        speed = point.latency.speedup
        said = f"measured, {speed.low:.2f} to {speed.high:.2f} at 95%"
        dense = f", dense in {point.latency.dense_type}" if point.latency.dense_type else ""
        return f"{speed.value:.2f}{TIMES} as fast", said + dense
    if guess is not None and guess.speedup is not None:
        return f"~{guess.speedup.value:.2f}{TIMES} as fast", "predicted, not measured yet"
    return "?", "speed not measured yet"


def facts_of(point: Measurement | None, guess: Prediction | None) -> list[tuple[str, str]]:
    """Return the smaller facts: three sizes, two latencies, items."""
    if point is None:
        return [
            ("theoretical", "…"),
            ("packed", "…"),
            ("file", size(guess.file_bytes) if guess else "…"),
            ("time predicted", predicted_ms(point, guess)),
            *bound(guess),
            ("time measured", "…"),
            ("items", "…"),
        ]
    latency = point.latency
    read, others = f"{point.items:,} of {point.items_total:,}", point.provenance.calibration_items
    return [
        ("theoretical", size(point.sizes.theoretical_bytes)),
        ("packed", size(point.sizes.packed_bytes)),
        ("file", f"{size(point.sizes.file_bytes)} of {size(point.dense_sizes.file_bytes)}"),
        ("touched", touched_words(point)),
        ("time predicted", predicted_ms(point, guess)),
        *bound(guess),
        ("time measured", time_words(point) if latency else point.missing.get("latency", "…")),
        ("run by", "; ".join((point.context.runtime, *point.kernels))),
        ("items", f"{read}; {others:,} others for calibration"),
        ("answers changed", changed_words(point)),
        *([("KL to dense", divergence_words(point))] if point.kl is not None else []),
    ]


def bound(guess: Prediction | None) -> list[tuple[str, str]]:
    """Return the bound of the model, memory or arithmetic, as far as it is known."""
    if guess is None or guess.roof is None:
        return []
    waits = f"{guess.roof.bound}: {guess.roof.memory:.0%} of the time waits for memory"
    return [("bound by", f"{waits}; {guess.roof.ratio:.2f}{TIMES} as fast by bandwidth and arithmetic")]


def predicted_ms(point: Measurement | None, guess: Prediction | None) -> str:
    """Return the predicted time: in milliseconds if the dense model's is known, else as a ratio."""
    if guess is None:
        return "…"
    if guess.speedup is None:
        return "unknown"
    if point is None or point.latency is None:
        return f"{1 / guess.speedup.value:.2f}{TIMES} dense"
    return f"{point.latency.dense_median_ms / guess.speedup.value:.2f} ms"


def notes_of(point: Measurement | None, guess: Prediction | None) -> list[str]:
    """Return reasons and warnings: why no kernel helps, what the numbers cannot say."""
    reasons = point.no_kernel if point is not None else guess.no_kernel if guess is not None else ()
    said = [f"no faster here: {reason}" for reason in reasons]
    if point is not None:
        said += doubts(point)
        said += notes(point)
    elif guess is not None:
        said += guess.notes
    return said


def doubts(point: Measurement) -> list[str]:
    """Return sentences on what the measured numbers do not show."""
    drop = point.primary.drop
    sentences = [lost] if (lost := lost_words(point.lost_classes)) else []
    if len(point.recipe) and drop.low <= 0 <= drop.high:
        sentences.append("the change of quality is within the noise: its interval holds zero")
    if point.latency is not None and len(point.recipe) and point.latency.speedup.high < 1:
        cause = (
            f"what {', '.join(point.kernels)} save is less than what rounding and unpacking cost at this size"
            if point.kernels
            else "the compressed form takes more steps, and no kernel makes up for them"
        )
        sentences.append(f"slower than the dense model here: {cause}")
    return sentences
