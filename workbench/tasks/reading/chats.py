"""Conversations as texts: what a model's own chat template makes of lists of who says what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from workbench.errors import DataError
from workbench.util.text import one_line

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def written(rows: Iterable[Any], tokenizer: Any, column: str, data: str, begin: str) -> Iterator[str]:
    """Yield the text of each conversation, as the tokenizer's chat template writes it, without `begin`: what
    the tokenizer itself puts before every text, and a template may write as well.

    Raises:
        DataError: a tokenizer without a template, or a row that is no conversation or that the template
            refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"data {data!r} hold conversations in column {column!r}, and the model's tokenizer has no chat"
            " template to write them by; write them as texts in a column 'text'"
        )
    for number, row in enumerate(rows):
        try:
            text = str(tokenizer.apply_chat_template(turns(row), tokenize=False))
        except Exception as error:  # noqa: BLE001  templates raise what they like; the user sees one line
            raise DataError(
                f"the conversation of item {number} in column {column!r} of data {data!r} cannot be written"
                f" by the model's chat template: {type(error).__name__}: {one_line(error)}"
            ) from None
        yield text.removeprefix(begin)


def turns(row: Any) -> list[dict[str, str]]:
    """Return a conversation as transformers takes it: `role` and `content` of each turn.

    Raises:
        TypeError: what is said is no text.
    """
    if isinstance(row, Mapping):  # kept as lists by field
        row = [dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True)]
    conversation = []
    for turn in row:
        role, said = (turn[name] for name in (("role", "content") if "role" in turn else ("from", "value")))
        if not isinstance(said, str):
            raise TypeError(f"{role} says {type(said).__name__}, and a text is needed")
        conversation.append({"role": ROLES.get(str(role).casefold(), str(role)), "content": said})
    return conversation
