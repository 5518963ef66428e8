"""Every kernel for a layer and every runtime for a whole model, best first."""

from __future__ import annotations

from workbench.runtime.engines import LayerEngine, ModelEngine
from workbench.runtime.int8_torch import TorchInt8
from workbench.runtime.onnx_engine import OnnxRuntime
from workbench.runtime.packed_triton import PackedTriton
from workbench.runtime.scaled_matmul import ScaledProduct


def layer_engines() -> tuple[LayerEngine, ...]:
    """Return every engine for layers, best first."""
    return PackedTriton(), ScaledProduct(), TorchInt8()


def model_engines() -> tuple[ModelEngine, ...]:
    """Return every engine for whole models."""
    return (OnnxRuntime(),)
