"""Experts as layers: transformers keeps all experts of a block in parameters of three dimensions, which no
method can read. Here each expert has layers of its own, and the block gives what it gave.

A module of fused experts is known by its parameters ([experts, ...] all) and by what its forward takes, not
by the name of its architecture. Its class stays a base of the new one, so that gates, activations and norms
are its own. Whether the new one gives what the old one gave is tried on random inputs, once a class; where it
does not, the old one stays as it is, and says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.modules.layer import replace_module
from workbench.modules.sharing import sharing_copy, twin
from workbench.util.library_internals import children_of, parameters_of
from workbench.util.text import kind_and_words

FIRST = ("gate_up_proj", "up_proj")  # what an expert reads its inputs with
LAST = "down_proj"
CLOSE = 16  # times what the type can tell apart: how far a trial may be from the module as it was
NOTE = (
    "experts are run one after another, dense and compressed alike, not by transformers' product of all of"
    " them at once: latencies are those of this way"
)


class Expert(nn.Module):
    """One expert: the layers that its block calls. It is never called itself."""


class SeparateExperts(nn.Module):
    """Base of blocks whose experts are modules of their own, named by their numbers from 0."""

    num_experts: int
    turned = False  # whether the fused experts store their matrices as [inputs, outputs]

    def experts(self) -> dict[str, nn.Module]:
        """Return the experts by name, in order."""
        return {str(place): self.get_submodule(str(place)) for place in range(self.num_experts)}


class RoutedExperts(SeparateExperts):
    """Experts that are told which tokens they get: forward(hidden states, experts of each token, weights)."""

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs, [tokens, width], added in the order of experts."""
        states, chosen, weights = routing_of(given, named)
        outputs = torch.zeros_like(states)
        for place, tokens, gates in routes(chosen, weights, self.num_experts):
            out = self.run(self.get_submodule(str(place)), states[tokens]) * gates[:, None]
            outputs.index_add_(0, tokens, out.to(outputs.dtype))
        return outputs

    def run(self, expert: nn.Module, states: Tensor) -> Tensor:
        """Return an expert's outputs of the tokens [tokens, width] that are routed to it."""
        gated = FIRST[0] in children_of(expert)
        hidden = expert.get_submodule(FIRST[0] if gated else FIRST[1])(states)
        hidden = self._apply_gate(hidden) if gated else self.act_fn(hidden)  # type: ignore[operator]
        return self.normed(expert.get_submodule(LAST)(hidden))

    def normed(self, outputs: Tensor) -> Tensor:
        """Return an expert's outputs [tokens, width] after the norm that some classes have behind them."""
        norm = children_of(self).get("post_expert_norm")
        return outputs if norm is None else cast("Tensor", norm(outputs))


class SortedExperts(SeparateExperts):
    """Experts that are given as many rows each, one expert's after another's: forward(hidden states).

    Rows of zeros are tokens that go elsewhere: what has no bias makes zeros of them.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Return the experts' outputs, [experts * tokens, width]."""
        shares = states.view(self.num_experts, -1, states.shape[-1])
        return torch.cat([self.run(expert, shares[int(name)]) for name, expert in self.experts().items()])

    def run(self, expert: nn.Module, states: Tensor) -> Tensor:
        """Return an expert's outputs [rows, width] of its rows, run on those that are its own."""
        own = states.ne(0).any(-1).nonzero().flatten()
        outputs = torch.zeros_like(states)
        if len(own):
            gate, up = expert.get_submodule(FIRST[0])(states[own]).chunk(2, dim=-1)
            hidden = up * self.act_fn(gate)  # type: ignore[operator]
            outputs = outputs.index_copy(0, own, expert.get_submodule(LAST)(hidden))
        return outputs


class ParallelExperts(SeparateExperts):
    """Products of one expert each: forward(inputs, how many rows each expert has)."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """Return the products of all rows [rows, width], in their order."""
        products = [
            expert(rows) if len(rows) else rows.new_empty(0, self.output_size)
            for expert, rows in zip(self.experts().values(), inputs.split(expert_size, dim=0), strict=True)
        ]
        return torch.cat(products, dim=0)


def routing_of(given: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden states [tokens, width], the experts of each token [tokens, k], their weights [tokens,
    k]), whatever a class calls the last two: they come in this order.
    """
    states, chosen, weights = (*given, *named.values())
    return states, chosen, weights


def routes(chosen: Tensor, weights: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (expert, its tokens, their weights) of every expert that has any, in order; numbers beyond the
    last expert go nowhere.

    Tokens are in the order of the places that the expert has among their choices, then of the tokens: as
    transformers adds them up. Waits for the device once.
    """
    flat = chosen.t().flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts).tolist()[:experts]
    tokens, gates = order % len(chosen), weights.t().flatten()[order]
    start = 0
    for place, count in enumerate(counts):
        if count:
            yield place, tokens[start : start + count], gates[start : start + count]
        start += count


# --- from fused experts to separate ones


def own_stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters of three dimensions, by name."""
    return {
        name: tensor
        for name, tensor in parameters_of(module).items()
        if tensor is not None and tensor.ndim == 3
    }


def looks_fused(module: nn.Module) -> bool:
    """Return whether a module may hold fused experts: it counts them, and has a matrix for each."""
    count = getattr(module, "num_experts", None)
    stacks = own_stacks(module)
    return isinstance(count, int) and bool(stacks) and all(len(stack) == count for stack in stacks.values())


def form_of(module: nn.Module) -> type[SeparateExperts] | None:
    """Return which form of separate experts does what a module of fused ones does, None if none is known."""
    stacks = set(own_stacks(module))
    takes = [
        parameter
        for parameter in inspect.signature(inspect.unwrap(type(module).forward)).parameters
        if parameter != "self"
    ]
    if stacks == {"weight"} and len(takes) == 2 and hasattr(module, "output_size"):
        return ParallelExperts
    if stacks not in ({FIRST[0], LAST}, {FIRST[1], LAST}):
        return None
    if len(takes) == 3 and (hasattr(module, "_apply_gate") or FIRST[1] in stacks):
        return RoutedExperts
    return SortedExperts if len(takes) == 1 and FIRST[0] in stacks else None


@cache
def separate_class(fused: Any, form: Any) -> type[SeparateExperts]:
    """Return the class of a fused one's separate experts, which keeps its name and everything of it but its
    forward.
    """
    return type(fused.__name__, (form, fused), {"__doc__": form.__doc__})


def transposed(module: nn.Module) -> bool:
    """Return whether fused experts store their matrices as [inputs, outputs]."""
    stacks = own_stacks(module)
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool) or LAST not in stacks:
        return bool(said)
    first = next(stacks[name] for name in FIRST if name in stacks)
    return first.shape[1] == stacks[LAST].shape[2] and first.shape[2] != stacks[LAST].shape[1]


def separated(module: nn.Module, form: type[SeparateExperts]) -> SeparateExperts:
    """Return the separate experts of fused ones, whose values they share where they are stored the same way.

    The given module stays as it is.
    """
    block = twin(module)
    stacks, turned = own_stacks(module), transposed(module)
    tables = parameters_of(block), children_of(block)
    count = cast("int", module.num_experts)
    biases = {name: tables[0].pop(f"{name}_bias", None) for name in stacks}
    for name in stacks:
        del tables[0][name]
    for place in range(count):
        layers = {name: layer_of(stack, biases[name], place, turned=turned) for name, stack in stacks.items()}
        tables[1][str(place)] = layers["weight"] if form is ParallelExperts else joined(layers)
    vars(block)["turned"] = turned
    kinds: Any = type(module), form  # mypy takes a class of modules for something without a hash
    block.__class__ = separate_class(*kinds)
    return cast("SeparateExperts", block).train(module.training)


def joined(layers: dict[str, nn.Linear]) -> Expert:
    """Return an expert with these layers."""
    expert = Expert()
    for name, layer in layers.items():
        expert.add_module(name, layer)
    return expert


def layer_of(stack: nn.Parameter, biases: nn.Parameter | None, place: int, *, turned: bool) -> nn.Linear:
    """Return one expert's layer, of its matrix in a stack."""
    values = stack.detach()[place]
    values = values.t().contiguous() if turned else values
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta", dtype=values.dtype)
    layer.weight = nn.Parameter(values, requires_grad=stack.requires_grad)
    if biases is not None:
        layer.bias = nn.Parameter(biases.detach()[place], requires_grad=biases.requires_grad)
    return layer


def separate_experts(model: nn.Module, names: list[str] | None = None) -> list[str]:
    """Put separate experts in the place of a model's fused ones, and return their names; in place.

    Args:
        model: on the host or a device; on the device "meta" with `names` alone.
        names: those to separate, untried: which they are is known. None: all that can be, each class tried
            first. One that cannot be says why in its `left_dense`.
    """
    tried: dict[object, str] = {}
    done = []
    for name, module in list(model.named_modules()):
        if isinstance(module, SeparateExperts) or not (
            looks_fused(module) if names is None else name in names
        ):
            continue
        form = form_of(module)
        block = None if form is None else separated(module, form)
        if names is None:
            shapes = tuple(
                (key, tuple(stack.shape), stack.dtype) for key, stack in own_stacks(module).items()
            )
            about = (type(module), shapes)
            if about not in tried:
                tried[about] = unknown_form(module) if block is None else trial(module, block)
            if tried[about]:
                vars(module)["left_dense"] = tried[about]
                continue
        if block is not None:
            replace_module(model, name, block)
            done.append(name)
    return done


def unknown_form(module: nn.Module) -> str:
    """Return why a module of a form that nothing here knows stays as it is."""
    signature = inspect.signature(inspect.unwrap(type(module).forward))
    count = len(next(iter(own_stacks(module).values())))
    return f"its {count} experts are fused, and forward{signature} is not known"


@torch.no_grad()
def trial(module: nn.Module, block: SeparateExperts) -> str:
    """Return why separate experts may not take the place of a module, "" if they give what it gives."""
    try:
        given = trial_inputs(block)
        before = inspect.unwrap(type(module).forward)(module, *given)
        after = block(*given)
    # A class of its own ways raises what it likes: it stays as it is
    except Exception as error:  # noqa: BLE001
        return f"its experts are fused, and cannot be tried as layers: {kind_and_words(error)}"
    scale = before.float().norm()
    far = (after.float() - before.float()).norm()
    near = before.shape == after.shape and bool(far <= CLOSE * torch.finfo(before.dtype).eps * scale)
    return (
        ""
        if near
        else f"its experts are fused, and as layers they give something else (by {far / scale:.2g})"
    )


def trial_inputs(block: SeparateExperts) -> tuple[object, ...]:
    """Return inputs for a trial: every expert has a few tokens."""
    weight = next(iter(block.experts().values()))
    weight = cast("nn.Linear", weight if isinstance(weight, nn.Linear) else next(weight.children()))
    count, width, dtype = block.num_experts, weight.in_features, weight.weight.dtype
    generator = torch.Generator().manual_seed(0)
    device = weight.weight.device
    states = torch.randn(2 * count, width, generator=generator).to(device, dtype)
    if isinstance(block, ParallelExperts):
        return states, [2] * count
    if isinstance(block, SortedExperts):
        return (states,)
    first = torch.arange(2 * count) % count
    chosen = torch.stack([first, (first + 1) % count], 1)[:, : min(2, count)].to(device)
    weights = torch.rand(chosen.shape, generator=generator).to(device, dtype)
    return states, chosen, weights


def experts_in(model: nn.Module) -> dict[str, SeparateExperts]:
    """Return a model's separate experts, by the name of the block that holds them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SeparateExperts)}


def expert_of(name: str, blocks: Collection[str]) -> tuple[str, str, str]:
    """Return (the block of experts, ".", the rest of the name) of a module within one of these blocks; three
    empty strings for any other.
    """
    path = name.split(".")
    for count in range(len(path) - 1, 0, -1):
        block = ".".join(path[:count])
        if block in blocks:
            return block, ".", name.removeprefix(f"{block}.")
    return "", "", ""


def with_separate_experts(model: nn.Module) -> nn.Module:
    """Return a model whose experts have layers of their own: the given one if it has no fused ones, else a
    copy that shares its tensors. The given one stays as it is.
    """
    fused = [
        module for module in model.modules() if looks_fused(module) and not hasattr(module, "left_dense")
    ]
    if not any(not isinstance(module, SeparateExperts) for module in fused):
        return model
    copied = sharing_copy(model)
    separate_experts(copied)
    return copied


def why_no_graph(model: nn.Module) -> str:
    """Return why the operations of a model are not the same for all inputs, "" if they are."""
    return "which experts are run depends on the data, and a graph has one order" if experts_in(model) else ""


def notes(model: nn.Module) -> tuple[str, ...]:
    """Return the notes on a model's experts."""
    return (NOTE,) if experts_in(model) else ()
