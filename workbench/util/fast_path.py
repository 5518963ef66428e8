"""Fast paths: kernels, graphs and shortcuts that give what the plain way gives, sooner.

Each has a name. Whether it is on here, or why not, is found by asking it, and nothing is remembered between
askings; `workbench.fast_paths` lists them all. What is switched off while a model is worked on is noted in
`Refusals`, which reach the point that is measured: nothing is slower in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from workbench.util.device import NEEDS_GPU, why_no_triton
from workbench.util.text import kind_and_words


def on_a_gpu(device: torch.device) -> str:
    """Return why a device has no path that needs a GPU, "" if it can have one."""
    return "" if device.type == "cuda" else NEEDS_GPU


def untried(device: torch.device) -> str:  # noqa: ARG001  the form of a trial
    """Return "": a path that is on wherever its libraries and its machine are there."""
    return ""


def with_triton(kernels: str) -> Callable[[torch.device], str]:
    """Return a function that says why a device has no kernels of a module (`workbench.kernels.triton_...`).

    Whether the installed Triton takes the module is seen on any machine; it may raise what it likes.
    """

    def here(device: torch.device) -> str:
        if importlib.util.find_spec("triton") is not None:
            importlib.import_module(kernels)
        return why_no_triton(device)

    return here


@dataclass(frozen=True)
class FastPath:
    """One of them. Both questions are answered by a reason why it is off, "" if there is none.

    `here` looks at the machine and the versions of libraries, and runs nothing; `tried` runs a small case
    both ways and compares them. Either may raise: that is a reason too.
    """

    name: str
    speeds_up: str
    here: Callable[[torch.device], str]
    tried: Callable[[torch.device], str] = untried

    def check(self, device: torch.device) -> str:
        """Return why it is off on a device, "" if it is on."""
        return attempted(lambda: self.here(device) or self.tried(device))


def attempted(trial: Callable[[], str]) -> str:
    """Return the reason that a trial gives, "" if nothing is wrong. An error that it raises is a reason.

    Compilers, drivers and models raise what they like, and the plain way is there: this is the one place that
    takes any error for an answer.
    """
    try:
        return trial()
    except Exception as error:  # noqa: BLE001  see above
        return kind_and_words(error)


@dataclass
class Refusals:
    """Which fast paths were switched off in the middle of work, and why. Mutable; each worker has its own.

    What a path never serves (another kind of model, a machine without a GPU) is no refusal.
    """

    reasons: dict[str, str] = field(default_factory=dict)  # the first one of each path, by name

    def note(self, path: FastPath, reason: str) -> None:
        """Note that a path is off; nothing if there is no reason."""
        if reason:
            self.reasons.setdefault(path.name, reason)

    def reason(self, path: FastPath) -> str:
        """Return why a path is off, "" if nothing was noted of it."""
        return self.reasons.get(path.name, "")

    def words(self) -> tuple[str, ...]:
        """Return a sentence for each path that is off, for a point's warnings."""
        return tuple(
            f"slower than it could be: {name} is off ({reason})" for name, reason in self.reasons.items()
        )
