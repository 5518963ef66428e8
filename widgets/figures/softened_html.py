"""What temperature does to one answer, as a small table with bars for the panel; pure."""

from __future__ import annotations

from html import escape

from workbench.report.temperature_lesson import Softened

MOST = 5  # answers shown
WIDEST = 90  # pixels


def softened_html(record: Softened) -> str:
    """Return the dense model's likeliest answers to one item, with what each temperature makes of them."""
    heads = "".join(
        f"<th>T = {temperature:g}, {entropy:.2f} nats</th>"
        for temperature, entropy in zip(record.temperatures, record.entropy, strict=True)
    )
    rows = "".join(
        f"<tr><td>{escape(answer)}</td>{''.join(bar(line[place]) for line in record.probabilities)}</tr>"
        for place, answer in enumerate(record.answers[:MOST])
    )
    about = (
        f"What the student is taught for training item {record.item}, in truth {escape(record.truth)}: the"
        " dense model's answer, softened by the temperature."
    )
    return (
        f"<div class='wb-softened'><p>{about}</p><table><thead><tr><th>answer</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def bar(share: float) -> str:
    """Return a cell with a bar as long as the probability, and the probability."""
    return f"<td><span class='wb-share' style='width:{WIDEST * share:.1f}px'></span> {share:.1%}</td>"
