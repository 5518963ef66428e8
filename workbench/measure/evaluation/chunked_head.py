"""The output head of a language model and its cross entropy as one: logits [items, L, vocabulary] never stand
in memory together.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from workbench.compress.distillation.teacher_cache import output_layer
from workbench.measure.evaluation.trials import small_llama
from workbench.modules.input_quantizer import QuantizesInputs
from workbench.modules.substitution import PassesOn, Sees, same_bits, with_stand_ins
from workbench.tasks.base import Items
from workbench.tasks.likelihood import Unprojected
from workbench.util.fast_path import FastPath, Refusals
from workbench.util.library_internals import SHARED, is_watched, lacks
from workbench.util.text import kind_and_words

TOKENS = 32  # of one window, to try on


@dataclass(frozen=True)
class Head:
    """Where the output head of a kind of model stands, and how many logits it makes."""

    name: str
    classes: int

    def off(self, model: nn.Module) -> nn.Module:
        """Return a model without its head, see `Headless`.

        Itself where its head does not treat each row of its inputs alone.
        """
        head = model.get_submodule(self.name)
        return Headless(model, self) if by_rows(head) else model


class Headless(nn.Module):
    """A language model whose logits are made when they are asked for; see `Unprojected`."""

    def __init__(self, model: nn.Module, place: Head) -> None:
        """Take the head off a copy that shares everything else."""
        super().__init__()
        self.place, self.head = place, model.get_submodule(place.name)
        self.body = with_stand_ins(model, {place.name: PassesOn(self.head)})

    def forward(self, **given: Any) -> SimpleNamespace:
        """Return the model's output with nothing but logits."""
        return SimpleNamespace(logits=Unprojected(self.body(**given).logits, self.head, self.place.classes))


def by_rows(head: nn.Module) -> bool:
    """Return whether a head treats each row of its inputs alone: no scale for the whole tensor, and no hook
    that may look at it.
    """
    for module in head.modules():
        if isinstance(module, QuantizesInputs) and module.dynamic and not module.per_token:
            return False
        if is_watched(module):
            return False
    return True


@torch.no_grad()
def find_head(model: nn.Module, items: Items, refusals: Refusals) -> Head | None:
    """Return a model's output head, None if the model's logits are not exactly those that it makes of its
    inputs.

    Scaling or capping after the head is found by trying, on the first tokens of one window.
    """
    head = output_layer(model)
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or name is None:
        return None
    sees = Sees(head)
    try:
        whole = with_stand_ins(model, {name: sees})(
            **{key: tensor[:1, :TOKENS] for key, tensor in items.inputs.items()}, use_cache=False
        ).logits
        again = [head(states) for states in sees.given]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # a model of another make
        refusals.note(CHUNKED_HEAD, kind_and_words(error))
        return None
    if len(again) != 1 or not same_bits(whole, again[0]):
        refusals.note(CHUNKED_HEAD, "the model's logits are not what its output head makes of its inputs")
        return None
    return Head(name, int(whole.shape[-1])) if sees.given[0].shape[-1] < whole.shape[-1] else None


def tried(device: torch.device) -> str:
    """Return why the head of a small Llama is not taken off, "" if it is."""
    refusals = Refusals()
    head = find_head(*small_llama(device), refusals)
    return refusals.reason(CHUNKED_HEAD) or ("" if head else "no output head is found in a Llama")


CHUNKED_HEAD = FastPath(
    "output head by chunks",
    "logits of a large vocabulary: made and reduced piece by piece, never all in memory",
    lambda _device: lacks(SHARED),
    tried,
)
