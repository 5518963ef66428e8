"""The kinds of task that exist: registered by name, found by what a model's config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import get_annotations
from typing import Any, TypeVar, get_args

from workbench.errors import ModelError
from workbench.metrics.metrics import METRICS
from workbench.tasks.base import Kind, View
from workbench.tasks.likelihood import Choosing
from workbench.util.registry import Registry
from workbench.util.text import nearest

K = TypeVar("K", bound=Kind)


class Kinds(Registry[Kind]):
    """The kinds of task that exist, by name; `workbench.tasks` registers the built-in ones."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__("kind of task", check, ModelError)

    def register(self, record: K) -> K:
        """Add a kind and return it.

        Raises:
            ModelError: its name is taken, a fact is not stated, or two of its facts contradict each other.
        """
        if left_out := unstated(record):
            raise ModelError(
                f"kind of task {getattr(record, 'name', type(record).__name__)!r} cannot be registered: it"
                f" does not state {', '.join(left_out)} (None where there is none)"
            )
        super().register(record)
        return record

    def of(self, config: Any) -> Kind:
        """Return the kind of task that a model is for, read from its transformers config (or the mapping in
        config.json).

        Raises:
            ModelError: another task than those that are registered, several that it could be, or a config
                that does not say which.
        """
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        architectures = values.get("architectures") or []
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise ModelError(
                f"config.json has architectures={architectures!r}; a list of names of classes is needed, such"
                ' as ["LlamaForCausalLM"]'
            )
        refusals: list[str] = []
        for name in architectures:
            if (kind := self.of_architecture(name, values, refusals)) is not None:
                return kind
        supported = ", ".join(self.names())
        if architectures:
            raise ModelError(
                f"a model of architecture {', '.join(architectures)} is for a task that the workbench does"
                f" not run; it runs {'; '.join([supported, *refusals])}"
            )
        model_type = values.get("model_type", "?")
        kinds = [kind for kind in self if has_class(kind, model_type)]
        if len(kinds) == 1:
            return kinds[0]
        candidates = ", ".join(kind.name for kind in kinds) or "none of them"
        raise ModelError(
            f"config.json names no architecture, and model type {model_type!r} can do {candidates}; "
            f"add 'architectures' to config.json (the workbench runs {supported})"
        )

    def of_architecture(self, name: str, config: Mapping[str, Any], refusals: list[str]) -> Kind | None:
        """Return the kind of a class of this name, the longest ending first; None if none takes it, with
        those that refuse it in `refusals`.
        """
        ends = {kind: max(map(len, ending(kind, name))) for kind in self if ending(kind, name)}
        for length in sorted(set(ends.values()), reverse=True):
            reasons = {kind: kind.why_not(config) for kind, its in ends.items() if its == length}
            taking = [kind for kind, reason in reasons.items() if not reason]
            if len(taking) > 1:
                names = " or ".join(kind.name for kind in taking)
                raise ModelError(
                    f"a model of architecture {name} could be for {names}: each has to say which models it"
                    " takes (Kind.why_not)"
                )
            if taking:
                return taking[0]
            refusals += [f"{kind.name}: {reason}" for kind, reason in reasons.items()]
        return None


def ending(kind: Kind, name: str) -> list[str]:
    """Return the endings of a kind's classes that the name of a class has."""
    return [end for end in kind.architectures if name.endswith(end)]


def has_class(kind: Kind, model_type: str) -> bool:
    """Return whether transformers has a class of this kind for a model type."""
    from transformers.models.auto import modeling_auto

    return kind.type_mapping is not None and model_type in getattr(modeling_auto, kind.type_mapping)


def unstated(kind: Kind) -> list[str]:
    """Return the facts and functions that a kind leaves out."""
    facts = [name for name in get_annotations(Kind) if not hasattr(kind, name)]
    functions = [
        name for name in vars(Kind) if getattr(getattr(type(kind), name, None), "__isabstractmethod__", False)
    ]
    return facts + functions


def contradiction(kind: Kind) -> str:
    """Return the contradiction in a kind's facts, "" if there is none."""
    kind_class = type(kind)
    if kind.primary not in METRICS:
        return f"its metric {kind.primary!r} is not registered; {nearest(kind.primary, METRICS.names())}"
    if kind.behaviour is not None and kind.behaviour not in get_args(View):
        return f"behaviour={kind.behaviour!r} is none of {', '.join(get_args(View))}, or None"
    if kind.behaviour == "told apart" and kind_class.examples is Kind.examples:
        return "behaviour='told apart' needs examples(model, items), its answers in words"
    if kind.distribution is not None and getattr(kind_class, "score", None) is not Choosing.score:
        return (
            f"distribution={kind.distribution!r} says that answers are scored by likelihood, and it has a"
            " score of its own: state distribution=None"
        )
    if not kind.architectures:
        return "architectures is empty: no model would be of this kind"
    return ""


def check(kind: Kind) -> None:
    """Raise `ModelError` where two of a kind's facts contradict each other."""
    if problem := contradiction(kind):
        raise ModelError(f"kind of task {kind.name!r} cannot be registered: {problem}")


KINDS = Kinds()
