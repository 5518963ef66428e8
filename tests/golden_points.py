"""What is kept of one recipe on one model: texts, numbers, and hashes of every tensor.

Hashes and the last digits of numbers depend on the processor and on torch: they are compared on the same
`machine` only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from golden_recipes import RECIPES, task_named

import workbench as wb
from workbench import measuring
from workbench.errors import WorkbenchError
from workbench.modules.packing import pack_model
from workbench.runtime.roofline import Limits

FOLDER = Path(os.environ.get("GOLDEN", Path(__file__).with_name("golden")))
DIGITS = 7  # of the numbers that are kept; the hash of the numbers is of all digits
LIMITS = Limits(2e10, {32: 5e10, 8: 1e11})  # of a device that is the same everywhere: real ones are timed


def machine() -> dict[str, str]:
    """Say what the last digits depend on."""
    return {
        "processor": processor(),
        "platform": f"{platform.system()} {platform.machine()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def processor() -> str:
    """Say which processor this is; names alone are shared by generations, family and model are not."""
    kept = ("vendor_id", "cpu family", "model", "model name")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    told = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    return ", ".join(told[name] for name in kept if name in told)


class Recorder:
    """One model on which recipes are predicted and measured; nothing is timed, predictions know no point."""

    def __init__(self, name: str, folder: Path) -> None:
        """Load the model, and measure it as it is: predictions start from its quality."""
        self.name, self.task = name, task_named(name)
        self.bench = wb.Bench(self.task, device="cpu", ledger=folder / f"{name}.journal", progress=False)
        empty = wb.Bench(self.task, device="cpu", ledger=folder / f"{name}-empty.journal", progress=False)
        self.predictor = empty.predictor()
        self.predictor.limits = LIMITS
        self.predictor.learn(self.measured(wb.Recipe())[1])

    def measured(self, recipe: wb.Recipe) -> tuple[Any, wb.Measurement]:
        """Return the compressed model and its point."""
        compressed: list[Any] = []
        with mock.patch.object(measuring, "untimed", return_value="golden results are not timed"):
            *_, point = self.bench.stream(recipe, again=True, on_compressed=compressed.append)
        return compressed[0], point

    def record(self, name: str) -> dict[str, Any]:
        """Return everything that is kept of a recipe, or the words in which it is refused."""
        try:
            recipe = wb.Recipe(*RECIPES[name]())
            self.predictor.prepare(recipe)
            predicted = self.predictor.predict(recipe)
            compressed, point = self.measured(recipe)
        except WorkbenchError as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        exact = {**measured_numbers(point), **predicted_numbers(predicted)}
        texts = {"notes": predicted.notes, "no kernel": point.no_kernel, "warnings": point.warnings}
        return {
            "label": recipe.label(),
            "key": recipe.key,
            "steps": repr(recipe),
            "made": "" if compressed.recipe == recipe else compressed.recipe.to_json(),
            "bytes exact": predicted.bytes_exact,
            "numbers": {what: [rounded(x) for x in values] for what, values in exact.items()},
            "texts": {what: list(lines) for what, lines in texts.items() if lines},
            "hashes": {
                "state": hash_of(named_tensors(compressed.model)),
                "packed": hash_of(pack_model(compressed.model, compressed.layers).tensors.items()),
                "promises": hash_of(promises(compressed.layers)),
                "numbers": digest(json.dumps(exact).encode()),
                "layers": digest(json.dumps([layer_facts(layer) for layer in point.layers]).encode()),
            },
        }


def measured_numbers(point: wb.Measurement) -> dict[str, list[float]]:
    """Return the measured numbers by name, each with its interval."""
    numbers: dict[str, list[float]] = {}
    for quality in point.quality:
        numbers[quality.metric] = ends(quality.compressed)
        numbers[f"{quality.metric} change"] = ends(quality.change)
    numbers |= {"flips": ends(point.flips), "kl": [] if point.kl is None else ends(point.kl)}
    numbers |= {
        "sizes": list(dataclasses.astuple(point.sizes)),
        "items": [point.items, point.kl_items, point.kl_answers],
    }
    errors = [layer.relative_error for layer in point.layers if layer.relative_error is not None]
    numbers["relative error"] = [sum(errors) / len(errors)] if errors else []
    numbers["curve"] = [loss for _, loss in point.curve]
    numbers["held out"] = [look.value for look in point.held_out]
    return {what: values for what, values in numbers.items() if values}


def predicted_numbers(predicted: Any) -> dict[str, list[float]]:
    """Return the numbers predicted before, by name, each with its interval."""
    quality = [] if predicted.quality is None else ends(predicted.quality)
    size = [] if predicted.file_bytes is None else [predicted.file_bytes]
    speed = [] if predicted.speedup is None else ends(predicted.speedup)
    return {"predicted": quality, "predicted bytes": size, "predicted speedup": speed}


def ends(estimate: Any) -> list[float]:
    """Return a value and the ends of its interval."""
    return [estimate.value, estimate.low, estimate.high]


def rounded(value: float) -> float:
    """Return a number with as many digits as are kept."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def layer_facts(layer: Any) -> list[Any]:
    """Return the report's facts on one layer, whatever the class is called."""
    kept = (layer.weights, layer.sparsity, layer.rank, layer.bits, layer.relative_error)
    return [layer.name, *layer.shape, *kept, layer.outcome, layer.effective_bits]


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield everything that the model holds, what it does not save as well."""
    state = model.state_dict()
    yield from state.items()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in state)


def promises(layers: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield masks, codes, scales and zero points in the order of the layers; fields may be renamed."""
    for layer in layers:
        held = [layer.mask, *tensors_of(layer.grid), layer.rows, layer.columns]
        yield from ((layer.name, tensor) for tensor in held if tensor is not None)


def tensors_of(form: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a stored form, those of the form within it as well."""
    if isinstance(form, torch.Tensor):
        yield form
    elif dataclasses.is_dataclass(form):
        for field in dataclasses.fields(form):
            yield from tensors_of(getattr(form, field.name))


def hash_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the hash of names, types, shapes and every byte."""
    checksum = hashlib.sha256()
    for name, tensor in tensors:
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()[:24]


def digest(content: bytes) -> str:
    """Return the hash of bytes."""
    return hashlib.sha256(content).hexdigest()[:24]
