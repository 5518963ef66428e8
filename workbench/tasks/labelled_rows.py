"""Rows with one label each, for kinds that choose one class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workbench.tasks import columns
from workbench.tasks.items import Items
from workbench.tasks.lazy_items import Pool, Pools, split_pools


def labelled_pools(
    raw: columns.Raw,
    config: Mapping[str, Any],
    find: Callable[[str, Any], tuple[str, str]],
    make: Callable[[list[Any], list[int], Sequence[int], str], Items],
) -> Pools:
    """Return classified things, one item a row, after checking every label.

    Args:
        raw: the rows.
        config: the model's config.json, with its classes.
        find: (name of the data, rows) -> the columns of things and of labels.
        make: (things, labels, their rows, their column) -> items.

    Raises:
        DataError: a missing column, or a label that is none of the classes.
    """
    notes: list[str] = []

    def pool(split: str) -> Pool:
        rows = raw.splits[split]
        item, label = find(raw.name, rows)
        labels, said = columns.label_numbers(rows, label, config, raw.name)
        notes.extend(note for note in said if note not in notes)
        plain = columns.undecoded(rows, item)

        def take(index: Sequence[int]) -> Items:
            return make(list(plain.select(list(index))[item]), [labels[i] for i in index], index, item)

        return Pool(len(rows), take)

    return *split_pools(raw, pool), tuple(notes)


def not_one_class(config: Mapping[str, Any]) -> str:
    """Return why a model's head does not choose one class (several labels an item, or a regression), "" if it
    does.
    """
    problem = config.get("problem_type")
    if problem in (None, "single_label_classification"):
        return ""
    return f"the model's problem_type is {problem!r}, and single_label_classification only is scored"
