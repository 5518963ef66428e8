"""What recipes do to the weights whose rows are tokens, which `*` does not name: steps that come last.

Training sees these weights as they are, and every step that names them comes first.
"""

from __future__ import annotations

from collections.abc import Iterable

from workbench.modules.vocabulary import Vocabulary
from workbench.recipe import Step


def besides(steps: Iterable[Step], vocabulary: Vocabulary) -> list[Step]:
    """Return the steps that follow a recipe for layers of the vocabulary that none of its own of that kind
    takes or leaves out by name.
    """
    given, free = list(steps), dict(vocabulary)
    added = []
    for step in given:
        same = [other for other in given if other.claim == step.claim]
        names = tuple(
            name
            for name, known_by in free.items()
            if step.everything
            and step.excluded(*known_by) is None
            and not any(other.takes(*known_by, head=True) for other in same)
        )
        further = step.besides(names) if names else None
        if further is not None:
            added.append(further)
            free = {name: known_by for name, known_by in free.items() if name not in names}
    return added
