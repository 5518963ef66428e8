"""What can run a compressed model: kernels for one layer, and runtimes for a whole model.

An engine is a small frozen record. It says why it cannot run here (`here`), why it does not take a layer
(`serves`), and makes the module that runs it (`build`). `engine_list` names
them, best first; `realise` takes the first that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from torch import nn

from workbench.modules.layer import Layer
from workbench.tasks.base import Items, Kind

Once = Callable[
    [Hashable, Callable[[], Any]], Any
]  # once(key, compute): what compute returned the first time


class LayerEngine(Protocol):
    """A kernel that runs one layer in the place of its module.

    `serves` looks at shapes, dtypes and attributes only, never at values or at where tensors lie: it is also
    asked about layers that do not exist yet, with all tensors on the meta device. `device` is such as "cpu",
    "cuda" or "cuda:0".
    """

    @property
    def name(self) -> str:
        """Return such as "torch int8 dynamic": a few words, unique."""

    @property
    def takes(self) -> str:
        """Return a sentence on what it takes, for the table of runtimes: widths, groups, shapes, devices."""

    @property
    def uses(self) -> tuple[str, ...]:
        """Return the parts of a recipe that it turns into speed: "weights" (few bits), "inputs" (rounded
        ones), "zeros" (a pattern).
        """

    def here(self, device: str) -> str:
        """Return why it cannot run on this machine's `device` whatever the layer (library, instructions), ""
        if it can.
        """

    def serves(self, layer: Layer, device: str) -> str:
        """Return why it does not take this layer, "" if it does; `here` has been asked before."""

    def build(self, layer: Layer) -> nn.Module:
        """Return a module with the inputs and outputs of `layer.module`.

        May raise, the layer then stays as it is.

        The module needs an attribute `weight` that is a tensor (an empty one will do): some models read its
        dtype.
        """


class ModelEngine(Protocol):
    """A runtime that takes a model as a whole."""

    @property
    def name(self) -> str:
        """Return such as "onnxruntime": a few words, unique."""

    @property
    def takes(self) -> str:
        """Return a description of what it takes, for the table of runtimes."""

    def here(self, device: str) -> str:
        """Return why it cannot run on this machine's `device` whatever the model, "" if it can."""

    def serves(self, model: nn.Module, device: str) -> str:
        """Return why it does not take this model, "" if it does; `here` has been asked before."""

    def why_not_narrow(self, layer: Layer) -> str:
        """Return why the form in which a layer is stored makes nothing faster here, "" if it does or if it is
        stored dense.
        """

    def build(
        self, model: nn.Module, layers: tuple[Layer, ...], kind: Kind, items: Items, once: Once
    ) -> nn.Module:
        """Return a module that `kind.logits` can call on items of these shapes; may raise.

        `once` keeps what costs time.
        """
