"""What was computed once, on disk for the next process: one file of `torch.save` a value, never trusted,
never needed.

A file lies under its model's fingerprint and a hash of everything that its bits depend on: the weights, the
calibration data, the device and its settings, the versions of torch, transformers and this package, down to
its sources. What cannot be read is computed again and written anew; what cannot be written costs a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.calibration.tensor_tree import PLAIN, checksums, class_named, is_plain, storages_in
from workbench.modules.offload import device_of
from workbench.util.device import describe
from workbench.util.fast_path import FastPath
from workbench.util.folders import cache_folder
from workbench.util.saving import PART, remove_left, save_whole
from workbench.util.text import file_name, kind_and_words

if TYPE_CHECKING:
    from workbench.tasks.base import Task

WHERE = "WORKBENCH_CACHE"  # environment variable: a folder, or "off"
DISK_BYTES = 4 * 2**30  # of all models together; the least recently used go first
WORTH_SECONDS = 0.2  # what took less is computed again rather than read
FILES = (".pt", ".safetensors")  # the second were written by versions before, and only make room


def folder() -> Path | None:
    """Return where values are kept: in the user's cache directory, where `WORKBENCH_CACHE` says, or nowhere
    if that is "off".
    """
    said = os.environ.get(WHERE, "")
    if said.lower() in {"off", "0", "none"}:
        return None
    return Path(said).expanduser() if said else cache_folder("statistics")


def here(device: torch.device) -> str:  # noqa: ARG001  it is the same on every device
    """Return why nothing is kept on disk, "" if it is."""
    place = folder()
    if place is None:
        return f"{WHERE} is {os.environ[WHERE]}"
    there = next(path for path in (place, *place.parents) if path.exists())
    return "" if os.access(there, os.W_OK) else f"{there} cannot be written"


ON_DISK = FastPath(
    "statistics on disk", "the next session with the same model: what took long is read, not computed", here
)


def disk_cache(task: Task) -> DiskCache | None:
    """Return the cache of a task's model and calibration data in the user's folder, None if that is switched
    off.
    """
    place = folder()
    return None if place is None else DiskCache(place, task)


@dataclass
class DiskCache:
    """Values of one task under `place`.

    Nothing is read, hashed or written before a value is asked for or offered.
    """

    place: Path
    task: Task
    limit: int = DISK_BYTES
    worth_seconds: float = WORTH_SECONDS
    trouble: str = ""  # what could not be read or written last, and why
    full: bool = False  # nothing can be written

    @cached_property
    def home(self) -> Path:
        """Return the folder of this model in this setting."""
        return (
            self.place / (file_name(self.task.model_fingerprint).strip(".") or "model") / setting(self.task)
        )

    def path(self, key: Hashable) -> Path | None:
        """Return the file of a key, None for one that other processes would not write the same way."""
        told = key_text(key)
        return None if told is None else self.home / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.pt"

    def read(self, key: Hashable) -> tuple[Any] | None:
        """Return (the value,) that was written under a key, on the devices where it lay.

        None if it is not there, damaged, or names anything but plain data.
        """
        path = self.path(key)
        if path is None:
            return None
        try:
            value = loaded(path, str(key_text(key)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        # A damaged file raises many kinds; the value is computed anew
        except Exception as error:  # noqa: BLE001
            self.trouble = (
                f"what was computed once could not be read and was computed anew: {path}:"
                f" {kind_and_words(error)}"
            )
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return (value,)

    def offer(self, key: Hashable, value: Any, seconds: float) -> None:
        """Write a value, if it is plain data that took long enough and is not too large."""
        path = self.path(key) if seconds >= self.worth_seconds else None
        if path is None or not is_plain(value):
            return
        storages = list(storages_in(value).values())
        size = sum(storage.numel() for storage in storages)
        if size > self.limit // 2:
            return
        record = {"key": key_text(key), "checksums": checksums(storages), "value": value}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.tidy(size)
            note = path.parent.parent / "name"
            if not note.exists():
                note.write_text(self.task.model_name)
            save_whole(path, record)
        except (OSError, RuntimeError) as error:  # the second is torch's for a full disk
            if not self.full:  # one warning is enough
                self.trouble = (
                    f"what was computed once is not kept for the next session: {self.place} cannot be written"
                    f" ({error}); free space there, or set {WHERE}=off or to another folder"
                )
            self.full = True

    def tidy(self, wanted: int) -> None:
        """Delete what was used least recently until `wanted` bytes fit, and what processes left that ended
        while they wrote.
        """
        remove_left(self.place)
        files = files_under(self.place)
        total = sum(size for _, size, _ in files)
        for path, size, _ in files:
            if total + wanted <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def take_trouble(self) -> str:
        """Return why something could not be read or written, once, or ""."""
        trouble, self.trouble = self.trouble, ""
        return trouble


def loaded(path: Path, told: str) -> Any:
    """Return the value in a file; runs no code but this package's frozen dataclasses.

    Raises:
        Exception: it is not there, damaged, of another key, or names what this package does not have; of many
            kinds.
    """
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([class_named(name) for name in named]):
        record = torch.load(path, weights_only=True)
    if record["key"] != told:
        raise ValueError(f"{path} holds {record['key']}, not {told}")
    if checksums(storages_in(record["value"]).values()) != record["checksums"]:
        raise ValueError(f"{path} is damaged")
    return record["value"]


def files_under(place: Path) -> list[tuple[Path, int, float]]:
    """Return (path, bytes, last use) of all files of values, the least recently used first.

    What vanishes meanwhile is left out.
    """
    files = []
    for path in place.rglob("*"):
        if path.suffix not in FILES:
            continue
        with contextlib.suppress(OSError):
            status = path.stat()
            files.append((path, status.st_size, status.st_mtime))
    return sorted(files, key=lambda file: file[2])


@dataclass(frozen=True)
class CachedModel:
    """What is on disk for one model: its fingerprint and name, files, bytes, and when one was last used
    (seconds since 1970).
    """

    fingerprint: str
    name: str
    files: int
    bytes: int
    used: float


def contents(place: Path) -> tuple[CachedModel, ...]:
    """Return the models of which something is on disk, the most recently used first."""
    models: dict[str, list[tuple[Path, int, float]]] = {}
    for file in files_under(place):
        models.setdefault(file[0].relative_to(place).parts[0], []).append(file)
    cached = []
    for fingerprint, files in models.items():
        note = place / fingerprint / "name"
        name = note.read_text() if note.exists() else ""
        cached.append(
            CachedModel(
                fingerprint,
                name,
                len(files),
                sum(size for _, size, _ in files),
                max(used for *_, used in files),
            )
        )
    return tuple(sorted(cached, key=lambda kept: -kept.used))


def clear(place: Path) -> int:
    """Delete everything on disk; return how many bytes that were.

    Raises:
        OSError: something cannot be deleted.

    """
    total = sum(size for _, size, _ in files_under(place))
    for model in place.iterdir() if place.exists() else ():
        if (model / "name").exists() or any(path.suffix in {*FILES, PART} for path in model.rglob("*")):
            shutil.rmtree(model)
    return total


def key_text(key: Hashable) -> str | None:
    """Return a key as text that is the same in every process, None if it has parts for which there is
    none.
    """
    if isinstance(key, PLAIN):
        return repr(key)
    if isinstance(key, tuple):
        texts = [key_text(part) for part in key]
        return None if None in texts else f"({', '.join(map(str, texts))})"
    if dataclasses.is_dataclass(key) and not isinstance(key, type):
        return key_text(
            (type(key).__qualname__, *(getattr(key, field.name) for field in dataclasses.fields(key)))
        )
    return None


def setting(task: Task) -> str:
    """Return a hash of all that the bits of a value depend on besides its key, the weights themselves
    included: 24 hexadecimal digits.
    """
    import transformers

    device = device_of(task.model)
    weights = checksums(storages_in(task.model).values())
    shapes = [
        (name, list(tensor.shape), str(tensor.dtype)) for name, tensor in task.model.state_dict().items()
    ]
    devices = sorted({str(tensor.device) for tensor in task.model.parameters()})
    about = [
        weights,
        shapes,
        devices,
        task.model_fingerprint,
        task.calibration.fingerprint,
        task.kind.name,
        task.batch_size,
        describe(device),
        torch.__version__,
        transformers.__version__,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        sources(),
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


COMPUTES = (
    "calibration",
    "compress",
    "formats",
    "kernels",
    "modules",
    "runtime",
    "tasks",
)  # folders whose code makes what is kept


def sources() -> str:
    """Return a hash of the code that computes such values: what another version computed is not taken for its
    own.
    """
    here = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for folder in COMPUTES for path in (here / folder).rglob("*.py")):
        digest.update(path.relative_to(here).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
