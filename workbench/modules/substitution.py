"""A model in which some modules are left out for others: the rest is the model's own, and the model itself
stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.util.library_internals import COMPILED_CALL, children_of


class StandIn(nn.Module):
    """Base of what takes a module's place.

    Whatever a model asks of it (`attention_type`, `weight.dtype`) the module itself answers.
    """

    def __init__(self, module: nn.Module) -> None:
        """Remember the module, which is no child: its weights are not asked for."""
        super().__init__()
        self.__dict__["instead_of"] = module

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module."""
        return getattr(self.__dict__["instead_of"], name)


class PassesOn(StandIn):
    """Returns what it is given, as an output head that is applied later."""

    def forward(self, given: Tensor) -> Tensor:
        """Return the same."""
        return given


class Sees(StandIn):
    """Runs the module and notes what it was given."""

    def __init__(self, module: nn.Module) -> None:
        """Note nothing yet."""
        super().__init__(module)
        self.given: list[Tensor] = []

    def forward(self, given: Tensor) -> Any:
        """Return the module's own outputs."""
        self.given.append(given)
        return self.__dict__["instead_of"](given)


class Shows(StandIn):
    """Returns a tensor that was computed before, followed by as many None as the block itself returns.

    `extra` is None for a bare tensor.
    """

    def __init__(self, block: nn.Module, states: Tensor, extra: int | None) -> None:
        """Remember what to return."""
        super().__init__(block)
        self.states, self.extra = states, extra

    def forward(self, *given: Any, **named: Any) -> Any:  # noqa: ARG002  as the block is called
        """Return the states in the block's own form."""
        return self.states if self.extra is None else (self.states, *[None] * self.extra)


class Keeps(StandIn):
    """Runs a block and keeps the hidden states that it returns."""

    def __init__(self, block: nn.Module) -> None:
        """Keep nothing yet."""
        super().__init__(block)
        self.states: Tensor | None = None

    def forward(self, *given: Any, **named: Any) -> Any:
        """Return the block's own outputs."""
        returned = self.__dict__["instead_of"](*given, **named)
        self.states = returned if isinstance(returned, Tensor) else returned[0]
        return returned


def with_stand_ins(model: nn.Module, places: Mapping[str, nn.Module]) -> nn.Module:
    """Return the model with other modules at some dotted names: only the modules that hold those are copied,
    everything else is shared.
    """
    substituted = model.__class__.__new__(model.__class__)
    substituted.__dict__.update(vars(model))
    substituted.__dict__.pop(COMPILED_CALL, None)
    children = dict(children_of(model))
    below: dict[str, dict[str, nn.Module]] = {}
    for name, module in places.items():
        child, _, rest = name.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = module
        else:
            children[child] = module
    for child, places_below in below.items():
        children[child] = with_stand_ins(model.get_submodule(child), places_below)
    vars(substituted)["_modules"] = children
    return substituted


def first_tensor(given: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a block works on: its first argument, or `hidden_states`."""
    candidate = given[0] if given else named.get("hidden_states")
    return candidate if isinstance(candidate, Tensor) else None


def extras(returned: Any) -> int | None:
    """Return how many None follow a block's hidden states, None for a bare tensor.

    Raises:
        TypeError: it returns something else beside.

    """
    if isinstance(returned, Tensor):
        return None
    if (
        isinstance(returned, tuple)
        and returned
        and isinstance(returned[0], Tensor)
        and all(beside is None for beside in returned[1:])
    ):
        return len(returned) - 1
    raise TypeError(f"a block returns {type(returned).__name__}, not hidden states alone")


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors hold the same bits; on two devices they do not."""
    return (
        left.device == right.device
        and left.shape == right.shape
        and left.dtype == right.dtype
        and torch.equal(left, right)
    )
