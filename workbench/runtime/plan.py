"""Which kernel runs a compressed model on this device, or why none does.

And the model in the form in which it is run and timed.

What is known without running anything (`plan`, `reasons_for`) is told before anyone waits. Quality is
measured on the compressed model itself; the realised one computes the same numbers up to rounding, which is
checked before it is timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.errors import RuntimeRefused
from workbench.modules.input_quantizer import InputFormat, QuantizesInputs
from workbench.modules.layer import Layer, replace_module
from workbench.modules.sharing import sharing_copy
from workbench.runtime.engine_list import layer_engines, model_engines
from workbench.runtime.engines import LayerEngine, ModelEngine, Once
from workbench.runtime.execution import runner, whole, why_not
from workbench.runtime.names import Runtime
from workbench.runtime.packed_linear import join_siblings
from workbench.runtime.probes import probe
from workbench.util.text import kind_and_words

if TYPE_CHECKING:
    from workbench.compress import Compressed
    from workbench.tasks.base import Items, Kind

# Relative distance of one layer's products beyond which its kernel is taken to be wrong: roundings of
# bfloat16 make less
NEAR = 0.02
# The same of a whole model's answers, in another runtime: roundings that fall the other way make less
FAR = 0.1


@dataclass(frozen=True)
class KernelPlan:
    """What will run a model: an engine for each layer that has one.

    `no_kernel` holds one sentence for each part that none speeds up.
    """

    engines: Mapping[str, LayerEngine]
    kernels: tuple[str, ...]
    no_kernel: tuple[str, ...]


@dataclass(frozen=True)
class Realised:
    """What is run and timed, the dense model in the same way.

    `held` is the torch model with its kernels, whose memory counts.

    `kernels` say what really runs it, which is what was planned but for what `warnings` say could not.
    """

    model: nn.Module
    dense: nn.Module
    plan: KernelPlan
    held: nn.Module
    kernels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def no_kernel(self) -> tuple[str, ...]:
        """Return why parts of the recipe make nothing faster."""
        return self.plan.no_kernel


@dataclass
class Served:
    """Engines by layer, and how often each reason was given, by part of the recipe.

    Filled while layers are asked about.
    """

    engines: dict[str, LayerEngine] = field(default_factory=dict)
    by_engine: Counter[str] = field(default_factory=Counter)  # layers by the name of their engine
    weights: dict[int, Counter[str]] = field(default_factory=dict)  # by width
    inputs: Counter[str] = field(default_factory=Counter)
    zeros: int = 0  # layers whose zeros an engine uses


def plan(compressed: Compressed, device: str, runtime: Runtime = "auto") -> KernelPlan:
    """Return the plan of a compressed model on `device`: the engine of each layer, and why nothing runs the
    rest faster.

    Runs nothing.
    """
    masked = any(layer.mask is not None for layer in compressed.layers)
    pattern = (compressed.recipe.zeros or "unnamed") if masked else None
    return plan_layers(compressed.layers, pattern, device, runtime)


def plan_layers(
    layers: Iterable[Layer], pattern: str | None, device: str, runtime: Runtime = "auto"
) -> KernelPlan:
    """Return the plan of some layers; `pattern` is that of their zeros, None without a mask."""
    refused = why_not(runtime, device)
    if refused:
        return KernelPlan({}, (), (f"runtime {runtime!r} cannot be used here: {refused}",))
    served = serve(layers, device, runtime)
    where = "this GPU" if device.startswith("cuda") else "this CPU"
    sentences = []
    if pattern is not None and not served.zeros:
        sentences.append(
            f"no kernel for {pattern} zeros on {where}: they are multiplied like any other number"
        )
    alike: dict[str, list[int]] = {}  # widths by their most common reason
    for bits, reasons in sorted(served.weights.items()):
        alike.setdefault(reasons.most_common(1)[0][0], []).append(bits)
    for widths in alike.values():
        reasons = sum((served.weights[bits] for bits in widths), Counter[str]())
        sentences.append(
            f"no {'/'.join(map(str, widths))}-bit kernel on {where} for {counted(reasons)}: weights are"
            " unpacked before the product"
        )
    if served.inputs:
        sentences.append(
            f"no kernel multiplies rounded inputs on {where} for {counted(served.inputs)}: the rounding is"
            " simulated, which costs time"
        )
    return KernelPlan(served.engines, by_name(served.by_engine), tuple(sentences))


def by_name(layers: Counter[str]) -> tuple[str, ...]:
    """Return how many layers each engine runs, in words."""
    return tuple(
        f"{count} {'layer' if count == 1 else 'layers'} by {name}" for name, count in sorted(layers.items())
    )


def counted(reasons: Counter[str]) -> str:
    """Return how many layers have no kernel, and the most common reason."""
    reason, total = reasons.most_common(1)[0][0], sum(reasons.values())
    return f"{total} {'layer' if total == 1 else 'layers'} ({reason})"


def serve(layers: Iterable[Layer], device: str, runtime: Runtime) -> Served:
    """Ask every engine about every layer that is stored in few bits, rounds its inputs or has a mask."""
    engine, served = whole(runtime), Served()
    here = {candidate: candidate.here(device) for candidate in layer_engines()} if engine is None else {}
    others = [candidate for candidate in model_engines() if not candidate.here(device)]
    uses: tuple[str, ...]
    for layer in layers:
        rounded = isinstance(layer.module, QuantizesInputs)
        if layer.table or (layer.grid is None and layer.mask is None and not rounded):
            continue  # rows of a table are looked up: there is no product to make faster
        if engine is not None:
            reason = engine.why_not_narrow(layer)
            uses = ("weights", "inputs") if layer.grid is not None else ()
            if not reason and uses:
                served.by_engine[engine.name] += 1
        elif runtime == "torch":
            reason, uses = "runtime 'torch' uses none", ()
        else:
            reason, uses = first_that_serves(layer, device, here, others, served)
        served.zeros += "zeros" in uses
        if layer.grid is not None and layer.grid.bits < 16 and (reason or "weights" not in uses):
            served.weights.setdefault(layer.grid.bits, Counter())[reason or "its kernel unpacks them"] += 1
        elif rounded and (reason or "inputs" not in uses):
            served.inputs[reason or "its weights are not quantized"] += 1
    return served


def first_that_serves(
    layer: Layer, device: str, here: Mapping[LayerEngine, str], others: Sequence[ModelEngine], served: Served
) -> tuple[str, tuple[str, ...]]:
    """Note the first engine that takes a layer and return ("", what it uses), or (why the likeliest one does
    not, nothing).

    `here` says why each engine of single layers cannot be used, "" if it can; `others` are those of whole
    models that can.
    """
    reasons: list[str] = []
    for engine, absent in here.items():
        reason = engine.serves(layer, device)
        if not reason and not absent:
            served.engines[layer.name] = engine
            served.by_engine[engine.name] += 1
            return "", engine.uses
        if not (reason and absent):
            reasons.append(f"{engine.name}: {reason or absent}")
    alternative = next(
        (engine for engine in others if layer.grid is not None and not engine.why_not_narrow(layer)), None
    )
    hint = "" if alternative is None else f"; runtime 'onnx' has one ({alternative.name})"
    return (reasons[-1] if reasons else "none in this version") + hint, ()


def realise(
    compressed: Compressed,
    device: str,
    runtime: Runtime = "auto",
    *,
    dense: nn.Module | None = None,
    kind: Kind | None = None,
    items: Items | None = None,
    once: Once | None = None,
) -> Realised:
    """Return the form of a compressed model that runs on `device`, and the dense model in the same form of
    execution.

    With a task's `kind` and `items` (the batch that will be timed) kernels are put in, the products of each
    compared with its layer's own, and the whole run once; what fails to build, to run, or to agree is left
    out, and `warnings` say so. Without them the model is the compressed one, with its plan. `once` keeps what
    does not depend on the recipe.
    """
    planned = plan(compressed, device, runtime)
    original = compressed.model if dense is None else dense
    if kind is None or items is None:
        return Realised(compressed.model, original, planned, compressed.model)
    keep: Once = once or (lambda _key, compute: compute())
    built = with_kernels(compressed, planned, kind, items)
    step_by_step = Realised(built.model, original, planned, built.model, built.kernels, built.warnings)
    if runtime in {"auto", "torch"}:
        return step_by_step
    try:
        running = runner(built.model, compressed.layers, runtime, kind=kind, items=items, once=keep)
        check_agreement(running, built.model, kind, items, runtime)
        reference = (
            keep(
                ("dense runner", runtime, len(items)),
                lambda: runner(original, (), runtime, kind=kind, items=items, once=keep),
            )
            if original is not compressed.model
            else running
        )
    except RuntimeRefused as error:
        return replace(step_by_step, warnings=(*built.warnings, f"timed step by step in torch: {error}"))
    return replace(step_by_step, model=running, dense=reference, kernels=built.kernels or planned.kernels)


@dataclass(frozen=True)
class Built:
    """A model with kernels in place: how many layers each runs, and what had to be left out."""

    model: nn.Module
    kernels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def with_kernels(compressed: Compressed, planned: KernelPlan, kind: Kind, items: Items) -> Built:
    """Return the model with the planned kernels in place, checked layer by layer and on the items."""
    if not planned.engines:
        return Built(compressed.model)
    model, left_out = sharing_copy(compressed.model), dict[str, list[str]]()
    built: dict[str, nn.Module] = {}
    distances: dict[str, Tensor] = {}
    for layer in compressed.layers:
        engine = planned.engines.get(layer.name)
        if engine is None:
            continue
        try:
            module = engine.build(layer).eval()
            distances[layer.name] = distance(module, layer)
            built[layer.name] = module
        except Exception as error:  # noqa: BLE001
            # a kernel that cannot be made costs its speed, never the panel
            left_out.setdefault(f"{engine.name} cannot be used ({kind_and_words(error)})", []).append(
                layer.name
            )
    for name, apart in zip(
        distances, torch.stack(list(distances.values())).tolist() if distances else [], strict=True
    ):
        if apart <= NEAR:
            replace_module(model, name, built[name])
        else:
            left_out.setdefault(
                f"{planned.engines[name].name} gives other products (such as {apart:.2g} apart, relative to"
                f" their size; {NEAR} is allowed)",
                [],
            ).append(name)
            del built[name]
    said = tuple(
        f"{names[0]}{f' and {len(names) - 1} more layers' * (len(names) > 1)}: {reason}, so multiplied as"
        " floats"
        for reason, names in left_out.items()
    )
    if not built:
        return Built(compressed.model, (), said)
    join_siblings(model)
    try:
        check_answers(model, compressed.model, kind, items)
    except RuntimeRefused as error:
        return Built(compressed.model, (), (*said, f"kernels left out: {error}"))
    return Built(model, by_name(Counter(planned.engines[name].name for name in built)), said)


@torch.no_grad()
def distance(built: nn.Module, layer: Layer) -> Tensor:
    """Return how far a kernel's products with random inputs are from the layer's own, relative to their size:
    float32, a scalar.
    """
    weight = layer.parameter
    generator = torch.Generator(weight.device).manual_seed(0)
    inputs = torch.randn(3, layer.as_matrix(weight).shape[1], generator=generator, device=weight.device).to(
        weight.dtype
    )
    wanted = layer.module(inputs).float()
    apart: Tensor = (built(inputs).float() - wanted).norm() / wanted.norm().clamp_min(1e-12)
    return apart


def check_answers(running: nn.Module, simulated: nn.Module, kind: Kind, items: Items) -> None:
    """Run a model whose layers have been compared one by one: roundings that fall the other way may add up,
    but not to infinity.

    Raises:
        RuntimeRefused: it fails, or answers with infinities or NaN where the simulated one does not.
    """
    try:
        with torch.no_grad():
            finite = (
                torch.isfinite(answers(kind, running, items)).all()
                | ~torch.isfinite(answers(kind, simulated, items)).all()
            )
    except Exception as error:  # noqa: BLE001  whatever a kernel raises
        raise RuntimeRefused(
            f"the model with its kernels fails when it is run: {kind_and_words(error)}"
        ) from None
    if not bool(finite):
        raise RuntimeRefused("the model with its kernels answers with infinite numbers or NaN")


def check_agreement(running: nn.Module, simulated: nn.Module, kind: Kind, items: Items, name: str) -> None:
    """Compare the answers of two forms of one model.

    Raises:
        RuntimeRefused: one fails, or they are further apart than roundings explain.

    """
    try:
        with torch.no_grad():
            wanted, given = (answers(kind, model, items) for model in (simulated, running))
    except Exception as error:  # noqa: BLE001  whatever a kernel raises
        raise RuntimeRefused(f"{name} fails when it is run: {kind_and_words(error)}") from None
    apart = float((wanted - given).norm() / wanted.norm().clamp_min(1e-12))
    if not apart <= FAR and bool(torch.isfinite(wanted).all()):
        raise RuntimeRefused(
            f"{name} gives other answers than the compressed model: {apart:.2g} apart, relative to their"
            f" size; {FAR} is allowed"
        )


def answers(kind: Kind, model: nn.Module, items: Items) -> Tensor:
    """Return a model's outputs for items, float32 [N, ...]."""
    return kind.logits(model, items).float()


def reasons_for(
    pattern: str | None,
    widths: list[int],
    device: str,
    *,
    group_size: int = 0,
    inputs: InputFormat | None = None,
    runtime: Runtime = "auto",
) -> list[str]:
    """Return why zeros of this pattern (None: no mask) and grids of these widths make nothing faster on this
    device.

    Every engine is asked about a layer of 1,024 by 1,024 that exists as shapes only.
    """
    layers = [probe(bits, group_size, inputs) for bits in widths] or (
        [probe(0, 0, inputs)] if inputs is not None else []
    )
    planned = plan_layers(layers, pattern, device, runtime)
    return [reason.replace(" for 1 layer ", " ") for reason in planned.no_kernel]
