"""The names of the ways to run a model; apart, so that reading them loads nothing."""

from __future__ import annotations

from typing import Literal

Runtime = Literal["auto", "torch", "onnx", "graph", "compiled"]
