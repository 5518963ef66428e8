"""What was computed once, kept within a stated budget: on the model's device, then in host memory, then on
disk, then dropped.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from workbench.calibration.tensor_tree import is_plain, relocated, storages_in
from workbench.util.device import free_bytes, host_bytes

if TYPE_CHECKING:
    from workbench.calibration.disk_cache import DiskCache
    from workbench.tasks.base import Task

T = TypeVar("T")

DEVICE_SHARE = 0.5  # of the device memory that is free when the first value is kept
HOST_SHARE = 0.25  # of the machine's memory


@dataclass(frozen=True)
class Budget:
    """Bytes that kept values may take: on the model's device, and in host memory what was moved there.

    On a CPU both are one memory, and `host` is unused.
    """

    device: int
    host: int = 0

    @staticmethod
    def of(device: torch.device) -> Budget:
        """Return the default: half of a GPU's free memory and a quarter of the host's.

        A quarter of the host's on a CPU.
        """
        host = int(HOST_SHARE * host_bytes())
        return Budget(int(DEVICE_SHARE * free_bytes(device)), host) if device.type == "cuda" else Budget(host)


@dataclass
class CacheEntry:
    """One kept value; `used` is the move that asked for it last."""

    value: Any
    storages: dict[tuple[str, int], int]  # bytes by device and address
    used: int
    first_out: bool
    homes: tuple[torch.device, ...] = ()  # where each storage lay, while the value lies in host memory

    @property
    def on_host(self) -> bool:
        """Return whether it was moved to host memory."""
        return bool(self.homes)


@dataclass
class Cache:
    """Values by key within a budget.

    Safe to use from several threads, which may then compute the same value twice.

    A move is what a user waits for, such as one `compress`; `begin` starts one. What a move has used is not
    thrown out for what the same move makes: a value that finds no room then is not kept if it is `optional`
    (asked for once a move), and kept over the budget until the next move if it is not. Everything else goes
    least recently used first. Memory that several values share, or that `held` (the model itself) holds
    anyway, counts once or not at all.
    """

    device: torch.device
    budget: Budget | None = None
    disk: DiskCache | None = None
    held: Callable[[], Any] = tuple
    entries: OrderedDict[Hashable, CacheEntry] = field(default_factory=OrderedDict)
    moves: int = 0

    def __post_init__(self) -> None:
        """Start empty."""
        self.lock = threading.RLock()
        self.users: Counter[tuple[str, int]] = Counter()  # entries by storage
        self.ignored: frozenset[tuple[str, int]] | None = None
        self.used_bytes = {"device": 0, "host": 0}

    # --- what callers use

    def once(
        self,
        key: Hashable,
        compute: Callable[[], T],
        *,
        lasting: bool = False,
        optional: bool = False,
        first_out: bool = False,
    ) -> T:
        """Return `compute()`, or what it returned before under this key.

        Args:
            key: what the value depends on, besides the model and its data.
            compute: how to make it; its value must not be changed afterwards, unless it holds no tensors when
                it is made.
            lasting: also keep it on disk, if it is plain data and took long: it depends on nothing but model,
                calibration data and key.
            optional: do not keep it where only what this move has used could make room.
            first_out: throw it out before anything else, and never move it to host memory.
        """
        in_memory = self.get(key)
        if in_memory is not None:
            value: T = in_memory[0]
            return value
        stored = self.disk.read(key) if lasting and self.disk is not None else None
        if stored is not None:
            value = stored[0]
            self.put(key, value, optional=optional, first_out=first_out)
            return value
        start = time.perf_counter()
        value = compute()
        if lasting and self.disk is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(
                    self.device
                )  # at the first use only; else what is timed is how long it takes to ask
            self.disk.offer(key, value, time.perf_counter() - start)
            if trouble := self.disk.take_trouble():
                warnings.warn(trouble, RuntimeWarning, stacklevel=3)
        self.put(key, value, optional=optional, first_out=first_out)
        return value

    def get(self, key: Hashable) -> tuple[Any] | None:
        """Return (the value,) of a key, back on its device, or None if it is not in memory."""
        with self.lock:
            entry = self.entries.get(key)
            if entry is None:
                return None
            entry.used = self.moves
            self.entries.move_to_end(key)
            return (self.bring_back(key, entry) if entry.on_host else entry.value,)

    def put(self, key: Hashable, value: Any, *, optional: bool = False, first_out: bool = False) -> None:
        """Keep a value, if there is room for it."""
        with self.lock:
            self.pop(key)
            storages = {
                place: storage.numel()
                for place, storage in storages_in(value).items()
                if place not in self.not_counted()
            }
            self.make_room(sum(size for place, size in storages.items() if not self.users[place]))
            if (optional or first_out) and self.used_bytes["device"] + sum(
                size for place, size in storages.items() if not self.users[place]
            ) > self.limits.device:
                return
            self.entries[key] = CacheEntry(value, storages, self.moves, first_out)
            self.count(storages, "device", 1)

    def begin(self) -> None:
        """Begin a move: what earlier ones used may be thrown out for it."""
        with self.lock:
            self.moves += 1
            self.make_room(0)

    def pop(self, key: Hashable) -> None:
        """Forget a key."""
        with self.lock:
            entry = self.entries.pop(key, None)
            if entry is not None:
                self.count(entry.storages, "host" if entry.on_host else "device", -1)

    def keep_only(self, *keys: Hashable) -> None:
        """Forget everything but these keys."""
        with self.lock:
            for key in list(self.entries):
                if key not in keys:
                    self.pop(key)

    def __contains__(self, key: Hashable) -> bool:
        """Return whether a key is in memory."""
        return key in self.entries

    def __iter__(self) -> Iterator[Hashable]:
        """Iterate over the keys in memory, least recently used first."""
        return iter(list(self.entries))

    # --- room

    @property
    def limits(self) -> Budget:
        """Return the budget; the default is measured at first need."""
        if self.budget is None:
            self.budget = Budget.of(self.device)
        return self.budget

    def not_counted(self) -> frozenset[tuple[str, int]]:
        """Return the storages that live anyway."""
        if self.ignored is None:
            self.ignored = frozenset(storages_in(self.held()))
        return self.ignored

    def count(self, storages: dict[tuple[str, int], int], tier: str, by: int) -> None:
        """Count the storages of an entry that comes (`by` 1) or goes (-1)."""
        for place, size in storages.items():
            before = self.users[place]
            self.users[place] += by
            if before == 0 or self.users[place] == 0:
                self.used_bytes[tier] += by * size
            if not self.users[place]:
                del self.users[place]

    def make_room(self, wanted: int) -> None:
        """Move or throw out what no longer is in use, until `wanted` bytes fit or nothing is left to go."""
        if self.used_bytes["device"] + wanted <= self.limits.device:
            return
        going = [
            key
            for key, entry in self.entries.items()
            if entry.used != self.moves and entry.storages and not entry.on_host
        ]
        for key in sorted(
            going, key=lambda key: not self.entries[key].first_out
        ):  # stable: least recently used first
            if self.used_bytes["device"] + wanted <= self.limits.device:
                return
            self.send_away(key)

    def send_away(self, key: Hashable) -> None:
        """Move an entry to host memory, or forget it where there is no room (on a CPU there is none) or it is
        no plain data.
        """
        entry = self.entries[key]
        size = sum(entry.storages.values())
        if entry.first_out or size > self.limits.host or not is_plain(entry.value):
            self.pop(key)
            return
        homes: list[torch.device] = []

        def away(storage: Tensor) -> Tensor:
            homes.append(storage.device)
            return to_host(storage)

        for old in [old for old, held_entry in self.entries.items() if held_entry.on_host]:
            if self.used_bytes["host"] + size <= self.limits.host:
                break
            self.pop(old)
        self.count(entry.storages, "device", -1)
        entry.value = relocated(entry.value, away)
        entry.homes = tuple(homes)
        entry.storages = {place: storage.numel() for place, storage in storages_in(entry.value).items()}
        self.count(entry.storages, "host", 1)

    def bring_back(self, key: Hashable, entry: CacheEntry) -> Any:
        """Move an entry from host memory to its devices, and return its value."""
        homes = iter(entry.homes)
        value = relocated(entry.value, lambda storage: storage.to(next(homes), non_blocking=True))
        self.pop(key)
        self.put(key, value, first_out=entry.first_out)
        return value


def to_host(storage: Tensor) -> Tensor:
    """Return a copy of a storage in host memory, page-locked where a GPU reads it, so that the way back does
    not wait.
    """
    if storage.device.type != "cuda":
        return storage.to("cpu", copy=True)
    return torch.empty(storage.shape, dtype=storage.dtype, pin_memory=True).copy_(storage, non_blocking=True)


def cache_of(task: Task, disk: DiskCache | None = None) -> Cache:
    """Return a cache for a task with the default budgets.

    Of a streamed model all that is kept lies in host memory, as the model does.
    """
    return Cache(next(task.model.parameters()).device, disk=disk, held=lambda: task)
