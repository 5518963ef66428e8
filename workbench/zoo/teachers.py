"""A model taken from the zoo to teach another: only its weights, after checks that both answer the same
questions alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.errors import ModelError
from workbench.hub import hub
from workbench.tasks import columns
from workbench.tasks.registry import KINDS
from workbench.zoo import _locate, local

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workbench.tasks.base import Task


def load_teacher(name: str, task: Task, device: torch.device) -> nn.Module:
    """Return the model `name` (a short name of `models()`, a local folder, or a hub id) in eval mode, frozen,
    to teach that of `task`.

    It is given the task's items as they are: that both read pixels, sounds or tokens prepared alike is
    checked for tokens only.

    Raises:
        ModelError: unknown, missing or damaged, of another kind of task, with other class names, or with
            another vocabulary.
    """
    located = _locate(name, "", offline=hub.forced_offline(), progress=False)
    config = local.read_config(located.directory)
    kind = KINDS.of(config)
    if kind.name != task.kind.name:
        raise ModelError(
            f"teacher {name!r} does {kind.name}, {task.model_name!r} does {task.kind.name}: give a teacher"
            " for the same task"
        )
    check_labels(name, task, config)
    mine = vocabulary(task.processor)
    if mine:
        check_vocabulary(name, task, vocabulary(kind.processor(located.directory, config)), mine)
    return local.load_model(located.directory, kind, device=device).eval().requires_grad_(False)


def vocabulary(processor: Any) -> dict[str, int]:
    """Return the tokens of a tokenizer, or of a speech model's, with their numbers.

    None of an image processor.
    """
    get = getattr(getattr(processor, "tokenizer", processor), "get_vocab", None)
    return dict(get()) if callable(get) else {}


def check_vocabulary(name: str, task: Task, theirs: dict[str, int], mine: dict[str, int]) -> None:
    """Refuse a teacher with other tokens.

    Those that both have are not matched: two tokenizers cut a text at different places, so answers do not
    stand side by side.
    """
    if theirs != mine:
        odd = next((word for word in mine if theirs.get(word) != mine[word]), None) or next(
            word for word in theirs if word not in mine
        )
        shared = len(mine.keys() & theirs.keys())
        raise ModelError(
            f"teacher {name!r} has another vocabulary ({len(theirs)} entries) than {task.model_name!r}"
            f" ({len(mine)}): {odd!r} differs, {shared} are in both; a teacher cuts text into tokens as its"
            f" student does: give one with the same tokenizer, or compress {name!r} itself with"
            " teachers='dense'"
        )


def check_labels(name: str, task: Task, config: dict[str, Any]) -> None:
    """Refuse a teacher whose classes have other names, or another order.

    Names that transformers made up (LABEL_0) say nothing.
    """
    theirs = columns.classes(config) if config.get("id2label") else ()
    if not task.labels or not theirs or theirs[0] == "LABEL_0":
        return
    if theirs != task.labels:
        place = next(
            (
                i
                for i, (their_label, our_label) in enumerate(zip(theirs, task.labels, strict=False))
                if their_label != our_label
            ),
            min(len(theirs), len(task.labels)),
        )
        their_label, our_label = (
            names[place] if place < len(names) else "nothing" for names in (theirs, task.labels)
        )
        raise ModelError(
            f"teacher {name!r} has other labels than {task.model_name!r}: {len(theirs)} against"
            f" {len(task.labels)}, and label {place} is {their_label!r} against {our_label!r}; give one with"
            " the same classes in the same order"
        )
