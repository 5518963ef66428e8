"""Trainings that are taken down to disk as they go, so that they go on exactly where they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import CompressionError
from workbench.util.folders import cache_folder
from workbench.util.saving import remove_left, save_whole
from workbench.util.text import kind_and_words

MOST = 4  # files kept; the oldest go first


def folder() -> Path:
    """Return where checkpoints lie: in the user's cache directory."""
    return cache_folder("checkpoints")


def checkpoint_path(model: nn.Module, content: Iterable[object]) -> Path:
    """Return the file of a training: named after its options, its data (`content`) and every bit that it
    starts from.
    """
    digest = hashlib.sha256(json.dumps([str(part) for part in content]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(
            tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
            if tensor.ndim
            else str(tensor.item()).encode()
        )
    return folder() / f"{digest.hexdigest()[:24]}.pt"


def save(path: Path, state: dict[str, Any], option: str = "checkpoint_every") -> None:
    """Write a state; whoever reads finds the old one or the new one, whole, whenever the process ends.

    `option` is what asked for it.

    Raises:
        CompressionError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_whole(path, state, durable=True)
    except (OSError, RuntimeError) as error:
        raise CompressionError(
            f"no checkpoint can be written to {path.parent}: {error}; free space there, or set {option}=0"
        ) from error
    remove_left(path.parent)
    for old in sorted(path.parent.glob("*.pt"), key=lambda file: file.stat().st_mtime)[:-MOST]:
        old.unlink(missing_ok=True)


def load(path: Path, warnings: list[str]) -> dict[str, Any] | None:
    """Return the state that was saved last, its tensors on the CPU, None if there is none that can be read.

    Why a file that is there cannot be is added to `warnings`: the training then starts anew.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001  a damaged file raises many kinds of errors
        warnings.append(f"training started anew: {path} cannot be read ({kind_and_words(error)})")
        return None
    return state
