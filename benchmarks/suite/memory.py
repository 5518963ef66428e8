"""The most memory that a slider's move takes, against the dense model, one compressed copy and what the
caches may hold."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import workbench as wb
from benchmarks.suite.record import Options, Record
from workbench.compress import compress
from workbench.measure.evaluation import cuda_graphs
from workbench.measure.memory import quiet_stderr, unique_bytes

WHAT = (
    "bytes held at the peak of a slider's move (compression, then the whole evaluation set), against the"
    " dense model, one compressed copy and what is cached; on a GPU by its allocator's counter, on a CPU by"
    " the allocations that torch's profiler records"
)


def recipes() -> dict[str, list[wb.Recipe]]:
    """Return two positions of each slider: the first computes what is kept."""
    return {
        "sparsity": [wb.Recipe(wb.Prune(sparsity=s)) for s in (0.4, 0.5)],
        "bits": [wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64)) for bits in (3, 4)],
        "sparsity, wanda": [wb.Recipe(wb.Prune(sparsity=s, criterion="wanda")) for s in (0.4, 0.5)],
        "bits, gptq": [
            wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64, rounding="gptq")) for bits in (3, 4)
        ],
        "rank": [wb.Recipe(wb.LowRank(rank_ratio=ratio)) for ratio in (0.3, 0.4)],
    }


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, records and modules."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        inside = [*value.parameters(), *value.buffers()]
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inside = value
    elif is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, member.name) for member in fields(value)]
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("workbench"):
        inside = list(vars(value).values())
    for member in inside:
        yield from tensors(member, seen)


def peak_bytes(bench: wb.Bench, work: Callable[[], object]) -> int:
    """Return the most bytes that `work` allocates beyond those held before it."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def look(bench: wb.Bench, recipe: wb.Recipe) -> tuple[int, int]:
    """Compress by a recipe, evaluate everything.

    Return the bytes of the compressed copy that are its own, and of the masks and codes that were checked
    against it.
    """
    compressed = compress(bench.task, recipe, bench.statistics, shared=True)
    promised = unique_bytes(tensors([(layer.mask, layer.grid) for layer in compressed.layers]))
    model = compressed.model
    del compressed
    bench.setting.evaluator.scores(model, [], len(bench.evaluation))
    own = {id(p) for p in bench.task.model.parameters()}
    return unique_bytes(p for p in model.parameters() if id(p) not in own), promised


def budget_of(bench: wb.Bench) -> int:
    """Return the bytes that caches may hold on the device: statistics, hidden states, a graph's copy."""
    budget, prefix = bench.statistics.kept.limits, bench.setting.evaluator.prefix
    graphs = (
        cuda_graphs.SHARE * torch.cuda.get_device_properties(bench.device).total_memory
        if bench.device.type == "cuda"
        else 0
    )
    return int(budget.device + (0 if prefix is None else prefix.kept.budget) + graphs)


def cached_bytes(bench: wb.Bench) -> int:
    """Return the bytes kept beside the model and its data, on the model's device."""
    others = {
        tensor.data_ptr() for tensor in tensors([bench.task, bench.evaluation, bench.setting.latency_items])
    }
    return unique_bytes(
        tensor
        for tensor in tensors([bench.statistics.kept, bench.setting.evaluator])
        if tensor.device == bench.device and tensor.data_ptr() not in others
    )


def run(target: str, options: Options, record: Record) -> None:
    """Measure the peak of each slider's second move."""
    with tempfile.TemporaryDirectory() as folder:
        bench = wb.Bench(options.task(target), ledger=f"{folder}/points.journal", progress=False)
        dense = unique_bytes([*bench.task.model.parameters(), *bench.task.model.buffers()])
        record.settings |= {
            "items": len(bench.evaluation),
            "dense_bytes": dense,
            "dtype": str(next(bench.task.model.parameters()).dtype),
        }
        for name, (first, second) in recipes().items():
            if (options.sliders and name not in options.sliders) or record.late(options, name):
                continue
            try:
                look(bench, first)
                record.settings["cache_budget_bytes"] = budget_of(bench)
                kept = cached_bytes(bench)
                copies: list[tuple[int, int]] = []
                peak = peak_bytes(bench, lambda recipe=second, into=copies: into.append(look(bench, recipe)))
            except (RuntimeError, wb.errors.WorkbenchError) as error:
                record.add(name=name, failed=" ".join(f"{type(error).__name__}: {error}".split())[:300])
                continue
            (copy, promised), whole = copies[0], dense + kept + peak
            record.add(
                name=name,
                peak_bytes=whole,
                compressed_bytes=copy,
                cached_bytes=kept,
                beyond_bytes=peak - copy,
                promised_bytes=promised,
                times_dense=round(whole / dense, 3),
            )
