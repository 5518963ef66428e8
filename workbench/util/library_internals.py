"""Every name of torch, transformers, optuna and plotly that we use and its library does not promise, and
whether the installed versions have it.

Nothing else reads a private name of theirs, but `widgets.plot.plotly_internals` those of plotly's widgets. A
name is used where the public way takes many times as long, or where there is none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

TABLES = ("_parameters", "_buffers", "_modules")  # a module's own, by name
COMPILED_CALL = "_compiled_call_impl"  # what `torch.compile` puts into a module; a copy must not have it
IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")  # of configurations of transformers
MASKS = ("find_packed_sequence_indices", "is_tracing")  # functions of `transformers.masking_utils`


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own children by name, to be read and replaced."""
    return module._modules  # noqa: SLF001


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name, to be read and replaced.

    Torch's own way takes ten times as long, and this is asked for thousands of times a move.
    """
    return module._parameters  # noqa: SLF001


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, to be read and replaced."""
    return module._buffers  # noqa: SLF001


def is_watched(module: nn.Module) -> bool:
    """Return whether a module has hooks that see what it is given or returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def changes_in_place(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return tensor._version  # noqa: SLF001


def byte_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of int8 [rows, inputs] and int8 [inputs, outputs], int32 [rows, outputs]."""
    return torch._int_mm(left, right)  # noqa: SLF001


def copy_each(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value into its target, of the same shape, in as few kernels as there can be."""
    torch._foreach_copy_(targets, values)


def largest_of_each(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the largest magnitude in each tensor, scalars, in as few kernels as there can be."""
    return tuple(torch._foreach_norm(tensors, ord=torch.inf))  # noqa: SLF001


def compilations(most: int) -> AbstractContextManager[object]:
    """Return a context in which `torch.compile` makes up to `most` variants of one function."""
    context: AbstractContextManager[object] = torch._dynamo.config.patch(recompile_limit=most)  # noqa: SLF001
    return context


def attention_of(config: Any) -> str | None:
    """Return how a transformers model with this configuration computes attention, None if it does not say."""
    return getattr(config, "_attn_implementation", None)


def kernels_of(config: Any) -> Iterator[str]:
    """Yield what a configuration, and those in it, make transformers compute attention and experts with."""
    for settings in configurations(config):
        for name in IMPLEMENTATIONS:
            if (value := getattr(settings, name, None)) is not None:
                yield str(value)


def forget_kernels(config: Any) -> None:
    """Let transformers choose by itself what computes attention and experts."""
    for settings in configurations(config):
        for name in IMPLEMENTATIONS:
            setattr(settings, name, None)


def configurations(config: Any) -> Iterator[Any]:
    """Yield a configuration of transformers and all those in it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        for held in value if isinstance(value, list | tuple) else [value]:
            if isinstance(held, PreTrainedConfig):
                yield from configurations(held)


def frames_of(model: Any, samples: Tensor) -> Tensor:
    """Return how many frames a CTC model of transformers makes of so many samples, both int64 [N]."""
    # All that knows the strides
    frames: Tensor = model._get_feat_extract_output_lengths(samples)  # noqa: SLF001
    return frames


@dataclass(frozen=True)
class Internal:
    """A private name: in what it is looked for, and what it serves. `owner` imports its library."""

    library: str
    owner: Callable[[], object]
    name: str
    serves: str

    def absent(self) -> bool:
        """Return whether the installed version has no such name."""
        try:
            owner = self.owner()
        except (ImportError, AttributeError):  # what it stood in is gone
            return True
        return not hasattr(owner, self.name)


def inside(module: str, attribute: str = "", *, made: bool = False) -> Callable[[], object]:
    """Return a function that imports a module when it is called, and returns it or one of its attributes.

    `made`: a class of which one is made, since what is looked for exists in instances only.
    """

    def owner() -> object:
        target: Any = importlib.import_module(module)
        target = getattr(target, attribute) if attribute else target
        return target() if made else target

    return owner


def torch_internals(*names: str, owner: Callable[[], object], serves: str) -> tuple[Internal, ...]:
    """Return names of torch that serve one purpose."""
    return tuple(Internal("torch", owner, name, serves) for name in names)


SHARING = "copies of a model that share its tensors"
EACH = "many tensors in a few kernels"
PLOT = "the live plot: what changes is sent alone, and a reloaded page shows it"
SHARED = torch_internals(
    *TABLES,
    "_forward_hooks",
    "_forward_pre_hooks",
    COMPILED_CALL,
    owner=inside("torch.nn", "Identity", made=True),
    serves=SHARING,
)
FOREACH = torch_internals("_foreach_copy_", "_foreach_norm", owner=inside("torch"), serves=EACH)
BYTES = torch_internals("_int_mm", owner=inside("torch"), serves="products of 8-bit integers")
VERSION = torch_internals(
    "_version",
    owner=inside("torch", "Tensor"),
    serves="one product for all layers that read the same inputs",
)
RECOMPILED = torch_internals(
    "recompile_limit", owner=inside("torch._dynamo.config"), serves="blocks of many shapes, each compiled"
)
MASKED = tuple(
    Internal("transformers", inside("transformers.masking_utils"), name, "capturing CUDA graphs")
    for name in MASKS
)
PACKED_CACHE = (
    Internal(
        "transformers",
        inside("transformers", "DynamicCache", made=True),
        "layer_class_to_replicate",
        "KV caches whose layers are made when they are needed",
    ),
)
SPEECH = (
    Internal(
        "transformers",
        inside("transformers", "Wav2Vec2ForCTC"),
        "_get_feat_extract_output_lengths",
        "the frames of CTC models",
    ),
)
ATTENTION = (
    Internal(
        "transformers",
        inside("transformers", "PreTrainedConfig"),
        "_attn_implementation",
        "attention maps, and putting back what computed them",
    ),
    Internal(
        "transformers",
        inside("transformers", "PreTrainedConfig"),
        "_experts_implementation",
        "configurations that fetch no kernels",
    ),
)
LIVE_PLOT = (
    *(
        Internal("plotly", inside("plotly.basewidget", "BaseFigureWidget"), name, PLOT)
        for name in (
            "_config",
            "_widget_data",
            "_widget_layout",
            "_send_restyle_msg",
            "_send_relayout_msg",
            "_remove_overlapping_props",
        )
    ),
    *(
        Internal("plotly", inside("plotly.graph_objects", "Figure", made=True), name, PLOT)
        for name in ("_data", "_layout_obj")
    ),
)


def lacks(internals: Sequence[Internal]) -> str:
    """Return which of these names the installed library does not have, "" if it has all."""
    absent = [internal for internal in internals if internal.absent()]
    if not absent:
        return ""
    names = ", ".join(internal.name for internal in absent)
    return f"{installed(absent[0].library)} has no {names}, needed for {absent[0].serves}"


def installed(library: str) -> str:
    """Return a library with its version, as messages name it."""
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return f"{library} (not installed)"
