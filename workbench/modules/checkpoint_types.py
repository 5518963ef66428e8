"""In which type the file that a model came from holds each of its tensors: what the dense size counts, and
what a tensor that no step has put on a grid is stored in.

A checkpoint in 16 bits is run in float32 on a CPU. Its numbers are still 16-bit ones, so that storing them so
is exact. A model that was handed over in memory is taken as it is: nothing is noted on it.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.modules.offload import like, streams_to
from workbench.util.library_internals import buffers_of, parameters_of

NOTE = "checkpoint_types"  # on a module: the types of its own tensors, by their last names
NARROWER = "checkpoint_is_narrower"  # on a model: some of them take fewer bytes than in memory
TOTAL = "checkpoint_bytes"  # on a model whose file holds its tensors in a form of its own: the bytes of all
INHERITED = ("weight", "bias")  # what modules made out of a module are stored as; their other tensors are new
TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def header_types(file: Path) -> tuple[dict[str, str], int]:
    """Return (the type of every tensor of a safetensors file as its header names it, the bytes of all)."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        listed = json.loads(opened.read(length))
    listed.pop("__metadata__", None)
    return {name: about["dtype"] for name, about in listed.items()}, file.stat().st_size - 8 - length


def note_types(model: nn.Module, files: Iterable[Path], *, quantized: bool = False) -> None:
    """Note on a model's modules the types in which its files (safetensors) hold their tensors.

    Of files in a form of their own, `quantized` or in numbers of 8 bits, their bytes are noted as well.
    """
    headers = [header_types(file) for file in files]
    types = {name: dtype for in_file, _ in headers for name, dtype in in_file.items()}
    note_given(model, {name: TYPES[dtype] for name, dtype in types.items() if dtype in TYPES})
    if quantized or any(dtype.startswith("F8") for dtype in types.values()):
        note_bytes(model, sum(size for _, size in headers))


def note_bytes(model: nn.Module, size: int) -> None:
    """Note how many bytes the file of a model takes that holds its tensors in a form of its own."""
    vars(model)[TOTAL] = size


def note_given(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Note on a model's modules the types in which its file holds their tensors, where others hold them here.

    `types` are the file's, by its own names. Where those are not the model's (transformers renames tensors
    and joins some), it is the only type of the file, or the narrowest that holds the tensor's numbers.
    """
    present = sorted(set(types.values()), key=lambda dtype: dtype.itemsize)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    by_name = {**{name.removeprefix(prefix): dtype for name, dtype in types.items()}, **types}
    notes: dict[nn.Module, dict[str, torch.dtype]] = {}
    for place, module in model.named_modules():
        for name, tensor in stored_floats(module):
            full = f"{place}.{name}" if place else name
            in_file = by_name.get(full, by_name.get(full.removeprefix(prefix)))
            if len(present) == 1:
                in_file = present[0]
            in_file = in_file or next((dtype for dtype in present if is_exact(tensor, dtype)), tensor.dtype)
            notes.setdefault(module, {})[name] = in_file
            if in_file.itemsize < tensor.dtype.itemsize:
                vars(model)[NARROWER] = True
    if any(
        tensor.dtype != note[name] for module, note in notes.items() for name, tensor in stored_floats(module)
    ):
        for module, note in notes.items():
            vars(module)[NOTE] = note


def main_type(model: nn.Module) -> torch.dtype | None:
    """Return the type of most of the numbers that a model runs with, None without any."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in model.parameters():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else None


def type_words(dtype: torch.dtype | None) -> str:
    """Return such as `float32`, "" for None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def running_note(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """Return a note for users where a model runs in another type than its file has."""
    types = Counter(checkpoint_types(model).values()).most_common(1)
    given, runs = type_words(types[0][0] if types else None), type_words(main_type(model))
    said = (
        f"the checkpoint is {given} and runs in {runs} on this {device.type.upper()}: sizes are against the"
        f" file, speed is against dense in {runs}"
    )
    return (said,) if types and given != runs else ()


def stored_floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over a module's own floating-point tensors that files hold, by their last names."""
    buffers = buffers_of(module)
    saved = set(module.state_dict()) if buffers else set()
    tensors = {**parameters_of(module), **{name: buffers[name] for name in buffers if name in saved}}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point():
            yield name, tensor


def inherit(old: nn.Module, new: nn.Module) -> None:
    """Let a module that takes the place of another be stored as that one."""
    if NOTE in vars(old):
        vars(new).setdefault(NOTE, vars(old)[NOTE])


def checkpoint_types(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the type in which the file holds each tensor, by its name in the state dict: nothing where all
    are held as there, or nothing is known.
    """
    by_tensor: dict[str, torch.dtype] = {}

    def visit(module: nn.Module, prefix: str, inherited: Mapping[str, torch.dtype]) -> None:
        types = vars(module).get(NOTE, inherited)
        for name in (*parameters_of(module), *buffers_of(module)):
            if name in types:
                by_tensor[f"{prefix}{name}"] = types[name]
        below = {name: types[name] for name in INHERITED if name in types}
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", below)

    visit(model, "", {})
    return by_tensor


def narrower(held: torch.dtype, in_file: torch.dtype | None) -> torch.dtype:
    """Return the type that a tensor is stored in: the file's where that takes fewer bytes than the one it is
    held in.
    """
    return in_file if in_file is not None and in_file.itemsize < held.itemsize else held


def is_exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a type holds every number of a tensor."""
    return tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def narrowed(tensor: Tensor, in_file: torch.dtype | None) -> Tensor:
    """Return a tensor as it is stored: in the file's type if that is narrower and holds all its numbers."""
    dtype = narrower(tensor.dtype, in_file)
    return tensor.to(dtype) if dtype != tensor.dtype and is_exact(tensor, dtype) else tensor


def round_to_checkpoint(model: nn.Module, dense: nn.Module, kept: Iterable[Tensor]) -> None:
    """Round what steps have computed to the types in which it will be stored, in the place of the tensors.

    Those of the dense model are exact already; `kept` (on grids) are left, and what would not stay finite.
    Tensors are replaced, not changed: they may be shared.
    """
    if not vars(dense).get(NARROWER):
        return
    left = {id(tensor) for tensor in (*dense.parameters(), *dense.buffers(), *kept)}
    types, nearest = checkpoint_types(model), dict[int, Tensor]()
    for place, module in model.named_modules(remove_duplicate=False):
        for table in (parameters_of(module), buffers_of(module)):
            for name, tensor in list(table.items()):
                dtype = types.get(f"{place}.{name}" if place else name)
                if tensor is None or dtype is None or id(tensor) in left:
                    continue
                if id(tensor) not in nearest:
                    nearest[id(tensor)] = rounded(tensor, dtype)
                table[name] = nearest[id(tensor)]  # type: ignore[assignment]
                left.add(id(table[name]))


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor with the nearest numbers of a narrower type, held as before.

    Itself where one of them would be infinite there.
    """
    if narrower(tensor.dtype, dtype) == tensor.dtype:
        return tensor
    values = tensor.detach().to(dtype).to(tensor.dtype)
    if not torch.isfinite(values).all():
        return tensor
    nearest = like(tensor, values)
    if (device := streams_to(tensor)) is not None:
        nearest.streams_to = device  # type: ignore[attr-defined]
    return nearest
