"""Words for people: the verdict sentence and the model card of an export."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.compress.core.coverage import share_words
from workbench.measure.measurement import CHANGED, Measurement
from workbench.metrics.class_recall import lost_words
from workbench.metrics.metrics import metric_named
from workbench.metrics.quality import Estimate, Quality
from workbench.util.markup import markdown_code, markdown_text
from workbench.util.text import size


def quality_words(quality: Quality) -> str:
    """Return such as `accuracy 93.1% to 92.3% (-0.8 points, -1.3 to -0.3)`."""
    metric = metric_named(quality.metric)
    return (
        f"{quality.metric} {metric.words(quality.dense.value)} to {metric.words(quality.compressed.value)}"
        f" ({metric.change_words(quality.change)})"
    )


def nothing_known(methods: Sequence[str], metric: str) -> str:
    """Return such as `nothing is known of how Prune changes accuracy`: no rule and no point says it."""
    verb = "changes" if len(methods) == 1 else "change"
    return f"nothing is known of how {' and '.join(methods)} {verb} {metric}"


def predicted_words(metric: str, quality: Estimate | None, *, wide: bool, unknown: Sequence[str]) -> str:
    """Return such as `accuracy ~92.3% [90.1%, 93.0%]`; no number where nothing says one."""
    if unknown:
        return f"{metric} unknown ({nothing_known(unknown, 'it')})"
    if quality is None:
        return f"{metric} unknown yet"
    return f"{metric} ~{metric_named(metric).interval(quality)}{', a guess' if wide else ''}"


def divergence_words(point: Measurement) -> str:
    """Return such as `0.0121 [0.0101, 0.0141] nats a token, of 4,096 tokens in 64 windows`.

    "" where it is not known.
    """
    if point.kl is None:
        return ""
    if point.primary.metric == "perplexity":
        of = f"a token, of {point.kl_answers:,} tokens in {point.kl_items:,} windows"
    elif point.kl_answers != point.kl_items:
        of = f"an answer, of {point.kl_answers:,} answers in {point.kl_items:,} items"
    else:
        of = f"an item, of {point.kl_items:,} items"
    return f"{point.kl.value:.3g} [{point.kl.low:.3g}, {point.kl.high:.3g}] nats {of}"


def changed_words(point: Measurement) -> str:
    """Return such as `1.2% (0.8% to 1.9%)`, or why it is not known how many answers changed."""
    if point.flips is None:
        return point.missing.get(CHANGED, "not known yet")
    return f"{point.flips.value:.1%} ({point.flips.low:.1%} to {point.flips.high:.1%})"


def touched_words(point: Measurement) -> str:
    """Return such as `62.3% of 134,515,008 weights`: what share of the model the recipe touched, or that it
    is not known.
    """
    return "unknown: measured before it was counted" if point.coverage is None else point.coverage.words()


def touched_share(point: Measurement) -> str:
    """Return such as `62.3%`, or `unknown`."""
    return "unknown" if point.coverage is None else share_words(point.coverage.share)


def notes(point: Measurement) -> tuple[str, ...]:
    """Return the notes on a point: first that most weights were left, if they were."""
    little = "" if point.coverage is None else point.coverage.warning()
    return (*([little] if little else []), *point.warnings)


def speed_words(point: Measurement) -> str:
    """Return the measured speed against dense, and why no kernel helps where none does."""
    if point.latency is None:
        return (
            f"latency not measured: {point.missing['latency']}"
            if "latency" in point.missing
            else "latency not measured yet"
        )
    speed = point.latency.speedup
    text = f"{speed.value:.2f}x as fast{point.latency.against} ({speed.low:.2f} to {speed.high:.2f})"
    if point.latency.real_time_factors is not None:
        before, after = point.latency.real_time_factors
        text += f", real-time factor {before:.3f} to {after:.3f}"
    return f"{text}: {'; '.join(point.no_kernel)}" if point.no_kernel else text


def verdict(point: Measurement) -> str:
    """Return one sentence that says what the recipe costs and saves, every number measured."""
    smaller = (
        f"{point.shrink:.2f}x smaller on disk ({size(point.dense_sizes.file_bytes)} to"
        f" {size(point.sizes.file_bytes)})"
    )
    touched = "" if point.coverage is None else f"{touched_share(point)} of the weights touched"
    lost = lost_words(point.lost_classes)
    facts = (quality_words(point.primary), smaller, touched, speed_words(point), lost)
    return f"{point.recipe.label()}: {'; '.join(part for part in facts if part)}."


def card(point: Measurement) -> str:
    """Return the model card of an export as Markdown."""
    context, provenance = point.context, point.provenance
    rows = [
        *((q.metric, quality_words(q).removeprefix(f"{q.metric} ")) for q in point.quality),
        ("changed answers", changed_words(point)),
        *([("KL to dense", divergence_words(point))] if point.kl is not None else []),
        (
            "theoretical, packed, file bytes",
            f"{point.sizes.theoretical_bytes:,}, {point.sizes.packed_bytes:,}, {point.sizes.file_bytes:,}",
        ),
        ("dense file bytes", f"{point.dense_sizes.file_bytes:,}"),
        ("touched by the recipe", touched_words(point)),
        ("speed", speed_words(point)),
        (
            "evaluated on",
            (
                f"{point.items:,} items of {context.data_name}; {point.primary.confidence:.0%} intervals,"
                " paired with the dense model"
            ),
        ),
        ("calibrated on", f"{provenance.calibration_items:,} other items"),
        ("measured on", f"{context.device_name}, {provenance.time}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
    ]
    told = [("recipe", markdown_code(repr(point.recipe)))]
    told += [(markdown_text(name), markdown_text(value)) for name, value in rows]
    table = "\n".join(f"| {name} | {value} |" for name, value in told)
    said = "".join(f"\n- {markdown_text(note)}" for note in notes(point))
    heading = "\n\n## Notes\n"
    return f"""# {markdown_text(context.model_name)}, compressed

{markdown_text(verdict(point))}

| | |
|---|---|
{table}

Load it with `import workbench as wb; model = wb.load("this directory")`: an ordinary transformers
model with the outputs that were measured. The weights in `model.safetensors` are packed;
`compression.json` says how.{said and heading + said}
"""
