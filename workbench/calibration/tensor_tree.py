"""Values taken apart into plain memory and a description, so that a cache can count, move and store them bit
by bit.

A value is made of tensors, numbers, strings, None, tuples, lists, dicts and frozen dataclasses of this
package. Views of one storage stay views of one storage wherever they are put together again, with the strides
that they had: what is computed from them has the same bits.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, str)
OWNERS = ("workbench.",)  # modules whose dataclasses are put together again


class NotPlainError(ValueError):
    """A value holds something that is no plain data, such as a module or a function."""


@dataclass(frozen=True)
class Parts:
    """A value as a description in JSON and its storages: uint8 [bytes] each, on the device where they lie."""

    description: str
    storages: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all storages."""
        return sum(storage.numel() for storage in self.storages)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Parts:
        """Return the same value with each storage where `move` puts it."""
        return Parts(self.description, tuple(map(move, self.storages)))


def storage_of(tensor: Tensor) -> Tensor:
    """Return all memory that a tensor is a view of, uint8 [bytes], not copied."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def storages_in(value: Any) -> dict[tuple[str, int], Tensor]:
    """Return the storages that a value holds, each once, by device and address.

    Modules count by their parameters and buffers.
    """
    found: dict[tuple[str, int], Tensor] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, PLAIN) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            if part.layout is torch.strided and part.untyped_storage().nbytes():
                found.setdefault((str(part.device), part.untyped_storage().data_ptr()), part.detach())
        elif isinstance(part, torch.nn.Module):
            waiting += [*part.parameters(), *part.buffers()]
        elif isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            waiting += part
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            waiting += (
                vars(part).values()
                if hasattr(part, "__dict__")
                else [getattr(part, field.name) for field in dataclasses.fields(part)]
            )
    return {place: storage_of(tensor) for place, tensor in found.items()}


def take_apart(value: Any) -> Parts:
    """Return a value as its storages and their description.

    Raises:
        NotPlainError: it holds something else than plain data.

    """
    storages: dict[tuple[str, int], int] = {}
    kept: list[Tensor] = []

    def told(part: Any) -> Any:
        if type(part) in PLAIN:
            return part
        if type(part) is Tensor and part.layout is torch.strided and not part.requires_grad:
            place = str(part.device), part.untyped_storage().data_ptr()
            if place not in storages:
                storages[place] = len(kept)
                kept.append(storage_of(part))
            return {
                "tensor": [
                    storages[place],
                    str(part.dtype).removeprefix("torch."),
                    part.storage_offset(),
                    list(part.shape),
                    list(part.stride()),
                ]
            }
        if type(part) in {tuple, list}:
            return {type(part).__name__: [told(one) for one in part]}
        if type(part) is dict:
            return {"dict": [[told(key), told(one)] for key, one in part.items()]}
        if owned(type(part)):
            return {
                "new": f"{type(part).__module__}:{type(part).__qualname__}",
                "fields": {field.name: told(getattr(part, field.name)) for field in dataclasses.fields(part)},
            }
        raise NotPlainError(f"{type(part).__name__} is no plain data")

    return Parts(json.dumps(told(value)), tuple(kept))


def put_together(parts: Parts) -> Any:
    """Return the value that was taken apart, as views of the storages given.

    Raises:
        NotPlainError: the description names what this package does not have.

    """
    views: dict[str, Tensor] = {}

    def made(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if "tensor" in part:
            return viewed(part["tensor"])
        if "tuple" in part:
            return tuple(map(made, part["tuple"]))
        if "list" in part:
            return list(map(made, part["list"]))
        if "dict" in part:
            return {made(key): made(one) for key, one in part["dict"]}
        return class_named(part["new"])(**{name: made(one) for name, one in part["fields"].items()})

    def viewed(told: list[Any]) -> Tensor:
        name = str(told)
        if name not in views:  # the same object where it was the same object
            storage, dtype, offset, shape, strides = told
            memory = parts.storages[storage]
            views[name] = torch.empty(0, dtype=getattr(torch, dtype), device=memory.device).set_(
                memory.untyped_storage(), offset, shape, strides
            )
        return views[name]

    return made(json.loads(parts.description))


def owned(kind: type) -> bool:
    """Return whether a class is a frozen dataclass of this package, which its fields alone make again."""
    parameters = getattr(kind, "__dataclass_params__", None)
    return (
        parameters is not None
        and parameters.frozen
        and kind.__module__.startswith(OWNERS)
        and all(field.init for field in dataclasses.fields(kind))
    )


def class_named(name: str) -> type:
    """Return a frozen dataclass of this package by `module:name`.

    Raises:
        NotPlainError: there is none.

    """
    module, _, attribute = name.partition(":")
    kind = getattr(importlib.import_module(module), attribute, None) if module.startswith(OWNERS) else None
    if not isinstance(kind, type) or not owned(kind):
        raise NotPlainError(f"{name!r} is no dataclass of this package")
    return kind


def checksums(storages: Iterable[Tensor]) -> list[int]:
    """Return a sum over all bytes of each storage (uint8 [bytes]), 64 bits: a flipped bit, a torn or an empty
    page changes it. Waits for a device once.
    """
    sums = [sum_of(storage) for storage in storages]
    places = {total.device for total in sums}
    found = {
        place: iter(torch.stack([total for total in sums if total.device == place]).tolist())
        for place in places
    }
    return [next(found[total.device]) for total in sums]


def sum_of(storage: Tensor) -> Tensor:
    """Return the sum of the words of a storage and of the bytes after the last whole one, int64, modulo
    2^64.
    """
    whole = storage.numel() // 8 * 8
    return storage[:whole].view(torch.int64).sum() + storage[whole:].sum(dtype=torch.int64)
