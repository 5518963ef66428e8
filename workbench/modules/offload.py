"""Models larger than the GPU's memory: they live on the host, and each block is on the device only while it
is its turn.

A streamed model is an ordinary one whose tensors lie in host memory (pinned where there is room) and know the
device that they are computed on. Two hooks at its root are all that it carries, so copies that share its
tensors are streamed too: a call moves its inputs and whatever lies outside the blocks to the device, then
each block just before it runs, the next one copied while it does. Compressing takes the same way:
`workbench.modules.visiting` brings some layers to the device and takes what became of them home.

The arithmetic is that of the resident model on the same device, in the same order: the same bits come out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.util.library_internals import buffers_of, parameters_of

HOST = torch.device("cpu")


def streams_to(thing: nn.Module | Tensor) -> torch.device | None:
    """Return the device that a streamed model or one of its tensors is computed on.

    None for anything that stays where it is.
    """
    device = getattr(thing, "streams_to", None)
    return device if isinstance(device, torch.device) else None


def attach(model: nn.Module, device: torch.device, *, pinned: bool = False) -> nn.Module:
    """Make a model on the host a streamed one, and return it.

    `pinned` copies its tensors into memory that a GPU reads at full speed.

    Parameters are replaced, not changed: another model that shares them stays as it is.
    """
    replace_tensors(model, lambda tensor: at_host(tensor, pinned=pinned))
    model.streams_to = device  # type: ignore[assignment]
    mark(model)
    model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    model.register_forward_hook(end, always_call=True)
    return model


def mark(model: nn.Module) -> None:
    """Let every tensor of a streamed model know where it is computed; a deep copy forgets it."""
    device = streams_to(model)
    for tensor in (*model.parameters(), *model.buffers()) if device is not None else ():
        tensor.streams_to = device  # type: ignore[attr-defined]


def tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a module's own parameters and buffers by name, to be read and replaced."""
    return parameters_of(module), buffers_of(module)


def replace_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put `change(tensor)` in the place of every parameter and buffer of a model; shared ones stay shared."""
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        for table in tables(module):
            for name, tensor in table.items():
                if tensor is not None:
                    if id(tensor) not in replaced:
                        replaced[id(tensor)] = like(tensor, change(tensor))
                    table[name] = replaced[id(tensor)]


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return values as a parameter where `tensor` is one."""
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def at_host(tensor: Tensor, *, pinned: bool) -> Tensor:
    """Return a tensor's values in host memory, the same tensor if they are there already and need not be
    pinned.
    """
    values = tensor.detach()
    if not pinned or values.is_pinned():
        return values.to(HOST)
    pinned_copy = torch.empty_like(values, device=HOST, pin_memory=True)
    return pinned_copy.copy_(values)


def at_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, the same if it is there.

    Copied without waiting where it lies in pinned memory.
    """
    return tensor.to(device, non_blocking=True)


def fetched(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device that remembers the tensor at home.

    Copied without waiting where that is pinned.
    """
    values = torch.empty_like(host.detach(), device=device).copy_(host.detach(), non_blocking=True)
    on_device = like(host, values)
    on_device.home = host  # type: ignore[attr-defined]
    return on_device


def taken_home(tensor: Tensor, *, pinned: bool) -> Tensor:
    """Return the tensor at home that one on the device is a copy of; of a new one, a copy at home."""
    home = getattr(tensor, "home", None)
    if isinstance(home, Tensor):
        return home
    fresh = like(tensor, at_host(tensor, pinned=pinned))
    fresh.streams_to = tensor.device  # type: ignore[attr-defined]
    return fresh


def bring(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Put copies on the device in the place of every tensor of the modules; shared tensors stay shared."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        for table in tables(module):
            for name, tensor in table.items():
                if tensor is not None and not hasattr(tensor, "home"):
                    if id(tensor) not in copies:
                        copies[id(tensor)] = fetched(tensor, device)
                    table[name] = copies[id(tensor)]


def send_home(modules: Iterable[nn.Module], *, pinned: bool = False) -> None:
    """Put the tensors at home back into the modules.

    New tensors of the device go home as well, into pinned memory if so asked.
    """
    homes: dict[int, Tensor] = {}
    for module in modules:
        for table in tables(module):
            for name, tensor in table.items():
                if tensor is not None and streams_to(tensor) is None:
                    if id(tensor) not in homes:
                        homes[id(tensor)] = taken_home(tensor, pinned=pinned)
                    table[name] = homes[id(tensor)]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that take their turns: the members of every outermost list of modules, in order."""
    blocks: list[nn.Module] = []
    for child in model.children():
        blocks += child.children() if isinstance(child, nn.ModuleList) else blocks_of(child)
    return blocks


def outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules outside the blocks: embeddings, the last norm, the head."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [module for module in model.modules() if id(module) not in inside]


class Pass:
    """One or more forward passes: what lies outside the blocks is on the device throughout, two blocks at
    most with it.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Bring what lies outside the blocks, and wait for the blocks' turns."""
        self.device = device
        self.blocks = [block for block in blocks_of(model) if any(True for _ in block.parameters())]
        self.rest = outside(model, self.blocks)
        self.ahead = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready: dict[int, dict[int, Tensor]] = {}  # by block: the copies, by the id of the tensor at home
        bring(self.rest, device)
        self.handles = [
            handle
            for index, block in enumerate(self.blocks)
            for handle in (
                block.register_forward_pre_hook(self.enters(index), prepend=True),
                block.register_forward_hook(self.leaves, always_call=True),
            )
        ]

    def enters(self, index: int) -> Any:
        """Return the hook that puts a block in place before it runs, and has the next one copied
        meanwhile.
        """

        def hook(block: nn.Module, _inputs: Any) -> None:
            self.copy(index)
            copies = self.ready.pop(index)
            if self.ahead is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.ahead)
            for module in block.modules():
                for table in tables(module):
                    table.update(
                        {
                            name: copies[id(tensor)]
                            for name, tensor in table.items()
                            if tensor is not None and id(tensor) in copies
                        }
                    )
            if self.ahead is not None and index + 1 < len(self.blocks):
                self.copy(index + 1)

        return hook

    def copy(self, index: int) -> None:
        """Start copying a block, unless that was done before."""
        if index in self.ready:
            return
        host = {
            id(tensor): tensor
            for module in self.blocks[index].modules()
            for table in tables(module)
            for tensor in table.values()
            if tensor is not None
        }
        host = {key: tensor for key, tensor in host.items() if not hasattr(tensor, "home")}
        if self.ahead is None:
            self.ready[index] = {key: fetched(tensor, self.device) for key, tensor in host.items()}
            return
        copies = {
            key: like(tensor, torch.empty_like(tensor.detach(), device=self.device))
            for key, tensor in host.items()
        }
        self.ahead.wait_stream(
            torch.cuda.current_stream(self.device)
        )  # the memory may have been the last block's
        with torch.cuda.stream(self.ahead):
            for key, copied in copies.items():
                copied.detach().copy_(host[key].detach(), non_blocking=True)
                copied.home = host[key]  # type: ignore[attr-defined]
        self.ready[index] = copies

    def leaves(self, block: nn.Module, _inputs: Any, _output: Any) -> None:
        """Take a block off the device after it ran."""
        send_home(block.modules())

    def close(self) -> None:
        """Leave the device."""
        for handle in self.handles:
            handle.remove()
        if self.ahead is not None:
            torch.cuda.current_stream(self.device).wait_stream(
                self.ahead
            )  # what it still writes is not given away before
        self.ready.clear()
        for block in self.blocks:
            send_home(block.modules())
        send_home(self.rest)


@contextmanager
def streaming(model: nn.Module) -> Iterator[None]:
    """Within, a streamed model and its parts can be called; whatever lies outside its blocks is copied once.

    Of another model: nothing.

    A call of the whole model does without; several calls in a row are quicker within, and calls of its parts
    need it.
    """
    device = streams_to(model)
    if device is None or "passing" in vars(model):
        yield
        return
    vars(model)["passing"] = now = Pass(model, device)
    try:
        yield
    finally:
        del vars(model)["passing"]
        now.close()


def begin(model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """Begin a call of a streamed model: its inputs go to the device, and a pass of its own begins unless one
    has.
    """
    device = cast("torch.device", streams_to(model))
    if "passing" not in vars(model):
        vars(model)["passing"] = Pass(model, device)
        vars(model)["passing_once"] = True
    return moved(args, device), moved(named, device)


def end(model: nn.Module, _inputs: Any, _output: Any) -> None:
    """End a call of a streamed model, and the pass if the call began it."""
    if vars(model).pop("passing_once", False):
        vars(model).pop("passing").close()


def moved(value: Any, device: torch.device, *, pinned: bool = False) -> Any:
    """Return a value with every tensor in it on `device` (of the host's: in pinned memory if so asked).

    In tuples, lists, dictionaries and dataclasses, that is; anything else is left as it is.
    """
    if isinstance(value, Tensor):
        return at_host(value, pinned=pinned) if device == HOST else at_device(value, device)
    if isinstance(value, dict) and hasattr(value, "to_tuple"):  # an output of transformers
        return type(value)(**{name: moved(part, device, pinned=pinned) for name, part in value.items()})
    if type(value) is dict:
        return {name: moved(part, device, pinned=pinned) for name, part in value.items()}
    if type(value) in {tuple, list}:
        return type(value)(moved(part, device, pinned=pinned) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "to_tuple"):
        return dataclasses.replace(
            value,
            **{
                field.name: moved(getattr(value, field.name), device, pinned=pinned)
                for field in dataclasses.fields(value)
                if field.init
            },
        )
    return value


def identity(tensor: Tensor) -> int:
    """Return an id that tells kept tensors apart: of a copy on the device, which may be gone tomorrow, that
    of the tensor at home.
    """
    return id(getattr(tensor, "home", tensor))


def device_of(model: nn.Module) -> torch.device:
    """Return where a model computes, which is where its inputs belong: the device that it streams to, or
    where its first tensor lies.
    """
    first = next(iter((*model.parameters(), *model.buffers())), None)
    return streams_to(model) or (HOST if first is None else first.device)
