"""Layer by layer: what was done to each weight and what it cost, as a table with bars."""

from __future__ import annotations

from html import escape

import ipywidgets as ipw

from workbench.compress.report import LayerReport
from workbench.measure.measurement import Measurement

TIMES = "\N{MULTIPLICATION SIGN}"


class LayerView(ipw.HTML):
    """The layers of the latest point."""

    def __init__(self) -> None:
        """Start with what to do."""
        super().__init__("<p class='wb-dim'>Move a slider: every layer is listed here with what happened to it.</p>")
        self.add_class("wb-table")
        self.shown = ""

    def show(self, point: Measurement | None) -> None:
        """Show a point's layers; the many looks at one point change nothing here."""
        if point is None or point.key == self.shown:
            return
        self.shown = point.key
        self.value = layers_html(point)


def layers_html(point: Measurement) -> str:
    """Return one row a layer: a bar for its relative error, cells shaded by zeros, rank and bits."""
    worst = max((row.relative_error or 0.0 for row in point.layers), default=0.0)
    body = "".join(row_html(row, worst) for row in point.layers)
    heads = "".join(f"<th scope='col'>{name}</th>" for name in ("layer", "shape", "zeros", "rank", "bits", "relative error of its weights", "what happened"))
    return f"<p class='wb-dim'>{escape(point.recipe.label())}</p><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def row_html(row: LayerReport, worst: float) -> str:
    """Return one layer as a table row."""
    zeros = row.sparsity if row.sparsity is not None and row.sparsity > 0.0005 else None
    full = min(row.shape[0], max(1, row.shape[-1]))
    cells = [
        f"<td>{escape(row.name)}</td><td>{TIMES.join(map(str, row.shape))}</td>",
        heat(zeros, f"{zeros:.0%}" if zeros is not None else ""),
        heat(None if row.rank is None else 1 - row.rank / full, "" if row.rank is None else str(row.rank)),
        heat(None if row.bits is None else 1 - row.bits / 16, "" if row.bits is None else str(row.bits)),
        bar(row.relative_error, worst),
        f"<td class='wb-words'>{escape(row.outcome)}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def heat(strength: float | None, words: str) -> str:
    """Return a cell shaded by how strongly the layer was compressed."""
    if strength is None:
        return "<td></td>"
    return f"<td style='background:rgba(59,130,246,{0.5 * max(0.0, min(1.0, strength)):.2f})'>{escape(words)}</td>"


def bar(error: float | None, worst: float) -> str:
    """Return a cell with a bar as long as the error."""
    if error is None:
        return "<td></td>"
    share = 100 * error / worst if worst else 0.0
    return f"<td><div class='wb-bar'><i style='width:{share:.0f}%'></i><span>{error:.3f}</span></div></td>"
