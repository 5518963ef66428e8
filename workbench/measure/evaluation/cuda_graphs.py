"""Batches of evaluation items through one CUDA graph: no time between kernels, whichever point is scored.

A graph reads fixed addresses, and every point has tensors of its own. So one copy of the dense model is
captured once for each shape of batch, and a point's weights are copied into it (2 ms for 1.1 billion
parameters) before its batches are replayed. That serves every point that differs from the dense model in the
values of its tensors alone: pruned and quantized weights, not factors, removed structure or rounded inputs,
which are run as they are. A graph is used only if it gives the bits of the model run step by step, so that
points read either way can be compared. The copy stays on the GPU, with the intermediate values of one batch:
see `SHARE`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from workbench.kernels.graph_capture import one_sequence_each
from workbench.measure.evaluation.outputs import Sampler
from workbench.measure.evaluation.trials import small_llama
from workbench.modules.experts import why_no_graph
from workbench.modules.sharing import holds_modules, own_parameters, twin
from workbench.tasks.base import Items, Kind
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.tasks.likelihood import token_loss
from workbench.util.device import free_fraction
from workbench.util.fast_path import FastPath, Refusals, attempted, on_a_gpu
from workbench.util.library_internals import MASKED, SHARED, TABLES, children_of, copy_each, lacks

SHARE = 0.05  # of a GPU's memory that the copy may take: larger models keep a GPU busy without a graph
# Of batches that are captured, looks of few items among them; texts of many lengths are run as they are
SHAPES = 6
WARM = 2  # runs before a capture, in which libraries set themselves up

Read: TypeAlias = Callable[
    [Items], tuple[Tensor, Tensor]
]  # loss and answer of every label, as `token_loss` gives them


@dataclass
class CapturedPass:
    """One graph: `inputs` are copied in before it is replayed, `loss` and `answers` are overwritten by the
    next replay.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Items
    loss: Tensor
    answers: Tensor
    sampled: Tensor | None = None  # what is kept of the outputs, overwritten as well


@dataclass
class Graphs:
    """Graphs of one dense model on batches of `size` items; `refused` says why there are none.

    Mutable; one thread at a time.

    Whole batches are captured at once, smaller ones when they come again. `prepared` turns a model into what
    is called (its head taken off).
    """

    kind: Kind
    dense: nn.Module
    size: int
    prepared: Callable[[nn.Module], nn.Module]
    refused: str = ""
    copy: nn.Module | None = None
    called: nn.Module | None = None  # what `prepared` makes of the copy
    own: list[Tensor] = field(default_factory=list)  # the dense model's tensors
    slots: list[Tensor] = field(default_factory=list)  # the copy's, in the same order
    pristine: list[bool] = field(default_factory=list)  # whether they hold the dense model's values
    holds: weakref.ref[nn.Module] | None = None  # the model whose weights the copy has now
    captured: dict[object, CapturedPass] = field(default_factory=dict)
    seen: set[object] = field(default_factory=set)  # shapes
    lock: threading.Lock = field(default_factory=threading.Lock)
    sampler: Sampler | None = None  # what is kept of the outputs of each batch
    refusals: Refusals = field(default_factory=Refusals)
    sampled: Tensor | None = None  # of the batch that was read last, until the next one

    @contextmanager
    def loaded(self, model: nn.Module, *, again: bool = False) -> Iterator[Read | None]:
        """Give what reads batches with a model's weights, None if this model must be run as it is, or another
        thread is reading.

        `again` says that the model is the same as when it was last given: its weights are still there if no
        other came between.
        """
        if not self.lock.acquire(blocking=False):
            yield None
            return
        try:
            there = again and not self.refused and self.holds is not None and self.holds() is model
            yield self.read if there or self.load(model) else None
        finally:
            self.lock.release()

    def load(self, model: nn.Module) -> bool:
        """Copy a model's tensors into the captured copy, those of the dense model once.

        Return whether they fit.
        """
        if self.copy is None and not self.refused:
            self.refused = self.why_not()
            if not self.refused:
                self.copy = twin(self.dense)
                own_parameters(self.copy)
                self.called = self.prepared(self.copy)
                self.own, self.slots = (
                    counterparts(self.dense, holder) or [] for holder in (self.dense, self.copy)
                )
                self.pristine = [True] * len(self.slots)
        self.holds = None
        if self.refused or self.copy is None:
            return False
        values = counterparts(self.dense, model)
        if values is None:
            return False
        moved = [
            index
            for index, (value, own) in enumerate(zip(values, self.own, strict=True))
            if value is not own or not self.pristine[index]
        ]
        if moved:
            with torch.no_grad():
                copy_each([self.slots[index] for index in moved], [values[index] for index in moved])
        for index in moved:
            self.pristine[index] = values[index] is self.own[index]
        self.holds = weakref.ref(model)
        return True

    def why_not(self) -> str:
        """Return why the dense model is not captured, "" if it can be tried."""
        tensors = [*self.dense.parameters(), *self.dense.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        if device.type != "cuda":
            return "CUDA graphs need a CUDA GPU"
        if self.kind.distribution is None:
            return f"{self.kind.name} is not scored by one forward pass"
        if any(tensor.device != device for tensor in tensors):
            return "the model lies on several devices"
        if (reason := why_no_graph(self.dense)) or any(
            holds_modules(module) or hooked(module) for module in self.dense.modules()
        ):
            return reason or "a module has hooks, or holds others outside the module tree"
        size, total = (
            sum(tensor.nbytes for tensor in tensors),
            torch.cuda.get_device_properties(device).total_memory,
        )
        if size > SHARE * total or size > free_fraction(device) * total / 4:
            return (
                f"one more copy of the model takes {size / 2**30:.1f} GiB: at most {SHARE:.0%} of the GPU's"
                " memory and a quarter of what is free are used"
            )
        return ""

    def read(self, items: Items) -> tuple[Tensor, Tensor]:
        """Return the loss and the answer of every label of a batch; waits for nothing."""
        assert self.copy is not None  # noqa: S101  for the type checker: `load` came first
        shape = tuple(
            (name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in {**items.inputs, "labels": items.labels}.items()
        )
        due = shape in self.seen or len(items) == self.size
        self.seen.add(shape)
        if due and shape not in self.captured and len(self.captured) < SHAPES and not self.refused:
            failed = attempted(lambda: self.keep(shape, items))
            self.refused = f"capture failed: {failed}" if failed else ""
            self.refusals.note(GRAPHS, self.refused)
        captured = self.captured.get(shape)
        if captured is None:
            return self.evaluate(items)
        for name, tensor in items.inputs.items():
            captured.inputs.inputs[name].copy_(tensor)
        captured.inputs.labels.copy_(items.labels)
        captured.graph.replay()
        self.sampled = self.sampled if captured.sampled is None else captured.sampled
        return captured.loss.clone(), captured.answers.clone()

    def keep(self, shape: object, items: Items) -> str:
        """Keep a graph for batches of a shape; raises what drivers and models raise."""
        self.captured[shape] = self.capture(items)
        return ""

    def evaluate(self, items: Items) -> tuple[Tensor, Tensor]:
        """Run the copy, step by step."""
        assert self.called is not None  # noqa: S101  for the type checker
        logits = self.kind.logits(self.called, items)
        self.sampled = None if self.sampler is None else self.sampler(logits)
        return token_loss(logits, items.labels)

    def capture(self, items: Items) -> CapturedPass:
        """Run a batch beside the main stream, then capture one run.

        Another thread's use of the GPU does not break it.

        Raises:
            RuntimeError: a replay does not give the bits of the model run step by step, as where it chooses
                another kernel.
        """
        device = items.labels.device
        inputs = Items({name: tensor.clone() for name, tensor in items.inputs.items()}, items.labels.clone())
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                stepwise = self.evaluate(inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with one_sequence_each(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss, answers = self.evaluate(inputs)
        graph.replay()
        if not (torch.equal(loss, stepwise[0]) and torch.equal(answers, stepwise[1])):
            raise RuntimeError("a replay gives other bits than the model run step by step")
        return CapturedPass(graph, inputs, loss, answers, self.sampled)


def hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks."""
    inside = vars(module)
    return any(bool(inside[name]) and not isinstance(inside[name], bool) for name in sorts(tuple(inside))[1])


@cache
def sorts(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which attributes of a module are neither tables nor hooks, and which are hooks."""
    hooks = tuple(name for name in names if "hooks" in name)
    return tuple(name for name in names if name not in TABLES and name not in hooks), hooks


def counterparts(dense: nn.Module, model: nn.Module) -> list[Tensor] | None:
    """Return the tensors of a model in the places of the dense one's, each once, always in the same order.

    None if it differs in anything else than the values of its tensors: modules, numbers, shapes, types, or a
    tensor that was one and is two.
    """
    met: dict[int, nn.Module] = {}
    matches: dict[int, Tensor] = {}
    pairs = [(dense, model)]
    while pairs:
        ours, theirs = pairs.pop()
        if met.setdefault(id(ours), theirs) is not theirs or not same_but_values(ours, theirs):
            return None
        for table in ("_parameters", "_buffers"):
            values = vars(theirs)[table]
            if any(
                matches.setdefault(id(own), values[name]) is not values[name]
                for name, own in vars(ours)[table].items()
                if own is not None
            ):
                return None
        children = children_of(theirs)
        pairs += [
            (child, counterpart)
            for name, child in children_of(ours).items()
            if child is not None and (counterpart := children[name]) is not None
        ]
    return list(matches.values())


def same_but_values(dense: nn.Module, module: nn.Module) -> bool:
    """Return whether a module is the dense one but for the values of its tensors, children apart."""
    ours, theirs = vars(dense), vars(module)
    if type(dense) is not type(module) or ours.keys() != theirs.keys() or hooked(module):
        return False
    if any(ours[name] is not theirs[name] for name in sorts(tuple(ours))[0]):
        return False
    children = [
        {name: child is None for name, child in attributes["_modules"].items()}
        for attributes in (ours, theirs)
    ]
    return (
        children[0] == children[1]
        and same_form(ours["_parameters"], theirs["_parameters"])
        and same_form(ours["_buffers"], theirs["_buffers"])
    )


def same_form(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> bool:
    """Return whether two tables name tensors of the same shapes, types and devices."""
    if ours.keys() != theirs.keys():
        return False
    pairs = [(own, theirs[name]) for name, own in ours.items() if own is not theirs[name]]
    return all(
        own is not None
        and counterpart is not None
        and (own.shape, own.dtype, own.device) == (counterpart.shape, counterpart.dtype, counterpart.device)
        for own, counterpart in pairs
    )


def here(device: torch.device) -> str:
    """Return the reason why graphs cannot be tried: names that torch or transformers lack, or no GPU; "" if
    they can.
    """
    return lacks(SHARED) or lacks(MASKED) or on_a_gpu(device)


def tried(device: torch.device) -> str:
    """Return why a small Llama cannot be replayed, "" if it can."""
    model, items = small_llama(device)
    graphs = Graphs(LANGUAGE_MODELLING, model, len(items), lambda prepared_model: prepared_model)
    with graphs.loaded(model) as read, torch.no_grad():
        if read is not None:
            read(items)
    return graphs.refused


GRAPHS = FastPath(
    "evaluation by CUDA graphs",
    "models that do not keep a GPU busy, and have no experts: no time between kernels",
    here,
    tried,
)
