"""Running one module again on what it was given, with some outputs of a product within it changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.util.hooks import of_this_thread

if TYPE_CHECKING:
    from workbench.tasks.base import Items, Kind

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
ROUNDING = 1e-6  # of the largest input: less is no change


@dataclass
class Probe:
    """A module with what it was given for one item, run again with changed outputs of one of its products."""

    name: str
    module: nn.Module
    given: tuple[Any, ...]
    named: dict[str, Any]
    reader: nn.Module  # the product whose inputs are looked at
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def inputs(
        self, product: nn.Module | None = None, columns: Tensor | None = None, *, first: bool = False
    ) -> Tensor:
        """Return what the reader is given, [positions, inputs] float32, once some outputs of a product are
        changed; with `first` at the first position only.
        """
        seen: list[Tensor] = []

        def changed(_module: nn.Module, _given: tuple[Any, ...], out: Tensor) -> Tensor:
            other, index, random = out.clone(), columns, self.generator
            spread = out.float().std().clamp_min(1e-3)
            drawn = 1 + torch.rand(len(index), generator=random)  # type: ignore[arg-type]
            new = spread * drawn.to(out.device)
            place = other.flatten(0, -2)
            if first:
                place[0, index] = (2 * new).to(out.dtype)
            else:
                noise = torch.randn(len(place), len(index), generator=random)  # type: ignore[arg-type]
                noise = noise.to(out.device)
                place[:, index] = (place[:, index].float() * -0.5 + new * noise).to(out.dtype)
            return place.view_as(out)

        def look(_module: nn.Module, given: tuple[Any, ...]) -> None:
            seen.append(given[0].detach())

        handles = [self.reader.register_forward_pre_hook(of_this_thread(look))]
        if product is not None:
            handles.append(product.register_forward_hook(of_this_thread(changed)))
        try:
            with torch.no_grad():
                self.module(*self.given, **self.named)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0].float().flatten(0, -2)


def given_to(
    model: nn.Module, kind: Kind, items: Items, modules: dict[str, nn.Module]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what each module is given for one item, the first time, without caches."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    names = {module: name for name, module in modules.items()}

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        plain = {key: (None if key in CACHES else value) for key, value in named.items()}
        seen.setdefault(names[module], (given, plain))

    handles = [module.register_forward_pre_hook(of_this_thread(look), with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            kind.logits(model, items[:1].to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def different(after: Tensor, before: Tensor) -> Tensor:
    """Return which inputs of the reader changed, bool [positions, inputs]."""
    return (after - before).abs() > ROUNDING * before.abs().max()
