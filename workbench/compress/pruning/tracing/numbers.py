"""After heads or neurons found by experiment left: the numbers that modules and the configuration keep.

Which numbers have to change is tried: those that count heads, then those that are as wide as all heads, then
those of the configuration, until the model runs and answers as the dense one does with the same units masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.compress.pruning.prunable_units import inputs
from workbench.compress.pruning.surgery import own_config
from workbench.errors import CompressionError
from workbench.modules.layer import Layer, find_layers
from workbench.modules.sharing import sharing_copy
from workbench.util.text import kind_and_words

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune
    from workbench.compress.pruning.prunable_units import FoundSpaces

WAYS: tuple[frozenset[str], ...] = (
    frozenset({"heads"}),
    frozenset({"heads", "widths"}),
    frozenset({"heads", "config"}),
    frozenset({"heads", "widths", "config"}),
)
WIDTHS = ("all_head_size", "split_size", "inner_dim", "embed_dim", "hidden_size", "d_model")
NEURONS = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size")
CLOSE = 1e-3  # of the largest answer: removing is masking, to rounding


@dataclass(frozen=True)
class Counts:
    """Heads of one attention, as it was and as it is: (heads, heads of keys and values, outputs of all)."""

    owner: str
    size: int
    before: tuple[int, int]
    now: tuple[int, int]


def settle_traced(step: Prune, work: Work, found: FoundSpaces, *, fresh: bool) -> None:
    """Bring every number in line; with `fresh`, see that the model answers as the masked dense one.

    Raises:
        CompressionError: no way is right: the units do more than their products say.

    """
    if step.pattern == "neurons":
        tell_width(work, found)
        if fresh:
            check_masking(step, work)
        return
    counts = list(counts_of(work, found))

    def find() -> int:
        reason = ""
        for place, way in enumerate(WAYS):
            undo = apply(work, counts, way)
            reason = why_wrong(work, fresh=fresh)
            undo()
            if not reason:
                return place
        raise CompressionError(
            f"{step!r}: {type(work.model).__name__} does not run without its heads as if they were masked"
            f" ({reason})"
        )

    by_queries = any(one.before[1] == one.now[1] for one in counts)
    apply(work, counts, WAYS[work.statistics.once(("numbers of heads", by_queries), find)])


def check_masking(step: Prune, work: Work) -> None:
    """Refuse a model that does not answer as the dense one with the same units masked; tried once a bench."""
    reason = work.statistics.once(("removal is masking", step.pattern), lambda: why_wrong(work, fresh=True))
    if reason:
        raise CompressionError(
            f"{step!r}: {type(work.model).__name__} does not run without its {step.pattern} as if they were"
            f" masked ({reason})"
        )


def counts_of(work: Work, found: FoundSpaces) -> Iterator[Counts]:
    """Yield the heads of every attention that was found by experiment, from what its output product reads."""
    groups: dict[str, list[Any]] = {}
    for space in found.spaces:
        if space.block in found.traced:
            groups.setdefault(space.block, []).append(space)
    for owner, spaces in groups.items():
        reader = next(part for part in spaces[0].parts if part.axis == "columns")
        whole = not spaces[0].unit.startswith("query heads")
        size = found.sizes[owner]
        before = sum(space.parts[-1].index.numel() for space in spaces) // size
        now = inputs(work.model.get_submodule(reader.module)) // size
        shared = spaces[0].units if whole else len(spaces)
        left = shared * now // before if whole else shared
        yield Counts(owner, size, (before, shared), (now, left))


def apply(work: Work, counts: list[Counts], way: frozenset[str]) -> Any:
    """Write the numbers of heads in one way, and return what takes that back."""
    changed: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, getattr(owner, name, None)))
        setattr(owner, name, value)

    for one in counts:
        top = work.model.get_submodule(one.owner)
        for module in top.modules():
            for name, value in list(vars(module).items()):
                new = renumbered(name, value, one, widths="widths" in way)
                if new is not None:
                    put(module, name, new)
    config = own_config(work)
    if (
        "config" in way
        and config is not None
        and len({(one.before, one.now, one.size) for one in counts}) == 1
    ):
        one = counts[0]
        put(config, "head_dim", one.size)
        put(config, "num_attention_heads", one.now[0])
        if getattr(config, "num_key_value_heads", None) is not None:
            put(config, "num_key_value_heads", one.now[1])

    def undo() -> None:
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)

    return undo


def renumbered(name: str, value: Any, one: Counts, *, widths: bool) -> int | None:
    """Return what a number of a module is now, None where it is not one of heads."""
    if type(value) is not int:
        return None
    (heads, shared), (now, left) = one.before, one.now
    if "head" in name and not any(word in name for word in ("dim", "size")):
        by_keys = "kv" in name or "key_value" in name
        if by_keys and value == shared:
            return left
        return now if value == heads and not by_keys else None
    if "group" in name and value == heads // shared:
        return now // left
    return now * one.size if widths and name in WIDTHS and value == heads * one.size else None


def tell_width(work: Work, found: FoundSpaces) -> None:
    """Write the neurons into the configuration, and where MLPs keep them, if all have the same number."""
    config, before, now = own_config(work), set[int](), set[int]()
    for space in found.spaces:
        reader = next(part for part in space.parts if part.axis == "columns")
        width = inputs(work.model.get_submodule(reader.module))
        before.add(space.units)
        now.add(width)
        owner = work.model.get_submodule(reader.module.rpartition(".")[0])
        for name in NEURONS:
            if space.block in found.traced and vars(owner).get(name) == space.units:
                setattr(owner, name, width)
    if len(before) == len(now) == 1:
        old = before.pop()
        for name in NEURONS:
            if getattr(config, name, None) == old:
                setattr(config, name, next(iter(now)))
                return


def why_wrong(work: Work, *, fresh: bool) -> str:
    """Return why a model is not the masked one on one item, "" if it is (or runs at all, where it cannot be
    compared).
    """
    try:
        answers = answered(work, work.model)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        return kind_and_words(error)
    if not fresh:
        return ""
    wanted = answered(work, masked(work))
    if answers.shape != wanted.shape:
        return f"it answers {list(answers.shape)}, masked {list(wanted.shape)}"
    rounding = max(CLOSE, 16 * torch.finfo(work_dtype(work)).eps) * float(wanted.abs().max())
    worst = float((answers - wanted).abs().max())
    return (
        "" if worst <= rounding else f"its answers are off by {worst:.2g} of {float(wanted.abs().max()):.2g}"
    )


def work_dtype(work: Work) -> torch.dtype:
    """Return the type in which the model computes."""
    return next(parameter.dtype for parameter in work.model.parameters() if parameter.is_floating_point())


def answered(work: Work, model: nn.Module) -> Tensor:
    """Return what a model answers to one calibration item, float32."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return work.task.kind.logits(model, work.task.calibration[:1].to(device)).float()


def masked(work: Work) -> nn.Module:
    """Return the dense model with every input set to zero that a layer of the work's no longer reads."""
    model = sharing_copy(work.task.model).eval()
    layers = find_layers(model)[0]
    for layer in work.layers.values():
        if layer.columns is not None and layer.origin in layers:
            silence(layers[layer.origin], layer.columns)
    return model


def silence(layer: Layer, kept: Tensor) -> None:
    """Set all columns of a layer's matrix to zero but some."""
    matrix = layer.matrix()
    gone = torch.ones(matrix.shape[1], dtype=torch.bool)
    gone[kept.cpu()] = False
    matrix[:, gone.to(matrix.device)] = 0
    layer.write(matrix)
