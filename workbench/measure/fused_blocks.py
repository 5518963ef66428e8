"""Evaluation of Llama-like models on a GPU with one kernel where transformers has many: RMS norms, gated products, rotary embeddings.

Modules are left for stand-ins that share their weights and call their layers; the model itself stays as it is. Every model that is
scored on a GPU is run so, dense and compressed alike, so that pairs stay pairs. That the kernels compute what a class of modules
computes is tried once, on numbers of its own dtype: products and rotations give the same bits but for the last digit of an
exponential, norms those of another order of summing. Latency is never measured this way: users run the model as it is.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.measure.stand_ins import StandIn, with_stand_ins

ROTARY = "apply_rotary_pos_emb"  # as transformers' modelling files name it
NEAR = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2e-6}  # of the largest value that comes out: two roundings
TOKENS, HEADS = 24, 3  # to try on


@dataclass(frozen=True)
class Operations:
    """What takes the place of several operations: `norm` (x [..., width], weight [width], eps), `gated` (gate, up), `rotary` (q, k, cos, sin)."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class FusedNorm(StandIn):
    """An RMS norm."""

    def __init__(self, module: nn.Module, norm: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        """Remember the module and what computes it."""
        super().__init__(module)
        self.norm = norm

    def forward(self, given: Tensor) -> Any:
        """Return what the module returns."""
        module = self.__dict__["instead_of"]
        return self.norm(given, module.weight, module.variance_epsilon) if given.dtype == module.weight.dtype else module(given)


class FusedGate(StandIn):
    """Two layers multiplied through a SiLU (Shazeer 2020), and the layer after them, which are the module's own."""

    def __init__(self, module: nn.Module, gated: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Remember the module and what computes it."""
        super().__init__(module)
        self.gated = gated

    def forward(self, given: Tensor) -> Any:
        """Return what the module returns."""
        module = self.__dict__["instead_of"]
        return module.down_proj(self.gated(module.gate_proj(given), module.up_proj(given)))


class FusedRotary(StandIn):
    """An attention whose own code calls another function for its rotary embedding (Su et al. 2021)."""

    def __init__(self, module: nn.Module, run: types.FunctionType) -> None:
        """Remember the module and its code."""
        super().__init__(module)
        self.run = run

    def forward(self, *given: Any, **named: Any) -> Any:
        """Return what the module returns."""
        return self.run(self.__dict__["instead_of"], *given, **named)


@dataclass
class FusedBlocks:
    """Stand-ins for the modules of models on one device; `refused` says of each class why it is run as it is. Mutable; tries each class once."""

    operations: Operations
    device: torch.device
    refused: dict[tuple[type[nn.Module], torch.dtype], str] = field(default_factory=dict)
    codes: dict[type[nn.Module], types.FunctionType] = field(default_factory=dict)
    others: set[type[nn.Module]] = field(default_factory=set)  # classes of which nothing can be fused

    def of(self, model: nn.Module) -> nn.Module:
        """Return a model that computes the same with fewer kernels; itself where nothing in it can be fused."""
        places = {name: made for name, module in model.named_modules() if (made := self.stand_in(module)) is not None}
        inside = [name for name in places if name.rpartition(".")[0] in places]  # a norm within an attention, which its stand-in calls itself
        return with_stand_ins(model, {name: made for name, made in places.items() if name not in inside}) if places else model

    def stand_in(self, module: nn.Module) -> nn.Module | None:
        """Return what takes a module's place, None if it is run as it is."""
        if type(module) in self.others:
            return None
        make = self.maker(module)
        if make is None and "gate_proj" not in module._modules:  # noqa: SLF001  there is no public way to see them
            self.others.add(type(module))
        if make is None or module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001  there is no public way to see them
            return None
        weight = next(module.parameters(), None)
        if weight is None or weight.dtype not in NEAR or weight.device != self.device:
            return None
        key = type(module), weight.dtype
        if key not in self.refused:
            self.refused[key] = self.trial(module, make, weight)
        return None if self.refused[key] else make(module)

    def maker(self, module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
        """Return what makes a stand-in for modules that look like this one."""
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and isinstance(getattr(module, "weight", None), nn.Parameter):
            return lambda one: FusedNorm(one, self.operations.norm)
        if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= module._modules.keys() and is_silu(module.get_submodule("act_fn")):  # noqa: SLF001  as above
            return lambda one: FusedGate(one, self.operations.gated)
        if self.code(type(module)) is not None:
            return lambda one: FusedRotary(one, self.codes[type(one)])
        return None

    def code(self, make: type[nn.Module]) -> types.FunctionType | None:
        """Return the code of an attention with our rotary embedding in the place of its file's, None if it calls none."""
        own = make.__dict__.get("forward")
        if not isinstance(own, types.FunctionType) or own.__closure__ or ROTARY not in own.__code__.co_names or not callable(own.__globals__.get(ROTARY)):
            return None
        if make not in self.codes:
            around = {**own.__globals__, ROTARY: either(self.operations.rotary, own.__globals__[ROTARY])}
            made = types.FunctionType(own.__code__, around, own.__name__, own.__defaults__)
            made.__kwdefaults__ = own.__kwdefaults__
            self.codes[make] = made
        return self.codes[make]

    @torch.inference_mode()
    def trial(self, module: nn.Module, make: Callable[[nn.Module], nn.Module], weight: Tensor) -> str:
        """Return why a class of modules is run as it is, "" if its stand-in computes the same."""
        generator = torch.Generator(weight.device).manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=weight.device).mul_(2).to(weight.dtype)

        try:
            stand_in = make(module)
            if isinstance(stand_in, FusedRotary):
                width = 2 * (int(getattr(module, "head_dim", 64)) // 2)
                given = numbers(2, TOKENS, HEADS, width).transpose(1, 2), numbers(2, TOKENS, 1, width).transpose(1, 2), numbers(2, TOKENS, width), numbers(2, TOKENS, width)
                pairs = list(zip(type(module).forward.__globals__[ROTARY](*given), self.operations.rotary(*given), strict=True))
            else:
                inputs = numbers(1, TOKENS, int(weight.shape[-1]))
                pairs = [(module(inputs), stand_in(inputs))]
        except Exception as error:  # noqa: BLE001  compilers, drivers and modules raise what they like; the module is run as it is
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        close = all(one.shape == two.shape and one.dtype == two.dtype and near(one, two) for one, two in pairs)
        return "" if close else f"{type(module).__name__} computes something else than the kernel for {weight.dtype}"


def near(expected: Tensor, found: Tensor) -> bool:
    """Return whether all numbers agree to two roundings of the larger ones."""
    most = expected.float().abs().amax()
    return bool(torch.isfinite(most) and ((expected.float() - found.float()).abs().amax() <= NEAR[expected.dtype] * most))


def is_silu(module: nn.Module) -> bool:
    """Return whether a module is x * sigmoid(x)."""
    return isinstance(module, nn.SiLU) or type(module).__name__ in {"SiLU", "SiLUActivation"}


def either(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for both: ours for [items, heads, tokens, width] with one dtype, theirs for anything else."""

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        same = len({tensor.dtype for tensor in (q, k, cos, sin)}) == 1 and q.ndim == 4 and cos.ndim == 3 and q.shape[-1] == cos.shape[-1] == k.shape[-1]
        if more or named or not same or q.shape[-1] % 2 or torch.is_grad_enabled():
            return theirs(q, k, cos, sin, *more, **named)
        return ours(q, k, cos, sin)

    return rotary


def fused_blocks(device: torch.device) -> FusedBlocks | None:
    """Return what fuses blocks on a device, None where there is no GPU or no Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from workbench.runtime import block_operations

    return FusedBlocks(Operations(block_operations.rms_norm, block_operations.gated, block_operations.rotary), device)
