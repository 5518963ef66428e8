"""Counting what a GPU would be asked to do: operations that run a kernel, not those that only look at memory
in another way."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {  # make no kernel run: memory, and other views of it
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "set_",
    "lift_fresh",
    "_local_scalar_dense",
}


class Launches(TorchDispatchMode):
    """Within, `counts` has the operations that would each launch a kernel, by name, and `waits` those that
    a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits = 0

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item"}:
            self.waits += 1
        if not func.is_view and name not in FREE and not name.endswith("_unsafe_view"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
