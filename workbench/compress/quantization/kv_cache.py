"""KVCache: keep what attention remembers of earlier tokens in a few bits."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from workbench.compress.core.context import Work
from workbench.compress.registry import METHODS
from workbench.errors import CompressionError, RecipeError
from workbench.formats.kv_cache import CacheFormat
from workbench.recipe import Mark, Step, first_leaving
from workbench.util.about import About
from workbench.util.configuration import configuration

if TYPE_CHECKING:
    from workbench.tasks.base import Task


@configuration
class KVCache(Step):
    """Round keys and values to integers of `kv_bits` as they enter the cache of a language model, one grid a
    token, head and group.

    Every token attends to rounded keys and values, its own included, in perplexity as in `generate`; no
    recent tokens are kept apart in full precision. The cache really holds `kv_bits` a number, with a float16
    scale and a zero point of one byte for `kv_group_size` numbers, and its bytes for one window of the
    evaluation text are measured.

    Layers that attend to all tokens are taken. Those that keep a sliding window or a state of fixed size,
    which does not grow with the text, stay as they are, and the point says how many; a model with nothing
    else is refused.

    What it does not do: make the weights smaller, save time (the cache is unpacked at every step), or rotate
    or group keys by channel as KIVI (Liu et al. 2024) does for 2 bits.
    """

    slider: ClassVar[str] = "kv_bits"
    position: ClassVar[int] = 32
    aside: ClassVar[bool] = True
    stops: ClassVar[tuple[float, ...]] = (4, 8)
    about: ClassVar[tuple[About, ...]] = (
        About(
            "kv_bits, kv_group_size",
            "per token as in FlexGen, Sheng et al. 2023",
            "one item, to see that the cache is used",
            "nothing: weights stay",
            "unpacked before every product; poor below 4 bits",
        ),
    )

    kv_bits: Annotated[
        int, Field(ge=2, le=8, description="bits per number of the cache of keys and values")
    ] = 8
    kv_group_size: Annotated[
        int, Field(ge=0, le=65536, description="numbers of a head that share a scale; 0 means the whole head")
    ] = 0

    @model_validator(mode="after")
    def whole(self) -> KVCache:
        """Refuse targets: there is one cache."""
        if self.targets != ("*",):
            raise ValueError(
                f"targets={self.targets!r} name weights, and a cache belongs to none: leave targets out"
            )
        return self

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse a second one."""
        if first_leaving(earlier, "cache") is not None:
            raise RecipeError(
                f"{self!r} cannot follow another KVCache: a model has one cache; keep one of them"
            )

    @property
    def leaves(self) -> frozenset[Mark]:
        """Return the mark that it leaves: a cache of its own."""
        return frozenset({"cache"})

    @property
    def form(self) -> CacheFormat:
        """Return how numbers are stored."""
        return CacheFormat(self.kv_bits, self.kv_group_size)

    def label(self) -> str:
        """Return such as `KV4` or `KV4 g32`."""
        return f"KV{self.kv_bits}" + (f" g{self.kv_group_size}" if self.kv_group_size else "")


@METHODS.register(
    KVCache,
    title="cache bits",
    shapes=lambda outline, _: outline,  # weights stay as they are
    strength=lambda bits: min(1.0, (2.0 ** (2 - bits)) ** 0.5),
    trains=lambda _: False,
    placed=lambda _: "",
    reads=lambda _: frozenset(),
    alone=False,
)
def kv_cache(step: KVCache, work: Work) -> None:
    """Give the model a cache of rounded keys and values, once it is sure that the model uses it."""
    if not work.task.kind.kv_cache:
        raise CompressionError(
            f"{step!r}: {work.task.model_name} does {work.task.kind.name}; only language models keep keys and"
            " values from token to token"
        )
    work.warnings += check_heads(step, work.task, work.model)
    use_cache_of(work.model, step.form)
    work.changes += 1


def use_cache_of(model: nn.Module, form: CacheFormat) -> None:
    """Make every call of a language model keep its keys and values in this form.

    `model.cache_format` says so to whoever asks.
    """
    model.register_forward_pre_hook(PacksCache(form), with_kwargs=True)
    model.cache_format = form  # type: ignore[assignment]


def cache_format_of(model: nn.Module) -> CacheFormat | None:
    """Return the form in which a model keeps its keys and values, None for its own."""
    kept_in = getattr(model, "cache_format", None)
    return kept_in if isinstance(kept_in, CacheFormat) else None


@dataclass(frozen=True)
class PacksCache:
    """What a language model does before every call: it takes a packed cache where none is given, and turns an
    empty one into one.
    """

    form: CacheFormat

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with a packed cache."""
        given = inspect.signature(model.forward).bind_partial(*args, **named).arguments.get("past_key_values")
        if given is not None:
            pack_layers(given, self.form)
            return args, named
        return args, {**named, "past_key_values": packed_cache(model, self.form)}


def packed_cache(model: nn.Module, form: CacheFormat) -> Any:
    """Return an empty packed cache for a model."""
    from transformers import DynamicCache

    config: Any = model.config
    return pack_layers(DynamicCache(config=config), form)


def pack_layers(cache: Any, form: CacheFormat) -> Any:
    """Make the empty layers of a transformers cache that keep all tokens packed ones, in place, and return
    it.

    Raises:
        CompressionError: a layer that is in use holds something else.
    """
    from transformers.cache_utils import DynamicLayer

    from workbench.modules.kv_cache import packed_layer

    packed = packed_layer()
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is not DynamicLayer:
            continue  # packed already, or one that does not grow with the text
        if layer.get_seq_length():
            raise CompressionError(
                f"a KV cache of {form.bits} bits cannot take over layer {index} of a {type(cache).__name__}:"
                f" its {type(layer).__name__} is in use; give an empty DynamicCache, or none"
            )
        cache.layers[index] = packed(form)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = lambda: packed(form)
    return cache


def check_heads(step: KVCache, task: Task, model: nn.Module) -> list[str]:
    """Run one item and see that keys and values enter a cache, and that the groups divide every head; return
    what is to be said of layers that are left.

    Raises:
        CompressionError: the model keeps none, none that grows with the text, or the group size does not
            divide a head.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    device, config = next(model.parameters()).device, getattr(model, "config", None)
    cache: Any = DynamicCache(config=config)
    try:
        with torch.no_grad():
            model(**task.calibration[:1].to(device).inputs, past_key_values=cache, use_cache=True)
    except (TypeError, AttributeError, ValueError, KeyError, IndexError) as error:
        raise CompressionError(
            f"{step!r}: {type(model).__name__} takes no transformers cache"
            f" ({' '.join(str(error).split())[:200]})"
        ) from None
    used = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.is_initialized]
    left = others_of(cache)
    if not used:
        raise CompressionError(
            f"{step!r}: {type(model).__name__} keeps {left}, nothing that grows with the text and could be"
            " rounded"
            if left
            else f"{step!r}: {type(model).__name__} keeps no keys and values in the cache that it is given"
        )
    kept = [states for layer in used for states in (layer.keys, layer.values) if states is not None]
    for head in sorted({states.shape[-1] for states in kept}):
        if step.kv_group_size and head % step.kv_group_size:
            fits = [size for size in (16, 32, 64, 128) if head % size == 0 and size < head]
            raise CompressionError(
                f"{step!r}: groups of {step.kv_group_size} do not divide a head of {head} numbers: take"
                f" {', '.join([*map(str, fits), '0 for the whole head'])}"
            )
    said = (
        f"the KV cache is rounded in {len(used)} of {len(cache.layers)} layers; the model also keeps {left},"
        " as it is"
    )
    return [said] if left else []


def others_of(cache: Any) -> str:
    """Return the contents of those layers of a transformers cache that do not keep all tokens, in words: `a
    sliding window of 8 tokens in 2 layers`; "" without any.
    """
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionCacheLayerMixin,
    )

    counts: Counter[str] = Counter()
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            counts[f"a sliding window of {layer.sliding_window} tokens"] += 1
        elif isinstance(layer, LinearAttentionCacheLayerMixin):
            counts["a state of fixed size"] += 1
        elif type(layer) is not DynamicLayer and getattr(layer, "keys", None) is not None:
            counts[f"a {type(layer).__name__}"] += 1
    return " and ".join(f"{what} in {count} layer{'s' * (count != 1)}" for what, count in counts.items())
