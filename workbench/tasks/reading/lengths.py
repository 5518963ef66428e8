"""How many tokens of a text are read, and how many texts are longer than that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.errors import DataError
from workbench.tasks.reading.tally import Tally

ENDLESS = 10**6  # tokens: tokenizers without a limit state an absurdly large one


def text_length(context: int | None, tokenizer: Any, limit: int | None, usual: int) -> int:
    """Return how many tokens of a text are read: `context` if a user gave it, else the usual number where
    model and tokenizer take as many.

    Args:
        context: as the user gave it.
        tokenizer: what makes the tokens.
        limit: the most that the model reads, None where it has none.
        usual: what is read unless a user says otherwise.

    Raises:
        DataError: more tokens than the model reads, or none beside those that every text has.
    """
    if context is None:
        theirs = getattr(tokenizer, "model_max_length", None) or ENDLESS
        return min(usual, limit or usual, theirs if theirs < ENDLESS else usual)
    own = tokenizer.num_special_tokens_to_add() if hasattr(tokenizer, "num_special_tokens_to_add") else 0
    if context <= own or (limit is not None and context > limit):
        most = "" if limit is None else f" and at most the model's {limit}"
        raise DataError(f"context_length={context}: a text needs at least {own + 1} tokens{most}")
    return context


def count_cut(
    tally: Tally, texts: Sequence[Sequence[str]], tokenizer: Any, longest: int, limit: int | None
) -> None:
    """Count the texts (or pairs, of two columns) of which more than `longest` tokens are left out."""
    if not texts[0]:
        return
    more = (
        "the most that the model reads"
        if longest == limit
        else "context_length reads more of them" + (f", up to {limit}" if limit else "")
    )
    for ids in tokenizer(*map(list, texts), verbose=False)["input_ids"]:
        cut = (f"are longer than {longest} tokens and are cut there: {more}",) if len(ids) > longest else ()
        tally.add(*cut)
