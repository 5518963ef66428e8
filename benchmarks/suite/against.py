"""The same setting by this product, by plain torch, by torchao and by llm-compressor: seconds until its
quality is known.

One run, one model, the same 4-bit groups (or 8 bits a row), the same evaluation tokens; loading is left out
for all. The others copy the model, compress it, and evaluate everything as transformers users do:
`model(**inputs, labels=...)`, float32 logits and cross entropy. `cold` is the first setting of a session (for
this product, the same with a bit less); it includes the dense model's evaluation, without which no loss can
be told, and what is computed once. `warm` is any later one: this product and the other take turns, each of
its turns a setting that is new to it, and medians are kept. Both end when all items' quality is known;
latency, memory and divergence, which this product measures after that, are counted for nobody. `processor` is
the time that the process has spent computing, which says more than the clock where the machine is shared.

The peers are no dependencies: `--peers FOLDER` names where they were installed (`pip install --target FOLDER
--no-deps torchao llmcompressor compressed-tensors loguru nvidia-ml-py auto-round`). One that cannot run
leaves its error in the result.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import workbench as wb
from benchmarks.suite.record import Options, Record, synchronise
from workbench.predict.predictor import Predictor
from workbench.tasks.base import Task

WHAT = (
    "seconds from a setting to its quality: this product's prediction, first look and full interval against"
    " compressing and evaluating everything"
)
GROUP = 64  # divides every layer of every target
ROUNDS = 3  # in turn, as long as they are short
SHORT = 15.0  # seconds


@dataclass(frozen=True)
class Way:
    """How somebody compresses. `setting` names what is compared; `recipe` is the same for this product."""

    name: str
    setting: str
    recipe: wb.Recipe
    compress: Callable[[nn.Module, Task], nn.Module]


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return a weight [outputs, inputs] rounded to nearest on an asymmetric grid of `group` inputs a scale,
    in plain torch."""
    groups = weight.detach().float().reshape(len(weight), -1, group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-9) / (2**bits - 1)
    zero = torch.round(-low / scale)
    return (
        ((torch.round(groups / scale + zero).clamp(0, 2**bits - 1) - zero) * scale)
        .reshape(weight.shape)
        .to(weight.dtype)
    )


def linears(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a model without its output head, as this product and the peers select
    them."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.endswith(("lm_head", "classifier"))
        and module.in_features % GROUP == 0
    ]


def naive(model: nn.Module, _task: Task) -> nn.Module:
    """Round every linear layer of a copy, one after the other."""
    model = copy.deepcopy(model)
    for layer in linears(model):
        layer.weight = nn.Parameter(rounded(layer.weight, 4, GROUP), requires_grad=False)
    return model


def torchao(bits: int) -> Callable[[nn.Module, Task], nn.Module]:
    """Return torchao's weight-only quantization: 8 bits a row, or 4 in groups (packed for tiles on a GPU,
    where bfloat16 runs it)."""

    def compress(model: nn.Module, _task: Task) -> nn.Module:
        from torchao import quantization as ao
        from torchao.quantization.granularity import PerGroup

        model = copy.deepcopy(model)
        config: Any = ao.Int8WeightOnlyConfig()
        if bits == 4:
            tiled = next(model.parameters()).is_cuda
            config = (
                ao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
                if tiled
                else ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
            )
        chosen = {id(layer) for layer in linears(model)}
        ao.quantize_(model, config, filter_fn=lambda module, _name: id(module) in chosen)
        return model

    return compress


def llm_compressor(rounding: str) -> Callable[[nn.Module, Task], nn.Module]:
    """Return llm-compressor's `oneshot` to 4 bits in groups, calibrated on the task's own calibration items
    where it needs any."""

    def compress(model: nn.Module, task: Task) -> nn.Module:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from loguru import logger

        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(
                num_bits=4, type="int", symmetric=False, strategy="group", group_size=GROUP
            ),
        )
        model = copy.deepcopy(model)
        ids = task.calibration.inputs["input_ids"].cpu()
        calibration = {
            "dataset": Dataset.from_dict(
                {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
            ),
            "processor": tokenizer(),
            "num_calibration_samples": len(ids),
            "max_seq_length": ids.shape[1],
        }
        logger.remove()  # a line for every layer
        modifier = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[rounding]
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            model.config.save_pretrained(folder)  # it reads the model's folder again
            model.name_or_path = model.config._name_or_path = folder  # noqa: SLF001
            oneshot(
                model=model,
                recipe=modifier(config_groups={"all": scheme}, ignore=["lm_head"]),
                **(calibration if rounding == "gptq" else {}),
            )
        return model

    return compress


def tokenizer() -> Any:
    """Return a tokenizer that is never used: `oneshot` wants one beside data that is tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))  # noqa: S106
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",  # noqa: S106
        pad_token="[PAD]",  # noqa: S106
    )


def ways(task: Task) -> list[Way]:
    """Return the ways that fit a task: the peers compress language models here."""
    nearest = wb.Recipe(wb.Quantize(weight_bits=4, group_size=GROUP, scale_search=False))
    gptq = wb.Recipe(wb.Quantize(weight_bits=4, group_size=GROUP, rounding="gptq", scale_search=False))
    eight = wb.Recipe(wb.Quantize(weight_bits=8, scale_search=False, grid="symmetric"))
    own = [Way("plain torch", f"4 bits, groups of {GROUP}", nearest, naive)]
    if task.kind.name != "language modelling":
        return own
    return [
        *own,
        Way("torchao int4 weight only", f"4 bits, groups of {GROUP}", nearest, torchao(4)),
        Way(
            "llm-compressor oneshot, round to nearest",
            f"4 bits, groups of {GROUP}",
            nearest,
            llm_compressor("rtn"),
        ),
        Way("llm-compressor oneshot, GPTQ", f"GPTQ, 4 bits, groups of {GROUP}", gptq, llm_compressor("gptq")),
        Way("torchao int8 weight only", "8 bits a row", eight, torchao(8)),
    ]


def evaluate(task: Task, model: nn.Module, place: torch.device) -> float:
    """Return perplexity or accuracy over all evaluation items, as a user of transformers evaluates."""
    means, counts = list[float](), list[int]()
    with torch.no_grad():
        for items in task.evaluation.to(place).batches(task.batch_size):
            if task.kind.primary == "perplexity":
                means.append(float(model(**items.inputs, labels=items.inputs["input_ids"]).loss))
            else:
                means.append(float((model(**items.inputs).logits.argmax(-1) == items.labels).float().mean()))
            counts.append(len(items))
    total = sum(batch_mean * count for batch_mean, count in zip(means, counts, strict=True))
    mean = total / sum(counts)
    return math.exp(mean) if task.kind.primary == "perplexity" else mean


@dataclass
class Ours:
    """This product on one task, and the settings that it has not seen yet; mutable."""

    bench: wb.Bench
    predictor: Predictor
    settings: list[wb.Recipe]

    @staticmethod
    def opened(task: Task, recipe: wb.Recipe, folder: str) -> Ours:
        """Return it as the panel has it when a model is loaded.

        Its second setting will be `recipe`, the others differ in bits.
        """
        bench = wb.Bench(task, ledger=f"{folder}/{time.monotonic_ns()}.journal", progress=False)
        predictor = bench.predictor()
        predictor.predict(wb.Recipe())
        (step,) = recipe
        bits = (step.weight_bits - 1, step.weight_bits, 5, 6)  # type: ignore[attr-defined]
        return Ours(
            bench,
            predictor,
            [wb.Recipe(dataclasses.replace(step, weight_bits=width)) for width in bits[: 1 + ROUNDS]],
        )  # type: ignore[call-arg]

    def next(self) -> dict[str, Any]:
        """Measure the next setting: seconds to the prediction, the first look and all items, and the quality
        that they say."""
        recipe, start, spent, seen = (
            self.settings.pop(0),
            time.perf_counter(),
            time.process_time(),
            dict[str, Any](),
        )
        self.predictor.predict(recipe)
        seen["predicted_s"] = round(time.perf_counter() - start, 4)
        for point in self.bench.stream(recipe, again=True):
            synchronise(self.bench.device)
            now, used = round(time.perf_counter() - start, 3), round(time.process_time() - spent, 3)
            if "first_look_s" not in seen:
                seen |= {
                    "first_look_s": now,
                    "first_look_items": point.items,
                    "first_look": [
                        round(point.primary.compressed.low, 4),
                        round(point.primary.compressed.high, 4),
                    ],
                }
            if point.items == point.items_total and "full_s" not in seen:
                seen |= {
                    "full_s": now,
                    "full_processor_s": used,
                    "compress_s": round(point.provenance.compress_seconds, 3),
                }
                seen |= {
                    "value": round(point.primary.compressed.value, 4),
                    "dense_value": round(point.primary.dense.value, 4),
                }
        return seen


def theirs(way: Way, task: Task, place: torch.device, dense_s: float) -> dict[str, Any]:
    """Return seconds of another way: compressing, evaluating, and both.

    The first time with the dense model's evaluation.
    """
    start, spent = time.perf_counter(), time.process_time()
    model = way.compress(task.model, task)
    synchronise(place)
    compressed = time.perf_counter()
    value = round(evaluate(task, model, place), 4)
    whole = time.perf_counter() - start
    return {
        "compress_s": round(compressed - start, 3),
        "evaluate_s": round(start + whole - compressed, 3),
        "warm_full_s": round(whole, 3),
        "cold_full_s": round(whole + dense_s, 3),
        "full_processor_s": round(time.process_time() - spent, 3),
        "value": value,
    }


def in_turn(
    way: Way, task: Task, place: torch.device, dense_s: float, mine: Ours
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return seconds and values of theirs and of ours, medians of rounds in turn, and the rounds."""
    others, me, start = list[dict[str, Any]](), list[dict[str, Any]](), time.perf_counter()
    cold = mine.next()
    while len(me) < ROUNDS and (not me or time.perf_counter() - start < SHORT):
        others.append(theirs(way, task, place, dense_s))
        me.append(mine.next())
    ours = {
        f"{when}_{name}": value
        for when, row in (("cold", cold), ("warm", medians(me)))
        for name, value in row.items()
    }
    return medians(others), ours, len(me)


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each time, and of everything else the first."""
    return {
        name: round(statistics.median(row[name] for row in rows), 4) if name.endswith("_s") else value
        for name, value in rows[0].items()
    }


def peer_versions() -> dict[str, str]:
    """Return the versions of what is installed of the peers."""
    versions = {}
    for name in ("torchao", "llmcompressor", "compressed-tensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def run(target: str, options: Options, record: Record) -> None:
    """Compare everything that runs here on one model."""
    if options.peers is not None:
        sys.path.append(str(options.peers))
    logging.getLogger("torchao").setLevel(logging.ERROR)
    task = options.task(target)
    place = next(task.model.parameters()).device
    record.settings |= {
        "items": len(task.evaluation),
        "tokens_an_item": task.evaluation.labels[0].numel(),
        "peers": peer_versions(),
        "metric": task.kind.primary,
    }
    evaluate(
        dataclasses.replace(task, evaluation=task.evaluation[: task.batch_size]), task.model, place
    )  # libraries warm up
    start = time.perf_counter()
    evaluate(task, task.model, place)
    dense_s = time.perf_counter() - start
    record.settings["dense_evaluation_s"] = round(dense_s, 3)
    with tempfile.TemporaryDirectory() as folder:
        for way in ways(task):
            if record.late(options, way.name):
                return
            try:
                theirs(
                    way, dataclasses.replace(task, evaluation=task.evaluation[:1]), place, 0.0
                )  # what cannot run says so soon, what is slow the first time has been
            except Exception as error:  # noqa: BLE001  whatever a peer raises is its result here
                record.add(
                    name=way.name,
                    setting=way.setting,
                    failed=" ".join(f"{type(error).__name__}: {error}".split())[:400],
                )
                continue
            their_medians, me, rounds = in_turn(
                way, task, place, dense_s, Ours.opened(task, way.recipe, folder)
            )
            ratios = {
                f"{when}_full_over_{what}": round(
                    their_medians[f"{when}_full_s"] / max(me[f"{when}_{what}_s"], 1e-4),
                    1 if what != "full" else 2,
                )
                for when in ("cold", "warm")
                for what in ("predicted", "first_look", "full")
            }
            record.add(
                name=way.name,
                setting=way.setting,
                rounds=rounds,
                theirs=their_medians,
                ours=me,
                **ratios,
                processor_over_full=round(their_medians["full_processor_s"] / me["warm_full_processor_s"], 2),
            )
