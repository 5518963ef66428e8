"""ONNX Runtime on the CPU: floats, integers and packed 4-bit weights, for a model as a whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import RuntimeRefused
from workbench.modules.input_quantizer import QuantizesInputs
from workbench.modules.layer import Layer, replace_module
from workbench.modules.sharing import sharing_copy
from workbench.runtime.engines import Once
from workbench.runtime.int8 import slow_integers, why_not_int8
from workbench.runtime.onnx_export import Graph, baked, export, filled, recorded, signature
from workbench.runtime.onnx_layers import (
    Affine,
    Float,
    IntegerConv,
    IntegerLinear,
    OnnxLinear,
    exportable,
    why_not_packed,
)
from workbench.tasks.base import Items, Kind

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxRuntime:
    """The whole model in one ONNX Runtime session with as many threads as torch has."""

    name: str = "ONNX Runtime"
    takes: str = (
        "float32 models on the CPU, structured and low-rank ones too; W8A8 and narrower (one scale per row)"
        " as integers, convolutions slower so than as floats; W4 packed"
    )

    def here(self, device: str) -> str:
        """Return why ONNX Runtime cannot be used on this device, "" if it can."""
        if not device.startswith("cpu"):
            return "ONNX Runtime is used on the CPU only"
        missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
        if missing:
            return f"{', '.join(missing)} is not installed: pip install 'compression-workbench[onnx]'"
        return ""

    def serves(self, model: nn.Module, device: str) -> str:  # noqa: ARG002  the protocol's
        """Return why it does not take this model, "" if it does."""
        wrong_dtype = next(
            (
                parameter.dtype
                for parameter in model.parameters()
                if parameter.is_floating_point() and parameter.dtype != torch.float32
            ),
            None,
        )
        return (
            ""
            if wrong_dtype is None
            else f"the model is {str(wrong_dtype).removeprefix('torch.')}; float32 is needed"
        )

    def how(self, layer: Layer) -> str:
        """Return how the session multiplies by a layer: "integers", "packed", or "floats"."""
        if not why_not_int8(layer) and not slow_integers():
            return "integers"
        return "packed" if layer.grid is not None and not why_not_packed(layer) else "floats"

    def why_not_narrow(self, layer: Layer) -> str:
        """Return why a layer's grid does not make the session faster, "" if it does."""
        if layer.grid is None or self.how(layer) != "floats":
            return ""
        wanted = why_not_int8(layer)
        return slow_integers() if not wanted else f"{wanted}; {why_not_packed(layer)}"

    def build(
        self, model: nn.Module, layers: tuple[Layer, ...], kind: Kind, items: Items, once: Once
    ) -> nn.Module:
        """Return the model in a session, for items of exactly these shapes.

        Graphs are kept by structure through `once`.

        Raises:
            RuntimeRefused: it cannot be exported or loaded.
        """
        exported = self.prepared(model, layers, followers(model, layers, kind, items))
        call = recorded(model, kind, items)
        graph: Graph = once(("onnx graph", signature(exported, call)), lambda: export(exported, call))
        if (
            baked(exported.state_dict(), graph.weights) != graph.baked
        ):  # values that the exporter worked into the graph differ
            graph = export(exported, call)
        return OnnxSession(filled(graph, exported), graph.outputs)

    def prepared(self, given: nn.Module, layers: tuple[Layer, ...], norms: dict[str, str]) -> nn.Module:
        """Return the model with every layer in the form that is exported, sharing what it can."""
        model = sharing_copy(given).eval()
        by_name = {name: layer for layer in layers for name in (layer.name, *layer.others)}
        for name, module in list(model.named_modules()):
            layer = by_name.get(name)
            how = "floats" if layer is None or layer.table or not runs_alone(module) else self.how(layer)
            if how == "integers" and layer is not None and isinstance(module, nn.Conv2d):
                norm = norms.get(name)
                affine = None if norm is None else Affine(model.get_submodule(norm))  # type: ignore[arg-type]
                replace_module(model, name, IntegerConv(layer, affine))
                if norm is not None:
                    replace_module(model, norm, nn.Identity())
            elif how == "integers" and layer is not None:
                replace_module(model, name, IntegerLinear(layer))
            elif how == "packed" and layer is not None:
                replace_module(model, name, OnnxLinear(layer))
            elif isinstance(module, QuantizesInputs):
                replace_module(model, name, exportable(module))
            elif type(module) is nn.Linear:
                replace_module(model, name, Float(module))
            elif type(module) is nn.BatchNorm2d and name not in norms.values():
                replace_module(model, name, Affine(module))
        return model


def runs_alone(module: nn.Module) -> bool:
    """Return whether a module multiplies and does nothing else."""
    return not list(module.children())


def followers(model: nn.Module, layers: tuple[Layer, ...], kind: Kind, items: Items) -> dict[str, str]:
    """Return which BatchNorm2d reads the output of each integer convolution, seen in one run of one item."""
    convolutions = {
        layer.name: layer.module
        for layer in layers
        if isinstance(layer.module, nn.Conv2d) and not why_not_int8(layer)
    }
    norms = {name: module for name, module in model.named_modules() if type(module) is nn.BatchNorm2d}
    if not convolutions or not norms:
        return {}
    outputs: dict[
        int, tuple[str, Tensor]
    ] = {}  # the tensors are kept, so that no other one gets their identity
    readers: dict[str, str] = {}

    def after(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _inputs, output: outputs.__setitem__(id(output), (name, output))

    def before(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            if inputs and id(inputs[0]) in outputs:
                readers[outputs[id(inputs[0])][0]] = name

        return hook

    handles = [module.register_forward_hook(after(name)) for name, module in convolutions.items()]
    handles += [module.register_forward_pre_hook(before(name)) for name, module in norms.items()]
    try:
        with torch.no_grad():
            kind.logits(model, items[:1])
    finally:
        for handle in handles:
            handle.remove()
    return {conv: norm for conv, norm in readers.items() if list(readers.values()).count(norm) == 1}


class OnnxSession(nn.Module):
    """An ONNX Runtime session that is called like the model it was made from.

    Inputs must have the shapes it was made for.
    """

    def __init__(self, content: bytes, outputs: tuple[str, ...]) -> None:
        """Load the graph.

        Raises:
            RuntimeRefused: ONNX Runtime refuses it.

        """
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # waiting threads would slow what is timed next
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  its errors have no common base
            raise RuntimeRefused(
                f"ONNX Runtime {onnxruntime.__version__} refuses the graph:"
                f" {' '.join(str(error).split())[:300]}"
            ) from None
        self.outputs = outputs
        self.inputs = frozenset(given.name for given in self.session.get_inputs())
        self.graph_bytes = len(content)

    def forward(self, **given: Any) -> SimpleNamespace:
        """Return the outputs by name, as the model's own would be."""
        feed = {name: value.numpy() for name, value in given.items() if name in self.inputs}
        outputs = self.session.run(None, feed)
        return SimpleNamespace(
            **{name: torch.from_numpy(value) for name, value in zip(self.outputs, outputs, strict=True)}
        )
