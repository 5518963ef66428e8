"""Compression Workbench: see how small and fast a model can get, and what it costs.

    import workbench as wb
    bench = wb.Bench("fashion-vit")
    point = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)))

Importing loads nothing: each name is fetched on first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench import errors
    from workbench.bench import Bench
    from workbench.card import verdict
    from workbench.compress import QAT, Activations, Distill, KVCache, LowRank, Prune, Quantize, Repair, Transfer, compress
    from workbench.export import load
    from workbench.ledger import Ledger
    from workbench.measure.measurement import Measurement
    from workbench.recipe import METHODS, Recipe, Step, configuration
    from workbench.report import report
    from workbench.sweep import sweep
    from workbench.tradeoff import pareto, tradeoff
    from workbench.zoo import models

PLACES = {
    "Activations": "workbench.compress",
    "METHODS": "workbench.recipe",
    "Bench": "workbench.bench",
    "Distill": "workbench.compress",
    "KVCache": "workbench.compress",
    "Ledger": "workbench.ledger",
    "LowRank": "workbench.compress",
    "Measurement": "workbench.measure.measurement",
    "Prune": "workbench.compress",
    "QAT": "workbench.compress",
    "Quantize": "workbench.compress",
    "Recipe": "workbench.recipe",
    "Repair": "workbench.compress",
    "Step": "workbench.recipe",
    "Transfer": "workbench.compress",
    "compress": "workbench.compress",
    "configuration": "workbench.recipe",
    "errors": "workbench.errors",
    "load": "workbench.export",
    "models": "workbench.zoo",
    "pareto": "workbench.tradeoff",
    "report": "workbench.report",
    "sweep": "workbench.sweep",
    "tradeoff": "workbench.tradeoff",
    "verdict": "workbench.card",
}

__all__ = list(PLACES)


class Package(ModuleType):
    """The package itself. Importing the submodule `workbench.sweep` must not hide the public function `workbench.sweep`."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Put the public object of a submodule in the place of the submodule of the same name."""
        if isinstance(value, ModuleType) and name != "errors" and PLACES.get(name) == f"workbench.{name}":
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Fetch a public name on first use."""
        if name not in PLACES:
            raise AttributeError(f"module 'workbench' has no attribute {name!r}")
        module = importlib.import_module(PLACES[name])
        return module if name == "errors" else getattr(module, name)

    def __dir__(self) -> list[str]:
        """List the public names."""
        return sorted(PLACES)


sys.modules[__name__].__class__ = Package
