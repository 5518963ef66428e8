"""A model as an ONNX graph, once for each structure: another recipe with the same structure only fills in
other weights.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import RuntimeRefused
from workbench.modules.experts import why_no_graph
from workbench.runtime.onnx_functions import add_functions
from workbench.tasks.base import Items, Kind
from workbench.util.text import kind_and_words

MOST_BYTES = 1_900_000_000  # a graph with its weights must stay below the 2 GiB of a protocol buffer
PREFIX = "model."


@dataclass(frozen=True)
class ModelCall:
    """How a task calls its model: tensors by keyword, other arguments as they are, and the names of the
    tensors it returns.
    """

    tensors: dict[str, Tensor]
    others: dict[str, Any]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """An exported model.

    `weights` are the initializers that are tensors of the model, by name; `baked` is a hash of the rest.
    """

    proto: Any
    weights: tuple[str, ...]
    baked: str
    outputs: tuple[str, ...]


class Recorder(nn.Module):
    """Passes calls on to a model and keeps the last one."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap the model."""
        super().__init__()
        self.model = model
        self.call: ModelCall | None = None

    def forward(self, **given: Any) -> Any:
        """Call the model."""
        outputs = self.model(**given)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        self.call = ModelCall(
            tensors,
            {name: value for name, value in given.items() if name not in tensors},
            tuple(name for name, value in outputs.items() if isinstance(value, Tensor)),
        )
        return outputs


class Called(nn.Module):
    """A model whose inputs and outputs are plain tensors in a fixed order."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        """Wrap the model."""
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model as its task does."""
        outputs = self.model(**dict(zip(self.call.tensors, tensors, strict=True)), **self.call.others)
        return tuple(outputs[name] for name in self.call.outputs)


def recorded(model: nn.Module, kind: Kind, items: Items) -> ModelCall:
    """Return how `kind` calls `model` on these items; runs it once.

    Raises:
        RuntimeRefused: the task never calls the model as a whole, or other than by keywords.

    """
    recorder = Recorder(model)
    try:
        with torch.no_grad():
            kind.logits(recorder, items)
    except (AttributeError, TypeError) as error:
        raise RuntimeRefused(
            f"the task {kind.name!r} calls its model in a way that cannot be exported: {error}"
        ) from None
    if recorder.call is None or not recorder.call.outputs:
        raise RuntimeRefused(f"the task {kind.name!r} does not call its model as a whole")
    return recorder.call


def signature(model: nn.Module, call: ModelCall) -> str:
    """Return a hash of everything but the weights: modules and their plain attributes, shapes, configuration,
    inputs.
    """
    facts: list[object] = [
        (name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()
    ]
    for name, module in model.named_modules():
        facts.append(
            (
                name,
                type(module).__qualname__,
                sorted((key, repr(value)) for key, value in vars(module).items() if simple(value)),
            )
        )
    config: Any = getattr(model, "config", None)
    facts.append(config.to_json_string() if hasattr(config, "to_json_string") else "")
    facts.append([(name, tuple(value.shape), str(value.dtype)) for name, value in call.tensors.items()])
    facts.append((repr(call.others), call.outputs))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def simple(value: Any) -> bool:
    """Return whether a module's attribute is plain data that a graph may depend on."""
    return isinstance(value, bool | int | float | str) or (
        isinstance(value, tuple) and all(map(simple, value))
    )


def export(model: nn.Module, call: ModelCall) -> Graph:
    """Return the graph of a model, for inputs of exactly these shapes.

    Raises:
        RuntimeRefused: the exporter cannot, or the weights are too large for one file.

    """
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > MOST_BYTES:
        raise RuntimeRefused(
            f"its weights take {size:,} bytes; an ONNX graph in memory holds at most {MOST_BYTES:,}"
        )
    if reason := why_no_graph(model):
        raise RuntimeRefused(reason)
    inputs = tuple(call.tensors.values())
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                Called(model, call).eval(),
                inputs,
                input_names=list(call.tensors),
                output_names=list(call.outputs),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # noqa: BLE001  the exporter raises what it likes; the user sees one line
        raise RuntimeRefused(
            f"the exporter of torch {torch.__version__} fails on it: {first_cause(error)}"
        ) from None
    if program is None:
        raise RuntimeRefused("the exporter returned nothing")
    proto = program.model_proto
    add_functions(proto)
    state = model.state_dict()
    weights = []
    for initializer in proto.graph.initializer:
        tensor = state.get(initializer.name.removeprefix(PREFIX))
        if tensor is not None and initializer.name.startswith(PREFIX) and initializer.raw_data == raw(tensor):
            weights.append(initializer.name)
            initializer.ClearField("raw_data")
    return Graph(proto, tuple(weights), baked(state, tuple(weights)), call.outputs)


def first_cause(error: BaseException) -> str:
    """Return the first cause of an exception, in one line: exporters wrap theirs in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return kind_and_words(error)


def baked(state: dict[str, Tensor], weights: tuple[str, ...]) -> str:
    """Return a hash of the tensors that a graph does not hold under their own names: it was made for these
    values only.
    """
    places = {state[name.removeprefix(PREFIX)].data_ptr() for name in weights}
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if f"{PREFIX}{name}" not in weights and tensor.data_ptr() not in places:
            digest.update(name.encode() + raw(tensor))
    return digest.hexdigest()


def raw(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(graph: Graph, model: nn.Module) -> bytes:
    """Return the graph with the weights of a model of the same structure, as onnxruntime reads it."""
    proto, state = type(graph.proto)(), model.state_dict()
    proto.CopyFrom(graph.proto)
    names = frozenset(graph.weights)
    for initializer in proto.graph.initializer:
        if initializer.name in names:
            initializer.raw_data = raw(state[initializer.name.removeprefix(PREFIX)])
    content: bytes = proto.SerializeToString()
    return content


@contextmanager
def quiet() -> Iterator[None]:
    """Let the exporter work without its remarks on standard error."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._dynamo")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
