"""Records by name: what users can choose from, with one place that lists it and refuses what is not there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from workbench.errors import RecipeError, WorkbenchError
from workbench.util.text import nearest


class Named(Protocol):
    """What a registry holds: a record with a name."""

    @property
    def name(self) -> str:
        """Return the name that users write."""


R = TypeVar("R", bound=Named)


class Registry(Generic[R]):
    """The records of one sort, in the order in which they were registered.

    Lists that users see are made from it, so that none can drift. A record whose facts do not fit together is
    refused when it is registered, not when it is used.
    """

    def __init__(
        self,
        what: str,
        check: Callable[[R], None] | None = None,
        error: type[WorkbenchError] = RecipeError,
    ) -> None:
        """Start empty.

        Args:
            what: the word of messages.
            check: raises `error` for a record that is wrong.
            error: what is raised for names.

        """
        self.what, self.check, self.error = what, check, error
        self.records: dict[str, R] = {}
        self.modules: dict[str, str] = {}  # the name of the module that registered each

    def register(self, record: R) -> R:
        """Add a record and return it.

        Raises:
            WorkbenchError: the name is taken, or the facts do not fit together; of the kind in `error`.

        """
        if record.name in self.records:
            raise self.error(f"{self.what} {record.name!r} cannot be registered: the name is taken")
        if self.check is not None:
            self.check(record)
        self.records[record.name], self.modules[record.name] = record, registering_module()
        return record

    def unregister(self, name: str) -> None:
        """Forget a record (for tests and for reloading a plugin)."""
        self.records.pop(name, None)
        self.modules.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(self.records)

    def __getitem__(self, name: str) -> R:
        """Return a record, or raise `error` with the nearest names."""
        if name not in self.records:
            raise self.error(f"unknown {self.what} {name!r}; {nearest(name, self.records)}")
        return self.records[name]

    def __contains__(self, name: object) -> bool:
        """Return whether a name is known."""
        return name in self.records

    def __iter__(self) -> Iterator[R]:
        """Iterate over the records."""
        return iter(self.records.values())

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.records)


def registering_module() -> str:
    """Return the name of the module that registers something now: the first one that is no registry."""
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module != __name__ and not (
            frame.f_code.co_name == "register" and module.startswith("workbench.")
        ):
            return module
        frame = frame.f_back
    return ""


def import_members(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, in the order of their names: each registers what it holds."""
    for module in sorted(module.name for module in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{module}")
