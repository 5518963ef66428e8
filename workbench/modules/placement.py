"""Where a model's weights lie: on one device, on the host and streamed block by block, or spread over several
GPUs.

Streaming is `workbench.modules.offload`. Spreading takes its device map from accelerate
(`infer_auto_device_map`); hooks at the root of the model carry activations from one device to the next, so
that copies that share its tensors are spread too.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from workbench.errors import DeviceError
from workbench.modules.offload import HOST, attach, blocks_of, moved, outside, streams_to
from workbench.modules.sharing import holds_modules, sharing_copy
from workbench.util.device import free_bytes, host_bytes
from workbench.util.library_internals import buffers_of

Placement = Literal["auto", "device", "streamed", "spread"]
COPIES = 2  # the dense model, and as much again for the compressed one
ROOM = 0.25  # of the model's bytes, for activations and what is computed once
LEAST_ROOM = {"cuda": 2**30, "cpu": 0}  # at least so many bytes
PINNED = 3  # times the model's bytes that the host must have before its tensors are pinned


def placement_named(placement: str | None) -> Placement:
    """Return the placement asked for, None meaning "auto".

    Raises:
        DeviceError: an unknown one.

    """
    if placement is None or placement in get_args(Placement):
        return cast("Placement", placement or "auto")
    raise DeviceError(f"placement={placement!r} is unknown: use {', '.join(map(repr, get_args(Placement)))}")


def place(model: nn.Module, device: torch.device, placement: Placement = "auto") -> nn.Module:
    """Return the model ready to run on `device`: there, streamed to it, or spread over all GPUs beginning
    with it.

    The model is on the host, and is changed in place. "auto" streams where the model, a compressed copy and
    some room need more than the device has free; "device" refuses only what cannot be held at all.

    Raises:
        DeviceError: the device cannot hold the model, or the largest block of a streamed one, or there are
            not several GPUs.
    """
    if placement == "spread":
        return spread(model, device)
    needed, free = required_bytes(model, device), free_bytes(device)
    if placement == "streamed" or (placement == "auto" and device.type != "cpu" and needed > free):
        check_blocks(model, device)
        return attach(
            model, device, pinned=device.type == "cuda" and PINNED * model_bytes(model) < host_bytes()
        )
    if model_bytes(model) > free and device.type != "cpu":
        raise DeviceError(
            f"model {gigabytes(model_bytes(model))}, free {gigabytes(free)} on {device}: it cannot be held"
            " there; take placement='streamed', or 'spread' over several GPUs"
        )
    try:
        return model.to(device)
    except RuntimeError as error:
        raise DeviceError(
            f"device {str(device)!r} cannot hold the model: {' '.join(str(error).split())[:300]}"
        ) from None


def placed(model: nn.Module, device: torch.device, placement: Placement) -> nn.Module:
    """Return a model ready to run: the given one where it stays, else a copy, and the given one stays as it
    is. Raises as `place`.
    """
    here = next(itertools.chain(model.parameters(), model.buffers())).device
    if is_placed(model):
        return model
    if placement in {"auto", "device"} and here == device:
        return model
    if placement == "device" or (
        placement == "auto" and (device.type == "cpu" or required_bytes(model, device) <= free_bytes(device))
    ):
        return copy.deepcopy(model).to(device)
    streams = placement != "spread" and not any(holds_modules(module) for module in model.modules())
    return place(sharing_copy(model) if streams else copy.deepcopy(model).to(HOST), device, placement)


def is_placed(model: nn.Module) -> bool:
    """Return whether a model is streamed or spread."""
    return streams_to(model) is not None or hasattr(model, "spread_over")


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once."""
    return sum(
        {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values()
    )


def required_bytes(model: nn.Module, device: torch.device) -> int:
    """Return the bytes that a model needs of a device to be compressed and measured there: itself, a
    compressed copy, and room.
    """
    size = model_bytes(model)
    return COPIES * size + max(int(ROOM * size), LEAST_ROOM.get(device.type, 0))


def check_blocks(model: nn.Module, device: torch.device) -> None:
    """Refuse a model of which the device cannot hold two blocks and what lies outside them (twice: dense and
    compressed).
    """
    blocks = blocks_of(model)
    largest = max((model_bytes(block) for block in blocks), default=0)
    around = sum(
        {
            tensor.data_ptr(): tensor.nbytes
            for module in outside(model, blocks)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }.values()
    )
    needed, free = 2 * around + 2 * largest + LEAST_ROOM.get(device.type, 0), free_bytes(device)
    if needed > free:
        raise DeviceError(
            f"model {gigabytes(model_bytes(model))}, free {gigabytes(free)} on {device}: streaming needs"
            f" {gigabytes(needed)} there, for two blocks of {gigabytes(largest)} and {gigabytes(around)}"
            " outside them, dense and compressed; take a larger device, or placement='spread' over several"
            " GPUs"
        )


def gigabytes(size: float) -> str:
    """Return bytes in words, such as `26.1 GB`; small ones in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.2f} MB"


def words(model: nn.Module) -> str:
    """Return how a model is placed, in a few words that follow the device's name.

    Empty where it lies on its device.
    """
    if streams_to(model) is not None:
        return "streamed from the host"
    over = getattr(model, "spread_over", ())
    return f"spread over {len(over)} devices" if over else ""


def untimed(model: nn.Module) -> str:
    """Return why a model's latency and peak memory are not measured, empty if they are."""
    if streams_to(model) is not None:
        return (
            f"streamed: the model ({gigabytes(model_bytes(model))}) is not on {streams_to(model)}, so what"
            " would be timed is how fast it gets there"
        )
    if hasattr(model, "spread_over"):
        return (
            f"{words(model)}: no kernel runs a compressed form there, so what would be timed is the way"
            " between the devices"
        )
    return ""


# --- several GPUs


def spread(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread a model over all GPUs, beginning with `device`, whole blocks each, and return it.

    Raises:
        DeviceError: fewer than two devices, accelerate is not installed, or the model does not fit.

    """
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        raise DeviceError(
            f"placement='spread' needs two GPUs or more; torch sees {count} for device {str(device)!r}: take"
            " placement='streamed'"
        )
    order = [device.index or 0, *(index for index in range(count) if index != (device.index or 0))]
    devices = device_map(model, {index: free_bytes(torch.device("cuda", index)) for index in order})
    return attach_spread(
        model,
        {name: torch.device("cuda", where) for name, where in devices.items()},
        torch.device("cuda", order[0]),
    )


def device_map(model: nn.Module, memory: Mapping[int, int]) -> dict[str, int]:
    """Return which GPU each part of a model goes to, whole blocks each.

    `memory` is what is free on each, bytes.

    Raises:
        DeviceError: accelerate is not installed, or the model, dense and compressed, does not fit.
    """
    try:
        from accelerate import infer_auto_device_map
    except ImportError:
        raise DeviceError("placement='spread' needs accelerate: pip install accelerate") from None
    size, blocks = model_bytes(model), blocks_of(model)
    whole = [*blocks, *(module for module in outside(model, blocks) if next(module.children(), None) is None)]
    step = max(1, max(map(model_bytes, whole), default=0))
    most = {index: int(free / (COPIES + ROOM)) for index, free in memory.items()}
    shares = range(size // len(most) + step, max(most.values()) + step, step)  # as even as whole parts allow
    for share in itertools.islice(shares, len(blocks) + 2):
        limits = {index: min(share, mine) for index, mine in most.items()}
        devices = infer_auto_device_map(
            model,
            max_memory=limits,
            no_split_module_classes=sorted({type(block).__name__ for block in blocks}),
        )
        if not set(devices.values()) - set(most):
            return dict(devices)
    raise DeviceError(
        f"model {gigabytes(size)}, free"
        f" {', '.join(f'{gigabytes(free)} on cuda:{index}' for index, free in memory.items())}: dense and"
        " compressed do not fit; take placement='streamed'"
    )


def attach_spread(model: nn.Module, devices: Mapping[str, torch.device], first: torch.device) -> nn.Module:
    """Put each module of a device map where it says, and let the model carry its inputs from there to there.

    Changed in place.
    """
    for name, where in devices.items():
        part = model.get_submodule(name) if name in dict(model.named_modules()) else None
        if part is not None:
            part.to(where)
            continue
        owner, _, tensor = name.rpartition(".")  # a parameter of its own
        held: Any = model.get_submodule(owner)
        value = getattr(held, tensor)
        setattr(
            held,
            tensor,
            (
                nn.Parameter(value.to(where), requires_grad=False)
                if isinstance(value, nn.Parameter)
                else value.to(where)
            ),
        )
    for buffer_name, buffer in list(model.named_buffers()):
        if buffer.device == HOST and first != HOST:  # outside the map: what belongs to the root
            owner, _, tensor = buffer_name.rpartition(".")
            # register_buffer would forget whether it is saved
            buffers_of(model.get_submodule(owner))[tensor] = buffer.to(first)
    model.spread_over = tuple(dict.fromkeys(devices.values()))  # type: ignore[assignment]
    model.carries_to = first  # type: ignore[assignment]
    model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    model.register_forward_hook(end, always_call=True)
    return model


def begin(model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """Begin a call of a spread model: until it ends, whatever a block or a module with weights of its own is
    given goes to where these are.
    """
    places = {id(block): block for block in blocks_of(model) if any(True for _ in block.parameters())}
    places |= {
        id(module): module
        for module in model.modules()
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    }
    vars(model)["carrying"] = [
        module.register_forward_pre_hook(carry, with_kwargs=True, prepend=True)
        for module in places.values()
        if module is not model
    ]
    first = cast("torch.device", model.carries_to)
    return moved(args, first), moved(named, first)


def carry(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """Move what a module is given to where its weights are."""
    where = next(itertools.chain(module.parameters(), module.buffers())).device
    return moved(args, where), moved(named, where)


def end(model: nn.Module, _inputs: Any, output: Any) -> Any:
    """End a call of a spread model: what it returns goes to where its inputs came from."""
    for handle in vars(model).pop("carrying", ()):
        handle.remove()
    return moved(output, cast("torch.device", model.carries_to))
