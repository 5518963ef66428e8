"""Frozen dataclasses whose options are checked by pydantic, and say in one line what is wrong with them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import CoreSchema, core_schema

from workbench.errors import RecipeError
from workbench.util.registry import Registry

T = TypeVar("T")


def explain(owner: str, error: ValidationError) -> str:
    """Return a ValidationError as one line that repeats what the user gave and says what would work."""
    faults = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            faults.append(f"{owner} has no option {name!r}")
        elif not name:
            faults.append(f"{owner} is refused: {message}")
        else:
            faults.append(f"{owner}({name}={item['input']!r}) is refused: {message[0].lower()}{message[1:]}")
    return "; ".join(faults)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configuration(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose fields are validated.

    Bad values raise `RecipeError`.
    """
    built: Any = pydantic_dataclass(frozen=True, kw_only=True, repr=False, config=ConfigDict(extra="forbid"))(
        cls
    )
    construct = built.__init__

    def initialise(self: Any, *args: Any, **fields: Any) -> None:
        if args:
            raise RecipeError(
                f"{cls.__name__} takes its options by name, such as {cls.__name__}(seed=0); got {args!r}"
            )
        try:
            construct(self, **fields)
        except ValidationError as error:
            raise RecipeError(explain(cls.__name__, error)) from None

    built.__init__ = initialise
    return cast("type[T]", built)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The choices of an option: the names in a registry, also those that a plugin registers later."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Tell pydantic how the value is checked."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: str) -> str:
        """Return a value that is one of the names; ValueError with all of them otherwise."""
        if value not in self.registry:
            *first, last = map(repr, self.registry.names())
            raise ValueError(f"input should be {', '.join(first)} or {last}")
        return value
