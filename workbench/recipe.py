"""What to do to a model: frozen steps in an order, and their JSON.

A method is one frozen dataclass (a `Step`) and one function registered for it in
`workbench.compress.registry`, which also reads recipes from JSON and from flat options.
Ranges, choices and help texts stand on the dataclass fields as pydantic annotations: the command line, the
notebook parameters and the documentation read them from there, so none of them can drift.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import Field, field_validator

from workbench.errors import RecipeError
from workbench.util.about import About
from workbench.util.configuration import OneOf, configuration

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Targets = tuple[str, ...]
# What a step leaves in layers: zeros by a mask; fewer units; codes of a grid with scales; 16-bit numbers; two
# or three factors; a term beside the weight; inputs that are rounded; weights that have learned; a cache
Mark = Literal["zeros", "fewer", "grid", "cast", "factors", "term", "inputs", "learned", "cache"]


@lru_cache(maxsize=2**16)  # every layer of a model is asked for several times a move
def picks(target: str, name: str) -> bool:
    """Return whether a target without `!` names a layer."""
    return re.search(target[3:], name) is not None if target.startswith("re:") else fnmatchcase(name, target)


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?")


@configuration
class Step:
    """Base of every method's configuration. Running a step adds no state to it.

    `slider` names the field that a user drags; giving it a value is what turns the step on. `position` orders
    steps that are built from flat options (small first). `stops` are the values of the slider that a report
    sweeps.

    `targets` say which layers: a layer is taken if a target picks it and no target that begins with `!` does.
    With nothing but `!` targets, `*` is meant as well. The output head is taken only if a target other than
    `*` picks it.
    """

    slider: ClassVar[str] = ""
    position: ClassVar[int] = 100
    stops: ClassVar[tuple[float, ...]] = ()
    # Of the slider, where it is shorter than the range of its field
    ends: ClassVar[tuple[float, float] | None] = None
    about: ClassVar[tuple[About, ...]] = ()  # lines of the table of methods
    # Panels keep it folded away until it is used: a complement of the methods that a user starts with
    aside: ClassVar[bool] = False
    # Options of later versions: at their defaults they do not change a recipe's key, so ledgers stay known
    added: ClassVar[tuple[str, ...]] = ()
    # What options of later versions were before they existed, where that is not their default
    before: ClassVar[dict[str, Any]] = {}

    targets: Annotated[
        Targets,
        Field(
            description=(
                "layer names to work on: globs, or regular expressions after 're:'; '!' before one leaves out"
                " what it picks"
            ),
            min_length=1,
        ),
    ] = ("*",)
    seed: Annotated[int, Field(description="seed of every random choice", ge=0)] = 0

    @field_validator("targets")
    @classmethod
    def are_expressions(cls, targets: Targets) -> Targets:
        """Refuse a target after 're:' that is no regular expression, and a '!' that leaves out nothing."""
        for target in targets:
            name = target.removeprefix("!")
            if target == "!":
                raise ValueError("'!' names no layer to leave out: write such as '!classifier' or '!re:fc1$'")
            if name.startswith("re:"):
                try:
                    re.compile(name[3:])
                except re.error as error:
                    raise ValueError(f"{target!r} is no regular expression: {error}") from None
        return targets

    @classmethod
    def kind(cls) -> str:
        """Return the name that JSON and messages use: the class name in lower case."""
        return cls.__name__.lower()

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """Return the method's own fields with their annotations: what sliders, command line and notebooks
        offer.
        """
        fields: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
        return {name: info for name, info in fields.items() if name not in {"targets", "seed"}}

    @classmethod
    def choices(cls, option: str) -> tuple[Any, ...]:
        """Return the values that an option can have, () where they are no list."""
        info = cls.options()[option]
        if get_origin(info.annotation) is Literal:
            return get_args(info.annotation)
        listed = [name for note in info.metadata if isinstance(note, OneOf) for name in note.registry.names()]
        return tuple(listed) or ((True, False) if info.annotation is bool else ())

    def unchanged(self) -> set[str]:
        """Return the options of later versions that do what was done before: that are at their defaults."""
        return {
            field.name
            for field in dataclasses.fields(self)
            if field.name in self.added
            and getattr(self, field.name) == self.before.get(field.name, field.default)
        }

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Raise `RecipeError`, with the reason, if this step cannot follow the `earlier` ones."""

    def besides(self, names: Targets) -> Step | None:  # noqa: ARG002  for steps that do
        """Return the step that it ends with on weights of the vocabulary, by `names`, which its targets leave
        to it: they begin with all layers, and do not pick these. None: they stay as they are.
        """
        return None

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the marks that it leaves in the layers that it took; what may follow depends on them."""
        return frozenset()

    @property
    def zeros(self) -> str | None:
        """Return the pattern of the zeros that it leaves, such as `2:4`; None without any."""
        return None

    @property
    def order(self) -> int:
        """Return the place among steps that are built from flat options: `position`, unless the step's
        choices say otherwise.
        """
        return self.position

    @property
    def claim(self) -> str:
        """Return the claim that it makes on its layers: two steps of one claim may not share a layer."""
        return self.kind()

    @property
    def everything(self) -> bool:
        """Return whether the targets begin with all layers: `*`, or nothing but exclusions."""
        return "*" in self.targets or all(target.startswith("!") for target in self.targets)

    def takes(self, *names: str, head: bool = False) -> bool:
        """Return whether the targets pick a layer that is known by one or more `names`.

        `*` alone does not pick the output head.
        """
        wanted = [target for target in self.targets if not target.startswith("!")] + ["*"] * self.everything
        return (
            any(picks(target, name) for target in wanted for name in names if not (head and target == "*"))
            and self.excluded(*names) is None
        )

    def excluded(self, *names: str) -> str | None:
        """Return the target that leaves out a layer known by `names`, or None."""
        return next(
            (
                target
                for target in self.targets
                if target.startswith("!") and any(picks(target[1:], name) for name in names)
            ),
            None,
        )

    def matches(self, name: str) -> bool:
        """Return whether a layer's dotted name is among the targets, the output head like any other."""
        return self.takes(name)

    def __repr__(self) -> str:
        """Show only what differs from the defaults, and always the slider: a line that can be pasted."""
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name == self.slider or getattr(self, f.name) != f.default
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def label(self) -> str:
        """Return a few words for a legend, such as `W4 g64` or `2:4`."""
        return f"{self.slider} {getattr(self, self.slider)}"


def ending(name: str) -> str:
    """Return the last parts of a dotted name that fit a legend: `vit.layers.0.mlp.fc1` is `...0.mlp.fc1`."""
    kept = name
    while len(kept) > 18 and "." in kept:
        kept = kept.partition(".")[2]
    return kept if kept == name else f"\N{HORIZONTAL ELLIPSIS}{kept}"


def scope(targets: Targets) -> str:
    """Return which layers, in a few words: nothing for all, ` not fc1`, ` on 3 targets`."""
    out = [target[1:] for target in targets if target.startswith("!")]
    on = [target for target in targets if not target.startswith("!") and target != "*"]
    texts = [
        f" {word} {ending(listed[0]) if len(listed) == 1 else f'{len(listed)} targets'}"
        for word, listed in (("on", on), ("not", out))
        if listed
    ]
    return "".join(texts)


class Recipe:
    """An immutable sequence of steps, checked when it is built: each step's values, and that the order can
    work.
    """

    __slots__ = ("steps",)
    steps: tuple[Step, ...]

    def __init__(self, *steps: Step) -> None:
        """Build from steps in the order in which they are applied; no steps means the dense model.

        A target such as `classifier=8` gives that layer its own value of the slider, in a step of its own.

        Raises:
            RecipeError: an argument is not a step, or an order that cannot work, with the reason.

        """
        for step in steps:
            if not isinstance(step, Step):
                raise RecipeError(f"a Recipe takes steps such as Prune(sparsity=0.5); got {step!r}")
        single = tuple(one for step in steps for one in apart(step))
        for index, step in enumerate(single):
            step.check_order(single[:index])
        object.__setattr__(self, "steps", single)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: a recipe does not change."""
        raise AttributeError(f"a Recipe is immutable; build a new one instead of setting {name}={value!r}")

    def __reduce__(self) -> tuple[type[Recipe], tuple[Step, ...]]:
        """Copy and pickle by building anew."""
        return Recipe, self.steps

    def __iter__(self) -> Iterator[Step]:
        """Iterate over the steps in order."""
        return iter(self.steps)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        """Compare by steps."""
        return isinstance(other, Recipe) and self.steps == other.steps

    def __hash__(self) -> int:
        """Hash by steps (within one process; `key` is the stable one)."""
        return hash(self.steps)

    def __repr__(self) -> str:
        """Return one line of Python that makes this recipe."""
        return f"Recipe({', '.join(map(repr, self.steps))})"

    def label(self) -> str:
        """Return a few words for a legend, such as `50% + W4`, with the layers where those are not all."""
        return " + ".join(step.label() + scope(step.targets) for step in self.steps) or "dense"

    @property
    def zeros(self) -> str | None:
        """Return the pattern of the zeros that its first step with any leaves, None without."""
        return next((step.zeros for step in self.steps if step.zeros is not None), None)

    def get(self, kind: str) -> Step | None:
        """Return the first step of this kind, or None."""
        return next((step for step in self.steps if step.kind() == kind), None)

    def main(self, kind: str) -> Step | None:
        """Return the step of this kind that works on all layers but some, else the first one, or None."""
        return next((step for step in self.steps if step.kind() == kind and step.everything), self.get(kind))

    def to_json(self) -> str:
        """Return JSON with sorted keys, every field written out, that `METHODS.from_json` reads."""
        return json.dumps(
            [{"step": step.kind(), **dataclasses.asdict(step)} for step in self.steps], sort_keys=True
        )

    @property
    def key(self) -> str:
        """Return a hash that is the same in every process and version of Python: 16 hexadecimal digits.

        It is of the JSON, without the options that later versions added (`Step.added`) where they are at
        their defaults.
        """
        told = [
            {
                "step": step.kind(),
                **{
                    name: value
                    for name, value in dataclasses.asdict(step).items()
                    if name not in step.unchanged()
                },
            }
            for step in self.steps
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def own_values(targets: Iterable[str]) -> tuple[Targets, dict[str, str]]:
    """Return the targets of the main step, and the slider's own value of each target written as
    `name=value`.
    """
    main: list[str] = []
    own: dict[str, str] = {}
    for given in targets:
        target = given
        name, _, value = given.rpartition("=")
        if name and NUMBER.fullmatch(value):
            own[name], target = value, f"!{name}"
        main.append(target)
    return tuple(main), own


def apart(step: Step) -> tuple[Step, ...]:
    """Return a step, and one for each target that has its own value of the slider."""
    main, own = own_values(step.targets)
    if not own:
        return (step,)
    others = list[Step]()
    for target, value in own.items():
        changes: dict[str, Any] = {step.slider: value, "targets": (target,)}
        others.append(dataclasses.replace(step, **changes))
    return (dataclasses.replace(step, targets=main), *others)


def first_leaving(earlier: Iterable[Step], *marks: Mark) -> Step | None:
    """Return the first of some steps that leaves one of these marks, or None."""
    return next((step for step in earlier if step.leaves & set(marks)), None)
