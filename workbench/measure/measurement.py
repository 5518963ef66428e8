"""One measured point: everything that is known about one recipe on one model, data set and device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, InstanceOf, PlainSerializer, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import from_json, to_json

from workbench.compress.core.coverage import Coverage
from workbench.compress.registry import METHODS
from workbench.measure.kv_cache import CacheBytes
from workbench.measure.latency import Latency
from workbench.measure.size import Sizes
from workbench.measure.stored_layers import Layers, StoredLayers, layers_text
from workbench.metrics.class_recall import LostClass
from workbench.metrics.quality import Estimate, Quality
from workbench.recipe import Recipe
from workbench.util.progress import Look

RecipeField = Annotated[
    InstanceOf[Recipe],
    BeforeValidator(lambda v: METHODS.from_json(v) if isinstance(v, str) else v),
    PlainSerializer(lambda r: r.to_json()),
]

CHANGED = "changed answers"  # as `missing` names them


@dataclass(frozen=True)
class Context:
    """What a measurement depends on besides the recipe; the same context and recipe are measured once."""

    model_name: str
    model_fingerprint: str
    data_name: str
    data_fingerprint: str
    device: str  # "cpu" or "cuda"
    device_name: str
    latency_batch: int
    confidence: float
    workbench_version: str
    runtime: str = "auto"  # how both models were run when they were timed

    def key(self, recipe: Recipe) -> str:
        """Return the ledger key of a recipe in this context: 16 hexadecimal digits."""
        facts = [
            recipe.key,
            self.model_fingerprint,
            self.data_fingerprint,
            self.device,
            self.device_name,
            str(self.latency_batch),
            str(self.confidence),
        ]
        facts += [self.workbench_version, *([] if self.runtime == "auto" else [self.runtime])]
        return hashlib.sha256("|".join(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Provenance:
    """Where and when a point was measured."""

    versions: dict[str, str]
    git_revision: str | None
    time: str  # ISO 8601, UTC
    compress_seconds: float
    evaluate_seconds: float
    calibration_items: int
    training_items: int


@dataclass(frozen=True)
class Predicted:
    """What was predicted of a point before it was measured; `level` is that of both intervals.

    `quality` is in the task's metric. `wide` says that too few points were near for an interval of their own;
    `points` were. `speedup` is against the dense model, None where it was unknown. `unknown` are the methods
    of which nothing said how they change quality: where there is one, `quality` is all that the metric can
    be, and no prediction.
    """

    metric: str
    quality: Estimate
    speedup: Estimate | None
    level: float
    points: int
    wide: bool
    unknown: tuple[str, ...] = ()


@pydantic_dataclass(frozen=True, config=ConfigDict(ser_json_inf_nan="constants"))
class Measurement:
    """One recipe measured. A figure that could not be measured is None, and `missing` says why.

    `complete` is False for the looks of a stream that have not read all items; those carry no latency or
    memory. A point that stopped on purpose, because its main change was known to plus or minus `margin`, is
    complete with fewer items than there are.
    """

    key: str
    recipe: RecipeField
    context: Context
    quality: tuple[Quality, ...]
    flips: Estimate | None  # None for kinds whose answers cannot be told apart
    items: int
    items_total: int
    sizes: Sizes
    dense_sizes: Sizes
    layers: Layers  # of a stored point `StoredLayers`, which reads them when they are asked for
    provenance: Provenance
    latency: Latency | None = None
    peak_memory_bytes: int | None = None
    dense_peak_memory_bytes: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()  # what ran the layers that a kernel serves
    no_kernel: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    held_out: tuple[Look, ...] = ()  # quality on held-out training items along the curve
    cache: CacheBytes | None = None  # of a language model
    # Reading stopped on purpose: half the interval of the main change was at most this
    margin: float | None = None
    predicted: Predicted | None = None  # what was predicted before it was measured
    # KL(dense || compressed) in nats an answer (a token, an item); None for kinds without a distribution, and
    # for early looks
    kl: Estimate | None = None
    kl_items: int = 0  # of which it is the mean: fewer than `items` where no more could be kept
    kl_answers: int = 0  # of which it is the mean: of a language model some tokens of each window
    lost_classes: tuple[LostClass, ...] = ()  # of a classifier: those that it never finds any more
    # What share of the weights the recipe touched; None: a point from before that was counted
    coverage: Coverage | None = None

    @property
    def complete(self) -> bool:
        """Return whether every item that was asked for was read and the latency was tried."""
        return (self.items == self.items_total or self.margin is not None) and (
            self.latency is not None or "latency" in self.missing
        )

    def known_to(self, margin: float | None) -> bool:
        """Return whether nothing more need be read: all items were, or half the interval of the main change
        is at most `margin` (None or 0: all).
        """
        return self.items == self.items_total or bool(margin and self.primary.change.half_width <= margin)

    @property
    def primary(self) -> Quality:
        """Return the task's main metric."""
        return self.quality[0]

    @property
    def shrink(self) -> float:
        """Return how many times smaller the file is than the dense one."""
        return self.dense_sizes.file_bytes / self.sizes.file_bytes

    def to_json(self) -> str:
        """Return the measurement as one line of JSON."""
        return ADAPTER().dump_json(self).decode()

    def to_stored(self) -> dict[str, str]:
        """Return the measurement as the two texts that a ledger keeps: JSON of all but the layers, and of
        these.
        """
        return {
            "measurement": ADAPTER().dump_json(self, exclude={"layers"}).decode(),
            "layers": layers_text(self.layers),
        }

    @staticmethod
    def from_json(text: str, layers: str | None = None) -> Measurement:
        """Return the measurement that `to_json` wrote, or `to_stored` with `layers` apart.

        The layers wait as text until they are asked for: with thousands of points they are most of the time
        and memory.

        Raises:
            ValueError: the text is no JSON of a measurement (`pydantic.ValidationError` where a field is
                wrong).
            RecipeError: its recipe cannot be read, see `METHODS.from_json`.
        """
        record = from_json(text)
        if not isinstance(record, dict):
            raise ValueError(f"no measurement: {text[:40]!r}")  # noqa: TRY004  as any other text that is none
        if layers is None and "layers" in record:  # as one text
            layers = to_json(record["layers"], inf_nan_mode="constants").decode()
        if layers is not None:
            record["layers"] = StoredLayers(layers)
        measurement: Measurement = ADAPTER().validate_python(record)
        return measurement


@cache
def ADAPTER() -> TypeAdapter[Any]:  # noqa: N802
    """Return the serializer (built on first use, so that importing stays free)."""
    return TypeAdapter(Measurement)
