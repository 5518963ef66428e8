"""Values of plain data: the memory that they hold, and the same value in memory elsewhere.

A value is made of tensors, numbers, strings, None, tuples, lists, dicts and frozen dataclasses of this
package. Views of one storage stay views of one storage wherever they are moved, with the strides that they
had: what is computed from them has the same bits.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, str)
OWNERS = ("workbench.",)  # modules whose dataclasses are put together again


class NotPlainError(ValueError):
    """A value holds something that is no plain data, such as a module or a function."""


def storage_of(tensor: Tensor) -> Tensor:
    """Return all memory that a tensor is a view of, uint8 [bytes], not copied."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def storages_in(value: Any) -> dict[tuple[str, int], Tensor]:
    """Return the storages that a value holds, each once, by device and address.

    Modules count by their parameters and buffers.
    """
    firsts: dict[tuple[str, int], Tensor] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, PLAIN) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            if part.layout is torch.strided and part.untyped_storage().nbytes():
                firsts.setdefault((str(part.device), part.untyped_storage().data_ptr()), part.detach())
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
    return {place: storage_of(tensor) for place, tensor in firsts.items()}


def relocated(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with each of its storages (uint8 [bytes]) where `move` puts it, called in the order in
    which they are first met.

    Raises:
        NotPlainError: it holds something else than plain data.

    """
    storages: dict[tuple[str, int], Tensor] = {}
    views: dict[int, Tensor] = {}  # the same object where it was the same object

    def view(part: Tensor) -> Tensor:
        place = str(part.device), part.untyped_storage().data_ptr()
        if place not in storages:
            storages[place] = move(storage_of(part))
        memory = storages[place].untyped_storage()
        return torch.empty(0, dtype=part.dtype, device=memory.device).set_(
            memory, part.storage_offset(), part.shape, part.stride()
        )

    def there(part: Any) -> Any:
        kind = type(part)
        if kind in PLAIN:
            return part
        if kind is Tensor and part.layout is torch.strided and not part.requires_grad:
            if id(part) not in views:
                views[id(part)] = view(part)
            return views[id(part)]
        if kind is tuple or kind is list:
            return kind(map(there, part))
        if kind is dict:
            return {there(key): there(entry) for key, entry in part.items()}
        if owned(kind):
            return kind(
                **{field.name: there(getattr(part, field.name)) for field in dataclasses.fields(part)}
            )
        raise NotPlainError(f"{kind.__name__} is no plain data")

    return there(value)


def is_plain(value: Any) -> bool:
    """Return whether a value is plain data, which `relocated` takes."""
    try:
        relocated(value, lambda storage: storage)
    except NotPlainError:
        return False
    return True


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
    """Return a frozen dataclass of this package by `module.name`.

    Raises:
        NotPlainError: there is none.

    """
    module, _, attribute = name.rpartition(".")
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
    numbers = {
        place: iter(torch.stack([total for total in sums if total.device == place]).tolist())
        for place in places
    }
    return [next(numbers[total.device]) for total in sums]


def sum_of(storage: Tensor) -> Tensor:
    """Return the sum of the words of a storage and of the bytes after the last whole one, int64, modulo
    2^64.
    """
    whole = storage.numel() // 8 * 8
    return storage[:whole].view(torch.int64).sum() + storage[whole:].sum(dtype=torch.int64)
