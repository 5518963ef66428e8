"""The small tensors that rounding of inputs adds to a file: divisors, scales and zero points, from shapes
alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from workbench.modules.weight_shapes import Entry
from workbench.shapes.outline import Outline

BUFFERS = (
    "smooth",
    "input_scale",
    "input_zero",
)  # what a layer that rounds its inputs holds beside weight and bias


def after_activations(outline: Outline, step: Any) -> Outline:
    """Return the outline with the tensors that an Activations step adds."""
    added: list[Entry] = []
    for weight in outline.weights:
        if weight.table or not outline.takes(weight, step):
            continue
        name = weight.origin if weight.others else weight.name
        if step.smoothing and not weight.others:
            channels = weight.shape[1] if len(weight.shape) == 4 else weight.columns
            added.append(Entry(f"{name}.smooth", "F32", (channels,), 4 * channels))
        if step.activation_scaling == "static":
            added += [Entry(f"{name}.input_scale", "F32", (), 4), Entry(f"{name}.input_zero", "I32", (), 4)]
    return dataclasses.replace(outline, rest=(*outline.rest, *added))
