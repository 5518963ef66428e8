"""Evaluation of Llama-like models on a GPU with one kernel where transformers has many: RMS norms, gated
products, rotary embeddings.

Modules are left for stand-ins that share their weights and call their layers; the model itself stays as it
is. Every model that is scored on a GPU is run so, dense and compressed alike, so that pairs stay pairs. That
the kernels compute what a class of modules computes is tried once, on numbers of its own dtype: products and
rotations give the same bits, norms those of another order of summing. Where a kernel fails later, the
module's own code runs on. Latency is never measured this way: users run the model as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.measure.evaluation.trials import small_llama
from workbench.modules.substitution import PassesOn, StandIn, with_stand_ins
from workbench.util.device import why_no_triton
from workbench.util.fast_path import FastPath, attempted, with_triton
from workbench.util.library_internals import children_of, is_watched
from workbench.util.text import kind_and_words

ROTARY = "apply_rotary_pos_emb"  # as transformers' modelling files name it
NEAR = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2e-6}  # of a number: two roundings
TOKENS, HEADS = 24, 3  # to try on


@dataclass(frozen=True)
class Operations:
    """What takes the place of several operations: `norm` (x [..., width], weight [width], eps), `gated`
    (gate, up), `rotary` (q, k, cos, sin).
    """

    norm: Callable[[Tensor, Tensor, float], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Operation:
    """One of them, asked until it fails; `failed` says why it did. Mutable."""

    run: Callable[..., Any]
    failed: str = ""

    def __call__(self, *given: Any) -> Any:
        """Return its result, None if it fails or if gradients are asked for, which it has none of."""
        if self.failed or torch.is_grad_enabled():
            return None
        try:
            return self.run(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001
            # compilers and drivers raise what they like; the module's own code runs on
            self.failed = kind_and_words(error)
            return None


class FusedNorm(StandIn):
    """An RMS norm."""

    def __init__(self, module: nn.Module, norm: Operation) -> None:
        """Remember the module and what computes it."""
        super().__init__(module)
        self.norm = norm

    def forward(self, given: Tensor) -> Any:
        """Return the module's outputs, by the kernel where it takes them."""
        module = self.__dict__["instead_of"]
        weight = module.weight
        fused = (
            self.norm(given, weight, module.variance_epsilon)
            if given.dtype == weight.dtype and given.device == weight.device
            else None
        )
        return module(given) if fused is None else fused


class FusedGate(StandIn):
    """Two layers multiplied through a SiLU (Shazeer 2020), and the layer after them, which are the module's
    own.
    """

    def __init__(self, module: nn.Module, gated: Operation) -> None:
        """Remember the module and what computes it."""
        super().__init__(module)
        self.gated = gated

    def forward(self, given: Tensor) -> Any:
        """Return the module's outputs, by the kernel where it takes them."""
        module = self.__dict__["instead_of"]
        gate, up = module.gate_proj(given), module.up_proj(given)
        fused = (
            self.gated(gate, up)
            if gate.shape == up.shape and gate.dtype == up.dtype and gate.dtype in NEAR
            else None
        )
        return module.down_proj(module.act_fn(gate) * up if fused is None else fused)


class FusedRotary(StandIn):
    """An attention whose own code calls another function for its rotary embedding (Su et al. 2021)."""

    def __init__(self, module: nn.Module, run: types.FunctionType) -> None:
        """Remember the module and its code."""
        super().__init__(module)
        self.run = run

    def forward(self, *given: Any, **named: Any) -> Any:
        """Return the module's outputs, by the kernel where it takes them."""
        return self.run(self.__dict__["instead_of"], *given, **named)


Make = Callable[[nn.Module], nn.Module]


@dataclass
class FusedBlocks:
    """Stand-ins for the modules of models on one device. Mutable; tries each class once.

    `refused` says of each class why it is run as it is, `failed` of each operation why it is no longer used.
    """

    operations: Operations
    device: torch.device
    refused: dict[tuple[type[nn.Module], torch.dtype], str] = field(default_factory=dict)
    codes: dict[type[nn.Module], types.FunctionType | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let each operation remember whether it failed."""
        self.norm, self.gated, self.rotary = (
            Operation(self.operations.norm),
            Operation(self.operations.gated),
            Operation(self.operations.rotary),
        )

    @property
    def reason(self) -> str:
        """Return why some modules are run as they are though there are kernels for their like, "" if none."""
        return next(filter(None, (*self.refused.values(), *self.failed.values())), "")

    @property
    def failed(self) -> dict[str, str]:
        """Return why operations are no longer used, by name."""
        return {
            name: operation.failed
            for name, operation in (("norm", self.norm), ("gated", self.gated), ("rotary", self.rotary))
            if operation.failed
        }

    def of(self, model: nn.Module) -> nn.Module:
        """Return a model that computes the same with fewer kernels.

        Itself where nothing in it can be fused.
        """
        return self.within(model) or model

    def within(self, module: nn.Module) -> nn.Module | None:
        """Return the module that takes another's place: a stand-in, or a copy that holds some. None if it is
        run as it is.
        """
        children = {
            name: replacement
            for name, child in children_of(module).items()
            if child is not None and (replacement := self.within(child)) is not None
        }
        held = with_stand_ins(module, children) if children else None
        return self.stand_in(held or module) or held

    def stand_in(self, module: nn.Module) -> nn.Module | None:
        """Return a stand-in that computes a module, None if it is run as it is."""
        make = self.maker(module)
        if make is None or not untouched(module):
            return None
        weight = next(module.parameters(), None)
        if weight is None or weight.dtype not in NEAR or weight.device != self.device:
            return None
        key = type(module), weight.dtype
        if key not in self.refused:
            self.refused[key] = self.trial(module, weight)
        return None if self.refused[key] else make(module)

    def maker(self, module: nn.Module) -> Make | None:
        """Return the function that makes a stand-in for modules that look like this one, None if there is
        none.
        """
        kind, children = type(module), children_of(module)
        if not children:
            norm = (
                kind.__name__.endswith("RMSNorm")
                and hasattr(module, "variance_epsilon")
                and isinstance(getattr(module, "weight", None), nn.Parameter)
            )
            return (lambda found_module: FusedNorm(found_module, self.norm)) if norm else None
        if "gate_proj" in children:
            return (
                (lambda found_module: FusedGate(found_module, self.gated))
                if {"up_proj", "down_proj", "act_fn"} <= children.keys() and is_silu(children["act_fn"])
                else None
            )
        if kind not in self.codes:
            self.codes[kind] = code(kind, self.rotary)
        run = self.codes[kind]
        return None if run is None else lambda found_module: FusedRotary(found_module, run)

    @torch.no_grad()
    def trial(self, module: nn.Module, weight: Tensor) -> str:
        """Return why a class of modules is run as it is, "" if its stand-in computes the same."""
        generator = torch.Generator(weight.device).manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=weight.device).mul_(2).to(weight.dtype)

        return attempted(
            lambda: (
                ""
                if self.same(module, numbers)
                else f"{type(module).__name__} computes something else than the kernel for {weight.dtype}"
            )
        )

    def same(self, module: nn.Module, numbers: Callable[..., Tensor]) -> bool:
        """Return whether an operation makes what a module makes of some numbers: the bits of rotations, to
        rounding of norms and products.
        """
        children = children_of(module)
        if not children:
            weight, eps = cast("Tensor", module.weight), cast("float", module.variance_epsilon)
            given = numbers(1, TOKENS, *weight.shape)
            return near(module(given), self.operations.norm(given, weight, eps))
        if "gate_proj" in children:
            gate, up, down = (module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
            given = numbers(1, TOKENS, int(next(gate.parameters()).shape[-1]))
            products = with_stand_ins(module, {"down_proj": PassesOn(down)})(
                given
            )  # what the module's own code gives to its last layer
            return near(products, self.operations.gated(gate(given), up(given)))
        width = 2 * (int(getattr(module, "head_dim", 64)) // 2)
        q, k, cos, sin = (
            numbers(2, TOKENS, HEADS, width).transpose(1, 2),
            numbers(2, TOKENS, 1, width).transpose(1, 2),
            numbers(2, TOKENS, width),
            numbers(2, TOKENS, width),
        )
        own = type(module).forward.__globals__[ROTARY](q, k, cos, sin)
        return all(
            torch.equal(expected, fused)
            for expected, fused in zip(own, self.operations.rotary(q, k, cos, sin), strict=True)
        )


def code(make: type[nn.Module], ours: Operation) -> types.FunctionType | None:
    """Return the code of an attention with our rotary embedding in the place of its file's, None if it calls
    none.
    """
    own = make.forward
    if (
        not isinstance(own, types.FunctionType)
        or own.__closure__
        or ROTARY not in own.__code__.co_names
        or not callable(own.__globals__.get(ROTARY))
    ):
        return None
    patched = types.FunctionType(
        own.__code__,
        {**own.__globals__, ROTARY: either(ours, own.__globals__[ROTARY])},
        own.__name__,
        own.__defaults__,
    )
    patched.__kwdefaults__ = own.__kwdefaults__
    return patched


def either(ours: Operation, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for both: ours for [items, heads, tokens, width] with one dtype, theirs for anything
    else.
    """

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        rotated = ours(q, k, cos, sin) if not more and not named and rotates(q, k, cos, sin) else None
        return theirs(q, k, cos, sin, *more, **named) if rotated is None else rotated

    return rotary


def rotates(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether queries, keys and angles have the shapes and dtypes that the kernel takes."""
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape or q.shape[3] % 2:
        return False
    fits = (
        (q.shape[0], q.shape[2], q.shape[3]) == (k.shape[0], k.shape[2], k.shape[3])
        and q.shape[2:] == cos.shape[1:]
        and cos.shape[0] in {1, q.shape[0]}
    )
    return fits and q.dtype in NEAR and q.dtype == k.dtype == cos.dtype == sin.dtype


def near(expected: Tensor, computed: Tensor) -> bool:
    """Return whether two tensors agree to two roundings of each number."""
    if expected.shape != computed.shape or expected.dtype != computed.dtype:
        return False
    return torch.allclose(
        computed.float(),
        expected.float(),
        rtol=NEAR[expected.dtype],
        atol=torch.finfo(expected.dtype).tiny,
        equal_nan=True,
    )


def untouched(module: nn.Module) -> bool:
    """Return whether a module and its parts run their class's own code, and nobody watches them: a stand-in
    passes by what is in the module's way.
    """
    modules = [part for part in (module, children_of(module).get("act_fn")) if part is not None]
    return not any(is_watched(part) or "forward" in vars(part) for part in modules)


def is_silu(module: nn.Module | None) -> bool:
    """Return whether a module is x * sigmoid(x)."""
    return isinstance(module, nn.SiLU) or type(module).__name__ in {"SiLU", "SiLUActivation"}


def fused_blocks(device: torch.device) -> FusedBlocks | None:
    """Return the fused blocks of a device, None where there is no GPU or no Triton."""
    if device.type != "cuda" or why_no_triton(device):
        return None
    from workbench.kernels import block_ops

    return FusedBlocks(Operations(block_ops.rms_norm, block_ops.gated, block_ops.rotary), device)


def tried(device: torch.device) -> str:
    """Return why the blocks of a small Llama are not fused, "" if all are."""
    blocks = fused_blocks(device)
    if blocks is None:
        return "no kernels"
    blocks.of(small_llama(device)[0])
    return blocks.reason or ("" if len(blocks.refused) == 3 else "a Llama has no modules that are known")


FUSED = FastPath(
    "fused blocks (Triton)",
    "norms, gated products and rotary embeddings of Llama-like models on a GPU",
    with_triton("workbench.kernels.triton_blocks"),
    tried,
)
