"""A comparison record to HTML: recipes with their differences marked, numbers with bars, layers; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from workbench.ledger.annotation import Annotation
from workbench.measure.card import quality_words
from workbench.metrics.quality import Quality
from workbench.search.compare import ComparedOption, Comparison, Fact, LayerErrors, facts

MOST_LAYERS = 24
DIFFERS = " class='wb-differs'"


def comparison_html(record: Comparison, said: Mapping[str, Annotation]) -> str:
    """Return the whole comparison."""
    rows = f"{choices_html(record)}{facts_html(record)}"
    table = f"<table class='wb-compare'>{head(record, said)}<tbody>{rows}</tbody></table>"
    return f"{noise_html(record)}{table}{layers_html(record)}"


def head(record: Comparison, said: Mapping[str, Annotation]) -> str:
    """Return a column a point: its number, recipe and note."""
    cells = ""
    for number, point in enumerate(record.points, 1):
        mark = said.get(point.key, Annotation())
        note = f"<small>{escape(mark.note)}</small>" if mark.note else ""
        cells += f"<th scope='col'><b>{number}</b> {escape(point.recipe.label())}{note}</th>"
    return f"<thead><tr><th></th>{cells}</tr></thead>"


def choices_html(record: Comparison) -> str:
    """Return one row an option: those that differ are marked, the others follow in grey as one line."""
    different = [choice for choice in record.choices if choice.differs]
    same = [choice for choice in record.choices if not choice.differs]
    rows = "".join(choice_html(choice) for choice in different)
    if same:
        text = ", ".join(f"{choice.step} {choice.option} {choice.texts[0]}" for choice in same)
        cell = f"<td class='wb-words' colspan='{len(record.points)}'>{escape(text)}</td>"
        rows += f"<tr><th scope='row'>the same</th>{cell}</tr>"
    return rows


def choice_html(choice: ComparedOption) -> str:
    """Return an option in which the recipes differ; what only some have is marked there."""
    common = max(set(choice.texts), key=choice.texts.count)
    shared = common if choice.texts.count(common) > 1 else None
    cells = "".join(
        f"<td{'' if value == shared else DIFFERS}>{escape(value) or '<i>no such step</i>'}</td>"
        for value in choice.texts
    )
    name = f"{choice.step} {choice.option.replace('_', ' ')}"
    return f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>"


def facts_html(record: Comparison) -> str:
    """Return one row a measured thing, with bars."""
    return "".join(fact_html(fact) for fact in facts(record))


def fact_html(fact: Fact) -> str:
    """Return one measured thing of every point."""
    lengths = fact.lengths or (None,) * len(fact.words)
    cells = "".join(
        f"<td>{bar(length)}{escape(text)}</td>" for text, length in zip(fact.words, lengths, strict=True)
    )
    return f"<tr><th scope='row'>{escape(fact.name)}</th>{cells}</tr>"


def bar(length: float | None) -> str:
    """Return a bar, `length` between 0 and 1 of the cell; nothing for None."""
    if length is None:
        return ""
    return f"<i class='wb-length' style='width:{100 * length:.1f}%' aria-hidden='true'></i>"


def noise_html(record: Comparison) -> str:
    """Return which points' quality differs beyond the noise, in words."""
    first = record.points[0].primary
    intervals = f"Their {first.confidence:.0%} intervals of {escape(first.metric)}"
    lines = []
    for name, verb, overlap in (
        ("Beyond the noise", "do not overlap", False),
        ("Not told apart", "overlap", True),
    ):
        pairs = [f"{a.first + 1} and {a.second + 1}" for a in record.apart if a.overlap is overlap]
        if pairs:
            lines.append(f"<b>{name}</b>: {', '.join(pairs)}. {intervals} {verb}.")
    about = (
        "Each interval is of the paired change against the dense model; this is no paired test of two points"
        " (the button makes one)."
    )
    if len({point.context.device_name for point in record.points}) > 1:
        about += " Times come from different devices."
    return f"<p>{'<br>'.join(lines)}<br><span class='wb-dim'>{about}</span></p>"


def layers_html(record: Comparison) -> str:
    """Return the layers whose weights changed, the worst first, with one bar a point."""
    changed = [layer for layer in record.layers if layer.worst > 0]
    if not changed:
        return "<p class='wb-dim'>No weight was changed in any of these points.</p>"
    top = changed[0].worst
    heads = "".join(f"<th scope='col'><b>{number}</b></th>" for number in range(1, len(record.points) + 1))
    body = "".join(layer_html(layer, top) for layer in changed[:MOST_LAYERS])
    top_left = "<th scope='col'>relative error of each layer's weights</th>"
    table = f"<thead><tr>{top_left}{heads}</tr></thead><tbody>{body}</tbody>"
    more = f"<p class='wb-dim'>The {MOST_LAYERS} worst of {len(changed):,} changed layers.</p>"
    return f"<table class='wb-compare'>{table}</table>{more if len(changed) > MOST_LAYERS else ''}"


def layer_html(layer: LayerErrors, top: float) -> str:
    """Return one layer; a point that left it as it was has a dash."""
    cells = ""
    for error, outcome in zip(layer.errors, layer.outcomes, strict=True):
        text = "\N{EN DASH}" if not error else f"{error:.3f}"
        cells += f"<td title='{escape(outcome)}'>{bar(error / top if error else None)}{text}</td>"
    return f"<tr><th scope='row'>{escape(layer.name)}</th>{cells}</tr>"


def paired_html(qualities: Sequence[Quality]) -> str:
    """Return the outcome of a paired test of every point against the first."""
    lines = []
    for number, quality in enumerate(qualities, 2):
        beyond = not quality.change.low <= 0 <= quality.change.high
        verdict = "differs beyond the noise" if beyond else "no difference shown"
        lines.append(f"<b>1 to {number}, {verdict}</b>: {escape(quality_words(quality))}")
    first, pairs = qualities[0], f"{len(qualities)} pair{'s' if len(qualities) > 1 else ''}"
    about = f"Paired on the same {first.items:,} items, {first.confidence:.0%} intervals, joint over {pairs}."
    return f"<p>{'<br>'.join(lines)}<br><span class='wb-dim'>{about}</span></p>"
