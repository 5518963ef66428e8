"""One item through a freshly loaded model: what does not fit its tokenizer, its positions or its processor is
said in one line with the numbers, before anything is measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workbench.errors import MISFITS, ModelError, WorkbenchError
from workbench.modules.offload import device_of
from workbench.modules.vocabulary import token_table
from workbench.tasks.base import Kind
from workbench.tasks.items import Items
from workbench.util.text import kind_and_words

TABLES = r"wpe|(embed_|absolute_)?positions?(_embeddings?|_embed|_ids)?"  # how tables of positions are named
TOKENS = ("input_ids", "decoder_input_ids")


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Within, what a library raises becomes one line that begins with `what`.

    Raises:
        ModelError: in place of an error that is none of the workbench's own.
    """
    try:
        yield
    except WorkbenchError:
        raise
    except MISFITS as error:
        raise ModelError(f"{what}: {kind_and_words(error)}") from None


def try_items(name: str, kind: Kind, model: nn.Module, pools: Sequence[Items]) -> None:
    """Run the first item of the first pool through a model, once the tokens of all pools are known to have
    vectors: a GPU does not come back from one without.

    Raises:
        ModelError: a token or a position without a vector, or a model that cannot read the item.
    """
    for items in pools:
        check_tokens(name, model, items)
        check_positions(name, model, items)
    item = pools[0][:1]
    given = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in item.inputs.items())
    with torch.no_grad(), in_one_line(f"{name} cannot read its data ({given}; {numbers(model)})"):
        outputs = kind.logits(model, item.to(device_of(model)))
        if not isinstance(outputs, Tensor):
            raise TypeError(f"{kind.name} gives {type(outputs).__name__} in place of a tensor")


def check_tokens(name: str, model: nn.Module, items: Items) -> None:
    """Refuse tokens that the embedding has no row for."""
    rows = embedding_rows(model)
    for key in TOKENS if rows else ():
        if key in items.inputs and (most := int(items.inputs[key].max())) >= rows:
            beyond = int((items.inputs[key] >= rows).sum())
            raise ModelError(
                f"{name}: its tokenizer makes tokens up to number {most}, and its embedding has {rows} rows,"
                f" 0 to {rows - 1} ({beyond:,} of {items.inputs[key].numel():,} tokens have none): give the"
                " tokenizer that belongs to the model, or a model whose embedding was enlarged"
            )


def check_positions(name: str, model: nn.Module, items: Items) -> None:
    """Refuse texts with more tokens than a table of positions has rows."""
    tokens = items.inputs[TOKENS[0]].shape[-1] if TOKENS[0] in items.inputs else 0
    for place, module in model.named_modules():
        rows = positions_of(place, module)
        if rows is not None and tokens > rows:
            raise ModelError(
                f"{name}: its data have {tokens} tokens an item, and its table {place!r} has {rows}:"
                f" take a context length of at most {rows}"
            )


def positions_of(place: str, module: nn.Module) -> int | None:
    """Return how many positions a module is a table of, None where it is none.

    Some begin behind the number of a padding token.
    """
    last = place.rpartition(".")[2]
    if not isinstance(module, nn.Embedding) or not re.fullmatch(TABLES, last):
        return None
    before = getattr(module, "offset", 0)
    if not before and module.padding_idx is not None:
        before = module.padding_idx + 1
    return int(module.num_embeddings) - int(before)


def embedding_rows(model: nn.Module) -> int:
    """Return how many tokens a model has vectors for, 0 where it takes none."""
    table = token_table(model)
    return 0 if table is None else int(table.num_embeddings)


def numbers(model: nn.Module) -> str:
    """Return the numbers of a model's configuration that its inputs have to fit, as `name value`."""
    config = getattr(model, "config", None)
    names = (
        "vocab_size",
        "max_position_embeddings",
        "image_size",
        "num_channels",
        "num_mel_bins",
        "hidden_size",
    )
    facts = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name, None) is not None]
    return "config.json says " + (", ".join(facts) or "nothing of sizes")
