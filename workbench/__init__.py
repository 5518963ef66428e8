"""Compression Workbench: how small and fast can this model get, and what does it cost?

    import workbench as wb
    bench = wb.Bench("fashion-vit")
    point = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)))

Importing loads nothing: each name is fetched on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench import errors
    from workbench.bench import Bench
    from workbench.card import verdict
    from workbench.compress import Distill, LowRank, Prune, Quantize, compress
    from workbench.export import load
    from workbench.ledger import Ledger
    from workbench.measure.measurement import Measurement
    from workbench.recipe import METHODS, Recipe, Step, configuration
    from workbench.report import report
    from workbench.tradeoff import pareto, tradeoff
    from workbench.zoo import models

PLACES = {
    "METHODS": "workbench.recipe",
    "Bench": "workbench.bench",
    "Distill": "workbench.compress",
    "Ledger": "workbench.ledger",
    "LowRank": "workbench.compress",
    "Measurement": "workbench.measure.measurement",
    "Prune": "workbench.compress",
    "Quantize": "workbench.compress",
    "Recipe": "workbench.recipe",
    "Step": "workbench.recipe",
    "compress": "workbench.compress",
    "configuration": "workbench.recipe",
    "errors": "workbench.errors",
    "load": "workbench.export",
    "models": "workbench.zoo",
    "pareto": "workbench.tradeoff",
    "report": "workbench.report",
    "tradeoff": "workbench.tradeoff",
    "verdict": "workbench.card",
}

__all__ = list(PLACES)  # noqa: PLE0605  the same names as above, once


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Fetch a public name on first use (PEP 562)."""
    import importlib

    if name not in PLACES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    module = importlib.import_module(PLACES[name])
    return module if PLACES[name] == f"workbench.{name}" and name == "errors" else getattr(module, name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(PLACES)
