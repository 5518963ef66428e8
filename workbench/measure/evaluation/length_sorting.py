"""Texts padded to one length, read in the order of their own: a batch is as long as its longest text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.measure.evaluation.trials import small_bert
from workbench.metrics.scores import Scores
from workbench.tasks.base import Items, Kind
from workbench.tasks.text_classification import TEXT_CLASSIFICATION
from workbench.util.fast_path import FastPath, Refusals

MULTIPLE = 8  # tokens; a batch's length is a multiple, so that few shapes occur
TRIED = 4  # items


def text_spans(items: Items) -> Tensor | None:
    """Return where the text of each item begins and ends, int64 [N, 2] on the CPU.

    None without a mask, or where nothing is padded.
    """
    mask = items.inputs.get("attention_mask")
    if mask is None or mask.ndim < 2:
        return None
    kept = (
        mask.flatten(1, -2).amax(1) if mask.ndim > 2 else mask
    )  # [N, L]: a pair is as long as the longer text
    kept = kept.bool().cpu()
    length = kept.shape[1]
    first = kept.int().argmax(1)
    last = length - kept.flip(1).int().argmax(1)
    empty = ~kept.any(1)
    spans = torch.stack([first.masked_fill(empty, 0), last.masked_fill(empty, length)], 1)
    return None if bool((spans[:, 0] == 0).all() and (spans[:, 1] == length).all()) else spans


def ordered(spans: Tensor, start: int, stop: int) -> Tensor:
    """Return the items from `start` to `stop`, longest first (what does not fit into memory fails at once).

    Equal ones stay in order.
    """
    some = spans[start:stop]
    return start + torch.argsort(some[:, 1] - some[:, 0], descending=True, stable=True)


def trimmed(items: Items, spans: Tensor) -> Items:
    """Return items without the columns that all of them pad, `spans` int64 [N, 2] theirs."""
    length = items.inputs["attention_mask"].shape[-1]
    first = int(spans[:, 0].min()) // MULTIPLE * MULTIPLE
    last = min(length, -(-int(spans[:, 1].max()) // MULTIPLE) * MULTIPLE)
    cut = {
        name: tensor[..., first:last] if tensor.shape[-1] == length and tensor.ndim >= 2 else tensor
        for name, tensor in items.inputs.items()
    }
    return Items(cut, items.labels)


@torch.no_grad()
def trims(kind: Kind, model: nn.Module, items: Items, spans: Tensor, refusals: Refusals) -> bool:
    """Return whether a model gives the same answers to rounding without the padding, tried on the shortest of
    some items (on its device).
    """
    if not kind.masked_texts:
        return False
    short = torch.argsort(spans[:, 1] - spans[:, 0], stable=True)[:TRIED]
    some = items[short.to(items.labels.device)]
    whole, cut = kind.logits(model, some).float(), kind.logits(model, trimmed(some, spans[short])).float()
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    alike = whole.shape == cut.shape and bool((whole - cut).abs().max() <= tolerance * whole.abs().max())
    refusals.note(BY_LENGTH, "" if alike else "the model answers otherwise without the padding")
    return alike


def in_place(scores: Scores, order: Tensor) -> Scores:
    """Return scores of items that were read in some order (int64 [N], a permutation) in the items' own."""
    back = torch.argsort(order)
    return Scores(
        scores.loss[back],
        scores.correct[back],
        scores.weight[back],
        scores.answers[back],
        {name: values[back] for name, values in scores.details.items()},
    )


def tried(device: torch.device) -> str:
    """Return why padded texts of a small BERT are not cut, "" if they are."""
    refusals, (model, items) = Refusals(), small_bert(device)
    spans = text_spans(items)
    if spans is None:
        return "padding is not found in a mask"
    trims(TEXT_CLASSIFICATION, model, items, spans, refusals)
    return refusals.reason(BY_LENGTH)


BY_LENGTH = FastPath(
    "texts by length", "padded texts: a batch is as long as its longest", lambda _device: "", tried
)
