"""The table of what runs on this machine, measured on layers that exist only for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from workbench.modules.input_quantizer import InputFormat
from workbench.runtime.engine_list import layer_engines, model_engines
from workbench.runtime.engines import LayerEngine
from workbench.runtime.execution import WORDS, chosen, why_not
from workbench.runtime.plan import realise
from workbench.runtime.probes import TIMED, probe, real_probe
from workbench.util.device import Clock

ROWS = (1, 256)  # tokens
FORMATS = (
    (4, 64, None),
    (4, 128, None),
    (3, 64, None),
    (8, 0, InputFormat()),
    (8, 0, None),
    (8, 64, None),
    (4, 0, None),
)  # (bits, group, inputs) to try, the usual ones first


@dataclass(frozen=True)
class RuntimeRow:
    """A line of `workbench runtimes`.

    `runs` is "yes" or the reason; `measured` the ratio to plain torch in one run, "" if none was taken.
    """

    name: str
    takes: str
    runs: str
    measured: str


def runtime_rows(device: str, *, measure: bool = True) -> list[RuntimeRow]:
    """Return every runtime and kernel, whether it runs on `device`, and how fast next to plain torch on a
    layer of its own kind.
    """
    rows = []
    for name, about in WORDS.items():
        reason = why_not(chosen(name), device)
        rows.append(RuntimeRow(f"runtime={name}", about, reason or "yes", ""))
    rows += [
        RuntimeRow(
            engine.name,
            engine.takes,
            engine.here(device) or "yes",
            measured_model(device) if measure and not engine.here(device) else "",
        )
        for engine in model_engines()
    ]
    for engine in layer_engines():
        reason = engine.here(device)
        rows.append(
            RuntimeRow(
                engine.name,
                engine.takes,
                reason or "yes",
                measured_layer(engine, device) if measure and not reason else "",
            )
        )
    return rows


def measured_layer(engine: LayerEngine, device: str) -> str:
    """Return how a layer of the first format that the engine serves compares with a dense one, in words."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    served = next(
        (given for given in FORMATS if not engine.serves(probe(given[0], given[1], given[2], TIMED), device)),
        None,
    )
    if served is None:
        return "serves none of the usual formats"
    bits, group, inputs = served
    try:
        layer, dense = real_probe(bits, group, inputs, device, dtype)
        kernel = engine.build(layer).eval()
        ratios = [
            faster(lambda x=x: dense(x), lambda x=x: kernel(x), device)  # type: ignore[misc]
            for x in (torch.randn(rows, TIMED[1], device=device, dtype=dtype) for rows in ROWS)
        ]
    except Exception as error:  # noqa: BLE001  a kernel that fails here is what the table is for
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    label = f"W{bits}" + (f" g{group}" if group else "") + (f" {inputs.words()}" if inputs else "")
    return f"{label}, {TIMED[0]} by {TIMED[1]}: " + ", ".join(
        f"{ratio:.2f}x at {rows} {'token' if rows == 1 else 'tokens'}"
        for ratio, rows in zip(ratios, ROWS, strict=True)
    )


def measured_model(device: str) -> str:
    """Return how ONNX Runtime compares with torch on the embedded CNN, 16 images, dense and W8A8."""
    from workbench.compress import compress
    from workbench.compress.quantization.activations import Activations
    from workbench.compress.quantization.quantize import Quantize
    from workbench.errors import WorkbenchError
    from workbench.recipe import Recipe
    from workbench.zoo import load_task

    try:
        task = load_task("fashion-cnn", offline=True, progress=False, device=device)
        items = task.evaluation[:16]
        texts = []
        for label, steps in (
            ("fp32", ()),
            (
                "W8A8",
                (
                    Activations(activation_scaling="static", activation_granularity="tensor"),
                    Quantize(weight_bits=8),
                ),
            ),
        ):
            realised = realise(compress(task, Recipe(*steps)), device, "onnx", kind=task.kind, items=items)
            if realised.warnings:
                return realised.warnings[0]
            dense = partial(task.kind.logits, task.model, items)
            run_realised = partial(task.kind.logits, realised.model, items)
            texts.append(f"{faster(dense, run_realised, device):.2f}x {label}")
    except WorkbenchError as error:
        return f"fails: {error}"
    return "fashion-cnn, 16 images: " + ", ".join(texts)


def faster(
    dense: Callable[[], object], compressed: Callable[[], object], device: str, rounds: int = 15
) -> float:
    """Return the median of dense / compressed over pairs timed in turn."""
    clock, ratios = Clock(torch.device(device)), []
    with torch.no_grad():
        for index in range(rounds + 3):
            first, second = clock.time_ms(dense), clock.time_ms(compressed)
            if index >= 3:
                ratios.append(first / second)
    return statistics.median(ratios)
