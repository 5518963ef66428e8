"""How a model is run, dense and compressed alike: step by step, as one captured graph, compiled, or by
another runtime.
"""

from __future__ import annotations

import os
import shutil
import warnings
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from workbench.errors import RuntimeRefused
from workbench.kernels.graph_capture import as_if_captured, one_sequence_each
from workbench.modules.experts import why_no_graph
from workbench.modules.sharing import sharing_copy
from workbench.runtime.engine_list import model_engines
from workbench.runtime.engines import ModelEngine, Once
from workbench.runtime.names import Runtime
from workbench.util.library_internals import compilations
from workbench.util.text import kind_and_words

if TYPE_CHECKING:
    from workbench.modules.layer import Layer
    from workbench.tasks.base import Items, Kind

# Kinds of blocks that one model may have compiled: torch's own limit of 8 is less than widths and ranks make
VARIANTS = 64
WORDS = {
    "auto": "torch, step by step, with the best kernel for each layer that one serves",
    "torch": "torch, step by step, no kernels: every weight is unpacked",
    "onnx": "the whole model in ONNX Runtime, on the CPU",
    "graph": "as auto, captured once as a CUDA graph and replayed: no time between kernels; not for experts,"
    " which are picked by data",
    "compiled": "as auto, its repeated blocks compiled by torch.compile",
}


def chosen(runtime: str | None) -> Runtime:
    """Return a runtime by name; None means auto.

    Raises:
        RuntimeRefused: no runtime has this name.

    """
    names: tuple[Runtime, ...] = get_args(Runtime)
    named: Runtime | None = next((name for name in names if name == (runtime or "auto")), None)
    if named is None:
        raise RuntimeRefused(f"runtime={runtime!r} is unknown: choose one of {', '.join(names)}")
    return named


def whole(runtime: Runtime) -> ModelEngine | None:
    """Return the engine that takes a whole model, for the runtimes that are one."""
    return model_engines()[0] if runtime == "onnx" else None


def why_not(runtime: Runtime, device: str) -> str:
    """Return why a runtime cannot be used on this machine's `device`, "" if it can."""
    engine = whole(runtime)
    if engine is not None:
        return engine.here(device)
    if runtime == "graph" and not device.startswith("cuda"):
        return "CUDA graphs need a CUDA GPU; on a CPU nothing is launched"
    if runtime == "compiled" and device.startswith("cpu"):
        compiler = os.environ.get("CXX", "g++")
        return (
            ""
            if shutil.which(compiler) or shutil.which("clang++")
            else f"torch.compile needs a C++ compiler, and {compiler!r} is not here"
        )
    return ""


def runner(
    model: nn.Module, layers: tuple[Layer, ...], runtime: Runtime, *, kind: Kind, items: Items, once: Once
) -> nn.Module:
    """Return a model as `runtime` runs it, run once on these items.

    Raises:
        RuntimeRefused: it cannot; the message says why.

    """
    device = str(items.labels.device)
    engine = whole(runtime)
    reason = why_not(runtime, device) or ("" if engine is None else engine.serves(model, device))
    if runtime == "graph":
        reason = reason or why_no_graph(model)
    if reason:
        raise RuntimeRefused(f"runtime={runtime!r}: {reason}")
    try:
        if engine is not None:
            running = engine.build(model, layers, kind, items, once)
        else:
            running = {"graph": CapturedModel, "compiled": Compiled}.get(runtime, lambda same: same)(model)
        with torch.no_grad():
            kind.run(running, items)
    except RuntimeRefused as error:
        raise RuntimeRefused(f"runtime={runtime!r}: {error}") from None
    except Exception as error:  # noqa: BLE001
        # compilers and drivers raise what they like; the panel must live on
        raise RuntimeRefused(f"runtime={runtime!r} failed: {kind_and_words(error)}") from None
    return running


class CapturedModel(nn.Module):
    """A model captured as a CUDA graph for each shape of inputs, and replayed.

    Outputs are overwritten by the next call.

    What is not a tensor (flags) belongs to the shape. A model that waits for the GPU in its forward cannot be
    captured.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap the model; nothing is captured before the first call."""
        super().__init__()
        self.model = model
        self.graphs: dict[object, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Any]] = {}

    def forward(self, **given: Any) -> Any:
        """Return the model's outputs."""
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in given.items() if name not in tensors}
        key = (
            tuple((name, tuple(value.shape), value.dtype) for name, value in tensors.items()),
            repr(others),
        )
        if key not in self.graphs:
            self.graphs[key] = self.capture(tensors, others)
        graph, inputs, outputs = self.graphs[key]
        for name, value in tensors.items():
            inputs[name].copy_(value)
        graph.replay()
        return outputs

    def capture(
        self, tensors: dict[str, Tensor], others: dict[str, Any]
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Any]:
        """Run the model a few times beside the main stream (libraries set themselves up), then capture one
        run.
        """
        inputs = {name: value.clone() for name, value in tensors.items()}
        device = next(iter(inputs.values())).device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side), torch.no_grad(), one_sequence_each(), as_if_captured():
            for _ in range(3):
                self.model(**inputs, **others)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), one_sequence_each(), torch.cuda.graph(graph):
            outputs = self.model(**inputs, **others)
        return graph, inputs, outputs


class Compiled(nn.Module):
    """A model compiled by torch.compile for the shapes that it is called with.

    Of a model made of repeated blocks, the blocks are compiled: all that are alike share one compilation,
    which takes seconds where the whole takes minutes; what lies around them runs step by step. Any other
    model is compiled whole. The given model stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap the model; nothing is compiled before the first call."""
        super().__init__()
        self.model = sharing_copy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's own libraries
            for module in repeated(self.model) or [self.model]:
                module.compile(dynamic=False)

    def forward(self, **given: Any) -> Any:
        """Return the model's outputs."""
        with (
            warnings.catch_warnings(),
            compilations(VARIANTS),
        ):
            warnings.simplefilter("ignore")
            return self.model(**given)


def repeated(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model is made of: the modules of every outermost list of two or more of one
    class.
    """
    repeats: list[nn.Module] = []
    for child in model.children():
        blocks = list(child.children()) if isinstance(child, nn.ModuleList) else []
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        repeats += blocks if alike else repeated(child)
    return repeats
