"""Where a teacher's answers are kept, one row a training item: on its device, or in a file that is gone with
the process.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from workbench.util.folders import cache_folder


class AnswerTable(Protocol):
    """Rows of one shape and type that are written in runs and read in any order."""

    def put(self, start: int, values: Tensor) -> None:
        """Write rows from `start` on."""

    def take(self, index: Tensor) -> Tensor:
        """Return rows `index` (int64 [N], on the CPU) on the device that they came from."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of all rows."""


@dataclass
class MemoryTable:
    """Rows on the teacher's device."""

    values: Tensor

    @classmethod
    def like(cls, values: Tensor, rows: int) -> MemoryTable:
        """Return a table of so many rows such as these."""
        return cls(values.new_empty((rows, *values.shape[1:])))

    def put(self, start: int, values: Tensor) -> None:
        """Write rows from `start` on."""
        self.values[start : start + len(values)] = values

    def take(self, index: Tensor) -> Tensor:
        """Return rows `index` (int64 [N], on the CPU) on the device that they came from."""
        return self.values[index.to(self.values.device)]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all rows."""
        return self.values.nbytes


@dataclass
class DiskTable:
    """Rows in a file without a name in `folder`: the system removes it when the table goes, however the
    process ends.

    The file is written by plain writes, which say when the disk is full, and read through a memory map, so
    that the system's own cache holds what there is memory for.
    """

    folder: Path
    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bytes_read: np.memmap = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Make the file, sparse: space is taken as rows are written.

        Raises:
            OSError: the folder cannot be written.

        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Closed with the table
        self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.file.truncate(self.nbytes)
        self.bytes_read = np.memmap(self.file, dtype=np.uint8, mode="r", shape=(self.rows, self.width))

    @classmethod
    def like(cls, folder: Path, values: Tensor, rows: int) -> DiskTable:
        """Return a table of so many rows such as these."""
        return cls(folder, rows, tuple(values.shape[1:]), values.dtype, values.device)

    @property
    def width(self) -> int:
        """Return the bytes of a row."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Return the bytes of all rows."""
        return self.rows * self.width

    def put(self, start: int, values: Tensor) -> None:
        """Write rows from `start` on.

        Raises:
            OSError: the disk is full.

        """
        left = (
            values.detach()
            .cpu()
            .reshape(len(values), -1)
            .contiguous()
            .view(torch.uint8)
            .numpy()
            .data.cast("B")
        )
        self.file.seek(start * self.width)
        while left:
            left = left[self.file.write(left) :]

    def take(self, index: Tensor) -> Tensor:
        """Return rows `index` (int64 [N], on the CPU) on the device that they came from."""
        rows = torch.from_numpy(self.bytes_read[index.numpy()])
        return rows.view(self.dtype).view(len(index), *self.shape).to(self.device)


def disk_folder() -> Path:
    """Return where files of answers lie: in the user's cache directory, as a temporary one is often in
    memory.
    """
    return cache_folder("teacher")


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that `folder` is on, or will be."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free
