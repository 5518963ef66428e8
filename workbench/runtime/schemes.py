"""The compressed forms that kernels elsewhere run fast, where they lie on a slider, and whether a kernel runs
them here.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.modules.input_quantizer import InputFormat
from workbench.recipe import Step
from workbench.runtime.plan import reasons_for


@dataclass(frozen=True)
class KernelTick:
    """A mark at a slider: `label` as the field writes the scheme, at `value`.

    `reason` says why it does not run here, "" if it does.
    """

    value: float
    label: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class Scheme:
    """A form that has a name: zeros in a pattern, or weights (and activations) of a width."""

    slider: str
    value: float
    label: str
    pattern: str | None = None
    weight_bits: int | None = None
    activation_bits: int = 16


SCHEMES = (
    Scheme("sparsity", 0.5, "2:4", pattern="2:4"),
    Scheme("weight_bits", 4, "W4A16", weight_bits=4),
    Scheme("weight_bits", 8, "W8A8", weight_bits=8, activation_bits=8),
)


def kernels_for(kind: type[Step], device: str) -> tuple[KernelTick, ...]:
    """Return the marks of one method's slider on "cpu" or "cuda".

    What runs is what `realise` says, never more.
    """
    ticks = []
    for scheme in SCHEMES:
        if scheme.slider == kind.slider:
            inputs = InputFormat(scheme.activation_bits) if scheme.activation_bits < 16 else None
            reasons = reasons_for(
                scheme.pattern, [scheme.weight_bits] if scheme.weight_bits else [], device, inputs=inputs
            )
            ticks.append(KernelTick(scheme.value, scheme.label, not reasons, "; ".join(reasons)))
    return tuple(ticks)
