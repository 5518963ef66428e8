"""The only reader of hardware facts: pick a device, wait for it, time on it, say what it is."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from workbench.errors import DeviceError, DeviceNameError

NEEDS_GPU = "needs a CUDA GPU"


def pick(wanted: str | None = None) -> torch.device:
    """Return the device asked for, or the first GPU, or the CPU.

    Raises:
        DeviceNameError: the name is unknown.
        DeviceError: the device is not here.

    """
    device = device_named(wanted)
    if device is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise DeviceError(
            f"device {wanted!r} is not here: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA"
            " devices; use 'cpu'"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def device_named(name: str | None) -> torch.device | None:
    """Return the device of a name, whether or not it is here; None for "auto".

    Raises:
        DeviceNameError: the name is unknown.

    """
    if name is None or name == "auto":
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceNameError(f"unknown device {name!r}: use 'cpu', 'cuda' or 'cuda:0'") from None
    if device.type not in {"cpu", "cuda"}:
        raise DeviceNameError(f"device {name!r} is not supported: use 'cpu' or 'cuda'")
    return device


def placed(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor [values] on a device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def why_no_triton(device: torch.device) -> str:
    """Return why our Triton kernels are not used on a device, "" if they can be tried.

    `WORKBENCH_TRITON=off` in the environment turns them off.
    """
    if os.environ.get("WORKBENCH_TRITON") == "off":
        return "WORKBENCH_TRITON is off"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return NEEDS_GPU
    return (
        ""
        if importlib.util.find_spec("triton") is not None
        else "Triton is not installed; torch for CUDA on Linux brings it"
    )


def launching(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which Triton launches kernels on a device: of itself it takes the current GPU,
    wherever the tensors lie.

    A model that is being compiled (`torch.compile`) is given none: its kernels become part of one graph, on
    one GPU.
    """
    return (
        torch.cuda.device(device)
        if device.type == "cuda" and not torch.compiler.is_compiling()
        else nullcontext()
    )


def describe(device: torch.device) -> str:
    """Return the device's name as a reader of a report would want it, such as `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def choices() -> list[tuple[str, str]]:
    """Return the devices that can be picked here as (words, name): `auto` first, then the CPU and every GPU
    that torch sees.
    """
    gpus = [
        (f"cuda:{index} {torch.cuda.get_device_name(index)}", f"cuda:{index}")
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return [(f"auto ({pick('auto')})", "auto"), ("cpu", "cpu"), *gpus]


def cpu_name() -> str:
    """Return the CPU's model name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def free_fraction(device: torch.device) -> float:
    """Return how much of the device's memory is free for this process, from 0 to 1.

    Of a CPU's, 1 (the system swaps).
    """
    if device.type != "cuda":
        return 1.0
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
        device
    )  # held by torch's allocator, and free
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_allocated(device)
    return max(0.0, min(free + cached, allowed)) / total


def free_bytes(device: torch.device) -> int:
    """Return how many bytes of a GPU's memory are free for this process.

    Of a CPU's, how many the host has.
    """
    if device.type != "cuda":
        return host_bytes()
    return int(free_fraction(device) * torch.cuda.mem_get_info(device)[1])


def allowed_bytes(device: torch.device) -> int:
    """Return how many bytes of a GPU's memory this process may take at most.

    Of a CPU's, how many the host has.
    """
    if device.type != "cuda":
        return host_bytes()
    return int(
        torch.cuda.get_per_process_memory_fraction(device)
        * torch.cuda.get_device_properties(device).total_memory
    )


def host_bytes() -> int:
    """Return the bytes of the host's memory, 8 GB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 8 * 2**30


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of the CPU as the system names them, lower case.

    Empty where it does not list them.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next(
        (
            line.split(":", 1)[1]
            for line in lines
            if line.lower().startswith(("flags", "features")) and ":" in line
        ),
        "",
    )
    return frozenset(flags.lower().split())


def processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has, or threads torch uses on a CPU."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else torch.get_num_threads()
    )


class Clock:
    """Times work on one device: wall clock on a CPU, events on a GPU, where work is asynchronous."""

    def __init__(self, device: torch.device) -> None:
        """Remember the device."""
        self.device = device

    def time_ms(self, work: Callable[[], object]) -> float:
        """Return the milliseconds that one call of `work` takes, waiting for the device before and after."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1000
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end))
