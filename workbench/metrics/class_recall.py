"""Classes that a compressed classifier never finds any more: what one number for all classes hides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from workbench.metrics.scores import Scores

FEWEST = 3  # items that the dense model had right: of fewer, none may be right by chance
SHOWN = 5  # classes in a sentence


@dataclass(frozen=True)
class LostClass:
    """A class of which the dense model had `found` of `items` right, and the compressed one none."""

    name: str
    items: int
    found: int


def lost_classes(
    names: Sequence[str], labels: Tensor, dense: Scores, compressed: Scores
) -> tuple[LostClass, ...]:
    """Return the classes whose recall has fallen to zero.

    Args:
        names: of the classes; none for kinds without.
        labels: a class for each item, [N].
        dense: the dense model's scores of these items.
        compressed: the compressed model's.
    """
    if not names or labels.ndim != 1:
        return ()
    labels = labels.cpu()
    lost = []
    for number, name in enumerate(names):
        its = labels == number
        found = int(dense.correct[its].sum())
        if found >= FEWEST and not compressed.correct[its].any():
            lost.append(LostClass(name, int(its.sum()), found))
    return tuple(lost)


def lost_words(lost: Sequence[LostClass]) -> str:
    """Return which classes are lost, in words, "" if none is."""
    if not lost:
        return ""
    listed = ", ".join(f"{one.name} (0 of {one.items:,}, dense {one.found:,})" for one in lost[:SHOWN])
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    return f"no longer recognised: {listed}{more}"
