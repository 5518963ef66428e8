"""Compression Workbench: see how small and fast a model can get, and what it costs.

    import workbench as wb
    bench = wb.Bench("fashion-vit")
    point = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)))

`METHODS`, `CRITERIA`, `FORMATS`, `KINDS` and `METRICS` are the registries: what is added to them from outside
works like what is built in (CONTRIBUTING.md shows how).

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
    from workbench.compress import (
        QAT,
        Activations,
        Distill,
        KVCache,
        LowRank,
        Prune,
        Quantize,
        Repair,
        Transfer,
        compress,
    )
    from workbench.compress.pruning.criteria import CRITERIA
    from workbench.compress.pruning.criterion import Criterion
    from workbench.compress.registry import METHODS
    from workbench.export import load
    from workbench.formats.number_format import NumberFormat
    from workbench.formats.number_formats import FORMATS
    from workbench.ledger.ledger import Ledger
    from workbench.ledger.pareto import pareto, tradeoff
    from workbench.measure.card import verdict
    from workbench.measure.measurement import Measurement
    from workbench.metrics.metric import Metric
    from workbench.metrics.metrics import METRICS
    from workbench.recipe import Recipe, Step
    from workbench.report.report import report
    from workbench.search.sweep import sweep
    from workbench.tasks.base import Kind
    from workbench.tasks.registry import KINDS
    from workbench.util.configuration import configuration
    from workbench.zoo import models

PLACES = {
    "Activations": "workbench.compress",
    "CRITERIA": "workbench.compress.pruning.criteria",
    "Criterion": "workbench.compress.pruning.criterion",
    "FORMATS": "workbench.formats.number_formats",
    "KINDS": "workbench.tasks.registry",
    "METHODS": "workbench.compress.registry",
    "Bench": "workbench.bench",
    "Distill": "workbench.compress",
    "KVCache": "workbench.compress",
    "Kind": "workbench.tasks.base",
    "Ledger": "workbench.ledger.ledger",
    "LowRank": "workbench.compress",
    "METRICS": "workbench.metrics.metrics",
    "Measurement": "workbench.measure.measurement",
    "Metric": "workbench.metrics.metric",
    "NumberFormat": "workbench.formats.number_format",
    "Prune": "workbench.compress",
    "QAT": "workbench.compress",
    "Quantize": "workbench.compress",
    "Recipe": "workbench.recipe",
    "Repair": "workbench.compress",
    "Step": "workbench.recipe",
    "Transfer": "workbench.compress",
    "compress": "workbench.compress",
    "configuration": "workbench.util.configuration",
    "errors": "workbench.errors",
    "load": "workbench.export",
    "models": "workbench.zoo",
    "pareto": "workbench.ledger.pareto",
    "report": "workbench.report.report",
    "sweep": "workbench.search.sweep",
    "tradeoff": "workbench.ledger.pareto",
    "verdict": "workbench.measure.card",
}

__all__ = list(PLACES)


class Package(ModuleType):
    """The package itself.

    Importing the subpackage `workbench.report` must not hide the public function `workbench.report`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Leave a subpackage that has the name of a public object out of the package's attributes."""
        if not isinstance(value, ModuleType) or name == "errors" or name not in PLACES:
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
