"""The dense model in the head of the panel: what every point is compared with."""

from __future__ import annotations

from html import escape

import ipywidgets as ipw

from widgets.session.state import PanelState
from workbench.measure.measurement import Measurement
from workbench.metrics.metrics import metric_named
from workbench.util.text import size


class DenseLine(ipw.HTML):
    """Quality, size and time of the dense model; empty until they are measured."""

    def __init__(self) -> None:
        """Say that something loads."""
        super().__init__("loading ...")
        self.add_class("wb-dense")

    def show(self, state: PanelState) -> None:
        """Show the dense model as it is best known."""
        self.value = "" if state.anchor is None else dense_html(state.anchor)


def dense_html(point: Measurement) -> str:
    """Return the dense model that a point was compared with, in HTML."""
    quality, latency, context = point.primary, point.latency, point.context
    facts = [
        f"dense: <b>{metric_named(quality.metric).words(quality.dense.value)}</b> {escape(quality.metric)}",
        size(point.dense_sizes.file_bytes),
    ]
    if latency is not None:
        facts.append(f"{latency.dense_median_ms:.1f} ms")
        if latency.real_time_factors:
            facts.append(f"real-time factor {latency.real_time_factors[0]:.3f}")
    about = f"{quality.metric} on {point.items:,} items of {context.data_name}; {context.device_name}"
    return f"<span title='{escape(about)}'><b>\N{BLACK STAR}</b> {' &middot; '.join(facts)}</span>"
