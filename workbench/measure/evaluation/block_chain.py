"""Which blocks of a model may be left out, and shown what they would return instead.

A model's blocks are found by watching one item: a chain of modules of its lists (`layers`, `stages`), each
given the very tensor that the one before returned. A compressed model whose first blocks are the dense
model's own objects, with everything that runs before them, may start from what those blocks return: the same
bits come out. That nothing else reads what they return is tried once, with NaN in the place of what every
earlier block returns.

On a CPU with several threads products need not give the same bits twice, whether anything is left out or not:
there the trial asks for each item's loss to `CLOSE` of itself and for the same answers. Intervals are wider
by orders of magnitude, and a point's context names the threads, so that what is compared was measured alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.measure.evaluation.trials import small_llama
from workbench.metrics.scores import Scores
from workbench.modules.sharing import holds_modules, sharing_copy
from workbench.modules.substitution import Shows, extras, first_tensor, same_bits, with_stand_ins
from workbench.tasks.base import Items
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.util.fast_path import FastPath, Refusals
from workbench.util.library_internals import SHARED, TABLES, is_watched, lacks
from workbench.util.text import kind_and_words

Score = Callable[[nn.Module, Items], Scores]
CLOSE = 1e-5  # of a loss: rounding in float32 makes about 1e-7 of it


@dataclass(frozen=True)
class Chain:
    """The blocks of a model by name, in order, what each returns beside its states, and up to which block
    each module may differ.

    `limits[name]` is how many blocks may be left out of a model that differs in this module.
    """

    blocks: tuple[str, ...]
    forms: tuple[int | None, ...]
    limits: dict[str, int]

    def unchanged(self, dense: nn.Module, model: nn.Module) -> int:
        """Return how many of the first blocks, and everything before them, are the dense model's own."""
        others = dict(model.named_modules(remove_duplicate=False))
        return min(
            (
                self.limits[name]
                for name, module in dense.named_modules(remove_duplicate=False)
                if differs(module, others.get(name))
            ),
            default=len(self.blocks),
        )

    def upto(
        self, model: nn.Module, count: int, states: Tensor, fill: float | None = None
    ) -> dict[str, nn.Module]:
        """Return the stand-ins, by name, for the first `count` blocks, the last of which returns `states`.

        Those before it do too, or `fill`.
        """
        places: dict[str, nn.Module] = {}
        for index, (name, form) in enumerate(zip(self.blocks[:count], self.forms, strict=False)):
            shown = states if index == count - 1 or fill is None else torch.full_like(states, fill)
            places[name] = Shows(model.get_submodule(name), shown, form)
        return places


def differs(dense: nn.Module, module: nn.Module | None) -> bool:
    """Return whether a module is not the dense one with the same tensors.

    What its children hold is not looked at.
    """
    if module is None or type(module) is not type(dense):
        return True
    ours, theirs = vars(dense), vars(module)
    if ours.keys() != theirs.keys() or ours["_modules"].keys() != theirs["_modules"].keys():
        return True
    for name, value in ours.items():
        if name in {"_parameters", "_buffers"}:
            if value.keys() != theirs[name].keys() or any(
                tensor is not theirs[name][key] for key, tensor in value.items()
            ):
                return True
        elif (
            name not in TABLES
            and value is not theirs[name]
            and ("hooks" not in name or value or theirs[name])
        ):
            return True
    return False


@dataclass
class BlockCall:
    """One call of a module, while a model is watched: when it began and ended, and for children of lists what
    went in and out.
    """

    name: str
    began: int
    ended: int = -1
    given: Tensor | None = None
    returned: Any = None
    states: Tensor | None = None
    copy: Tensor | None = None


@dataclass
class Watch:
    """Writes down the calls of all modules of a model, one run of one item."""

    listed: set[str]
    calls: list[BlockCall] = field(default_factory=list)
    running: list[BlockCall] = field(default_factory=list)
    clock: int = 0

    def on(self, model: nn.Module) -> list[Any]:
        """Return the handles of the hooks."""
        handles = []
        for name, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _module, given, named, name=name: self.begin(name, given, named), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda _module, _given, returned: self.end(returned)))
        return handles

    def begin(self, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note that a call begins."""
        self.clock += 1
        call = BlockCall(name, self.clock, given=first_tensor(given, named) if name in self.listed else None)
        self.calls.append(call)
        self.running.append(call)

    def end(self, returned: Any) -> None:
        """Note that it ends."""
        self.clock += 1
        call = self.running.pop()
        call.ended = self.clock
        if call.name in self.listed:
            call.returned = returned
            call.states = (
                returned
                if isinstance(returned, Tensor)
                else returned[0]
                if isinstance(returned, tuple) and returned and isinstance(returned[0], Tensor)
                else None
            )
            call.copy = None if call.states is None else call.states.clone()


def members(model: nn.Module) -> set[str]:
    """Return the names of the modules that stand in a list, and hold parameters."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            names |= {
                f"{name}.{child}".removeprefix(".")
                for child, block in module.named_children()
                if next(block.parameters(), None) is not None
            }
    return names


@torch.no_grad()
def find_chain(model: nn.Module, score: Score, items: Items, refusals: Refusals) -> Chain | None:
    """Return the longest chain of a model's blocks that can be left out from the front, None if there is
    none.

    `items` should be one item, on the model's device; `score` runs the model on it.
    """
    if any(holds_modules(module) for module in model.modules()):
        refusals.note(PREFIX, "a module holds others outside the module tree")
        return None
    watched, watch = sharing_copy(model), Watch(members(model))
    if not watch.listed or any(is_watched(module) for module in model.modules()):
        return None
    handles = watch.on(watched)
    try:
        whole = score(watched, items)
    finally:
        for handle in handles:
            handle.remove()
    chain = longest([call for call in watch.calls if call.states is not None], watch.calls)
    if len(chain) < 2 or any(
        call.copy is None or not torch.equal(call.states, call.copy)
        for call in chain
        if call.states is not None
    ):
        # One block alone saves nothing; a block that changes its input in place would change what is kept
        return None
    blocks = tuple(call.name for call in chain)
    candidate = Chain(
        blocks, tuple(extras(call.returned) for call in chain), limits(model, chain, watch.calls)
    )
    reason = why_not(candidate, model, chain[-2].states, whole, lambda trial_model: score(trial_model, items))
    refusals.note(PREFIX, reason)
    return None if reason else candidate


def why_not(
    chain: Chain, model: nn.Module, states: Tensor | None, whole: Scores, score: Callable[[nn.Module], Scores]
) -> str:
    """Return why blocks of a chain cannot be left out, "" if the same comes out when all but the last are.

    NaN comes out where more than their last states is read.
    """
    if states is None or not states.is_floating_point():
        return "its hidden states are no floating-point numbers"
    if not bool(torch.isfinite(whole.loss).all()):
        return "the dense model's loss is not finite"
    count = len(chain.blocks) - 1
    try:
        again = score(with_stand_ins(model, chain.upto(model, count, states, fill=torch.nan)))
    except (
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
        LookupError,
    ) as error:  # it asks more of its blocks than can be shown
        return kind_and_words(error)
    several = states.device.type == "cpu" and torch.get_num_threads() > 1
    return "" if alike(whole, again, several=several) else "blocks read more than the one before returns"


def alike(whole: Scores, again: Scores, *, several: bool) -> bool:
    """Return whether two readings agree: bit for bit, or with `several` threads of a CPU to rounding.

    Finite losses in `whole`.
    """
    same = same_bits(whole.loss, again.loss) or (
        several and torch.allclose(again.loss, whole.loss, rtol=CLOSE, atol=0)
    )
    return same and same_bits(whole.answers, again.answers)


def longest(listed: list[BlockCall], calls: list[BlockCall]) -> list[BlockCall]:
    """Return the longest chain in which each is given the very tensor that the one before returned, each
    called once.
    """
    times: dict[str, int] = {}
    for call in calls:
        times[call.name] = times.get(call.name, 0) + 1
    flat = [call for call in listed if times[call.name] == 1]
    for outer in sorted(flat, key=lambda call: call.ended - call.began):
        inside = [call for call in flat if outer.began < call.began and call.ended < outer.ended]
        through = max(
            (
                chain
                for end, chain in chains(inside).items()
                if end == id(outer.states) and chain[0].given is outer.given
            ),
            key=len,
            default=[],
        )
        gone = (
            {id(outer)} if through else {id(call) for call in inside}
        )  # a block with a way around what is inside it is one block
        flat = [call for call in flat if id(call) not in gone]
    return max(chains(flat).values(), key=len, default=[])


def chains(calls: list[BlockCall]) -> dict[int, list[BlockCall]]:
    """Return the longest chain that ends in each tensor, by its id."""
    best: dict[int, list[BlockCall]] = {}
    for call in sorted(filter(fits, calls), key=lambda call: call.ended):
        mine = [*best.get(id(call.given), []), call]
        if len(mine) > len(best.get(id(call.states), [])):
            best[id(call.states)] = mine
    return best


def fits(call: BlockCall) -> bool:
    """Return whether a block returns other states than it is given, and nothing beside."""
    try:
        extras(call.returned)
    except TypeError:
        return False
    return call.given is not None and call.states is not None and call.states is not call.given


def limits(model: nn.Module, chain: list[BlockCall], calls: list[BlockCall]) -> dict[str, int]:
    """Return for each module how many blocks may be left out if it differs: those that were done before it
    was first called.
    """
    first: dict[str, int] = {}
    for call in calls:
        first.setdefault(call.name, call.began)
    twins = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    by_module = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = next(
            (
                index
                for index, call in enumerate(chain)
                if name == call.name or name.startswith(f"{call.name}.")
            ),
            None,
        )
        began = first.get(name, first.get(twins[id(module)], 0))
        by_module[name] = sum(call.ended < began for call in chain) if inside is None else inside
    return by_module


def tried(device: torch.device) -> str:
    """Return why the blocks of a small Llama cannot be left out, "" if they can."""
    refusals, (model, items) = Refusals(), small_llama(device)
    chain = find_chain(model, LANGUAGE_MODELLING.score, items[:1], refusals)
    return refusals.reason(PREFIX) or ("" if chain is not None else "no chain of blocks is found in a Llama")


PREFIX = FastPath(
    "unchanged blocks left out",
    "evaluation where the first blocks are the dense model's own",
    lambda _device: lacks(SHARED),
    tried,
)
