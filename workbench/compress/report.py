"""The per-layer report: what was done to each weight, what it cost, or why nothing was done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from workbench.compress.layers import Layer, find_layers

if TYPE_CHECKING:
    from workbench.compress.work import Work


@dataclass(frozen=True)
class LayerReport:
    """One weight of the dense model. `shape` is [outputs, inputs]; None means that the property does not apply.

    `sparsity` is the fraction of exact zeros, `bits` the width of the codes, `relative_error` ||W' - W|| / ||W||
    (Frobenius), `weights` the number of weights now stored, zeros included.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    sparsity: float | None
    rank: int | None
    bits: int | None
    relative_error: float | None
    outcome: str


def layer_reports(work: Work) -> tuple[LayerReport, ...]:
    """Return one report for every weight of the dense model, in the order of its modules."""
    dense, _ = find_layers(work.task.model)
    return tuple(one_report(name, words, dense.get(name), [x for x in work.layers.values() if x.origin == name], work) for name, words in work.outcomes.items())


def one_report(name: str, words: list[str], dense: Layer | None, now: list[Layer], work: Work) -> LayerReport:
    """Return the report of one weight; `now` holds the layer, its two factors, or nothing if no method can take it."""
    outcome = "; ".join(words) or work.left.get(name, "left dense")
    if dense is None or not now:
        weight = work.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)  # noqa: S101  for the type checker: find_layers has seen it
        return LayerReport(name, tuple(weight.shape), weight.numel(), None, None, None, None, outcome)
    original = dense.matrix()
    current = now[0].matrix() if len(now) == 1 else now[1].matrix() @ now[0].matrix()
    stored = [layer.matrix() for layer in now]
    count = sum(matrix.numel() for matrix in stored)
    zeros = sum(int((matrix == 0).sum()) for matrix in stored)
    norm = float(original.norm())
    error = None if norm == 0 else float((current - original).norm()) / norm
    bits = now[0].grid.bits if now[0].grid is not None else None
    return LayerReport(name, tuple(original.shape), count, zeros / count, now[0].rank, bits, error, outcome)
