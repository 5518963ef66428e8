"""Recipes and models whose results are kept in tests/golden: every family, pairs in both orders, and all."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import speech_models
import structure_models
import torch

import workbench as wb
from workbench.tasks.base import Task
from workbench.zoo import load_task

Steps = tuple[wb.Step, ...]

QUICK = {"distill_batch": 8, "learning_rate": 1e-3, "look_every": 0}
TAUGHT = {"transfer_steps": 3, "transfer_batch": 8, "transfer_look_every": 0}
TRAINED = {"rounds": 2, "train_steps": 2, "train_batch": 8}

LOW_RANK: dict[str, Callable[[], Steps]] = {
    "svd": lambda: (wb.LowRank(rank_ratio=0.4, factorization="svd"),),
    "whitened": lambda: (wb.LowRank(rank_ratio=0.3),),
    "ranks by energy": lambda: (wb.LowRank(rank_ratio=0.3, rank_allocation="energy"),),
    "ranks by loss": lambda: (wb.LowRank(rank_ratio=0.3, rank_allocation="loss"),),
    "spatial": lambda: (wb.LowRank(rank_ratio=0.3, conv="spatial", factorization="svd"),),
    "tucker2": lambda: (wb.LowRank(rank_ratio=0.3, conv="tucker2", factorization="svd"),),
}
PRUNE: dict[str, Callable[[], Steps]] = {
    "magnitude": lambda: (wb.Prune(sparsity=0.5),),
    "wanda": lambda: (wb.Prune(sparsity=0.5, criterion="wanda"),),
    "sparsegpt": lambda: (wb.Prune(sparsity=0.5, criterion="sparsegpt"),),
    "taylor": lambda: (wb.Prune(sparsity=0.3, criterion="taylor"),),
    "fisher": lambda: (wb.Prune(sparsity=0.5, criterion="fisher"),),
    "random": lambda: (wb.Prune(sparsity=0.2, criterion="random", seed=3),),
    "2:4": lambda: (wb.Prune(pattern="2:4"),),
    "1:4 wanda": lambda: (wb.Prune(sparsity=0.75, pattern="1:4", criterion="wanda"),),
    "2:4 sparsegpt": lambda: (wb.Prune(pattern="2:4", criterion="sparsegpt"),),
    "global": lambda: (wb.Prune(sparsity=0.5, allocation="global"),),
    "global wanda": lambda: (wb.Prune(sparsity=0.5, criterion="wanda", allocation="global"),),
    "sensitivity": lambda: (wb.Prune(sparsity=0.6, criterion="wanda", allocation="sensitivity"),),
    "sparsegpt by sensitivity": lambda: (
        wb.Prune(sparsity=0.5, criterion="sparsegpt", allocation="sensitivity"),
    ),
    "heads": lambda: (wb.Prune(sparsity=0.5, pattern="heads"),),
    "heads reconstructed": lambda: (
        wb.Prune(sparsity=0.5, pattern="heads", criterion="wanda", reconstruct=True),
    ),
    "neurons": lambda: (wb.Prune(sparsity=0.4, pattern="neurons", criterion="taylor"),),
    "neurons reconstructed": lambda: (wb.Prune(sparsity=0.4, pattern="neurons", reconstruct=True),),
    "channels": lambda: (wb.Prune(sparsity=0.4, pattern="channels"),),
    "channels by fisher": lambda: (
        wb.Prune(sparsity=0.4, pattern="channels", criterion="fisher", allocation="global"),
    ),
    "channels reconstructed": lambda: (wb.Prune(sparsity=0.4, pattern="channels", reconstruct=True),),
    "layers": lambda: (wb.Prune(sparsity=0.34, pattern="layers"),),
    "rounds": lambda: (wb.Prune(sparsity=0.5, criterion="wanda", **TRAINED),),
    "penalty": lambda: (wb.Prune(sparsity=0.5, penalty=1e-4, train_steps=3, train_batch=8),),
    "targets": lambda: (
        wb.Prune(sparsity=0.25, targets=("*.0.*",)),
        wb.Prune(sparsity=0.5, targets=("*", "!*.0.*", "!*.1.*")),
    ),
    "pattern that means another sparsity": lambda: (wb.Prune(sparsity=0.5, pattern="1:4"),),
}
QUANTIZE: dict[str, Callable[[], Steps]] = {
    "W8": lambda: (wb.Quantize(weight_bits=8),),
    "W4 g8": lambda: (wb.Quantize(weight_bits=4, group_size=8),),
    "W3 symmetric": lambda: (wb.Quantize(weight_bits=3, grid="symmetric"),),
    "W2 whole range": lambda: (wb.Quantize(weight_bits=2, scale_search=False),),
    "W5 a tensor": lambda: (wb.Quantize(weight_bits=5, granularity="tensor", grid="symmetric"),),
    "W3.4": lambda: (wb.Quantize(weight_bits=3.4),),
    "W4 knapsack gptq": lambda: (wb.Quantize(weight_bits=4, bit_allocation="knapsack", rounding="gptq"),),
    "gptq": lambda: (wb.Quantize(weight_bits=3, rounding="gptq"),),
    "gptq in order": lambda: (
        wb.Quantize(weight_bits=4, group_size=8, rounding="gptq", activation_order=False, damping=0.1),
    ),
    "awq": lambda: (wb.Quantize(weight_bits=3, group_size=8, rounding="awq"),),
    "hqq": lambda: (wb.Quantize(weight_bits=3, group_size=8, rounding="hqq"),),
    "nf4": lambda: (wb.Quantize(weight_bits=4, number_format="nf4", group_size=8),),
    "float8": lambda: (wb.Quantize(weight_bits=8, number_format="float8"),),
    "float16": lambda: (wb.Quantize(weight_bits=16, number_format="float16"),),
    "bfloat16": lambda: (wb.Quantize(weight_bits=16, number_format="bfloat16"),),
    "widths by targets": lambda: (
        wb.Quantize(weight_bits=8, targets=("*.0.*",)),
        wb.Quantize(weight_bits=4, targets=("*", "!*.0.*")),
    ),
    "a target that names nothing": lambda: (wb.Quantize(weight_bits=4, targets=("clasifier",)),),
}
AROUND: dict[str, Callable[[], Steps]] = {
    "A8": lambda: (wb.Activations(activation_bits=8),),
    "A6 a tensor": lambda: (
        wb.Activations(activation_bits=6, activation_granularity="tensor", activation_grid="asymmetric"),
    ),
    "A8 static smooth": lambda: (
        wb.Activations(activation_scaling="static", activation_granularity="tensor", smoothing=0.5),
    ),
    "A float8": lambda: (wb.Activations(activation_format="float8"),),
    "KV4": lambda: (wb.KVCache(kv_bits=4),),
    "KV8 g4": lambda: (wb.KVCache(kv_bits=8, kv_group_size=4),),
}
TRAINING: dict[str, Callable[[], Steps]] = {
    "repair": lambda: (wb.Quantize(weight_bits=2), wb.Repair(repair_ratio=0.1)),
    "repair in rounds": lambda: (
        wb.Prune(sparsity=0.6, criterion="wanda"),
        wb.Repair(repair_ratio=0.1, repair_rounds=3),
    ),
    "qat": lambda: (wb.Quantize(weight_bits=3), wb.QAT(qat_steps=3, qat_batch=8)),
    "qat on the task": lambda: (
        wb.Quantize(weight_bits=3, grid="symmetric"),
        wb.QAT(qat_steps=3, qat_batch=8, qat_loss="task"),
    ),
    "distill": lambda: (wb.Prune(sparsity=0.5), wb.Distill(steps=4, **QUICK)),
    "distill states": lambda: (
        wb.LowRank(rank_ratio=0.4, factorization="svd"),
        wb.Distill(steps=3, hidden_weight=1.0, divergence="skewed", **QUICK),
    ),
    "distill in parts with looks": lambda: (
        wb.Prune(sparsity=0.5),
        wb.Distill(steps=4, **{**QUICK, "look_every": 2}, accumulate=2, teacher_cache_mb=8, stop_at=3),
    ),
    "transfer": lambda: (wb.Prune(sparsity=0.5), wb.Transfer(**TAUGHT)),
    "transfer by cosine": lambda: (
        wb.LowRank(rank_ratio=0.4, factorization="svd"),
        wb.Transfer(align="cosine", lora_count=2, align_layers="last", **TAUGHT),
    ),
    "transfer into fewer neurons": lambda: (
        wb.Prune(sparsity=0.25, pattern="neurons"),
        wb.Transfer(align="mse", align_projection="trained", **TAUGHT),
    ),
}
TOGETHER: dict[str, Callable[[], Steps]] = {
    "nothing": lambda: (),
    "all": lambda: (
        wb.LowRank(rank_ratio=0.5, factorization="svd", targets=("*.0.*",)),
        wb.Prune(sparsity=0.3, criterion="wanda"),
        wb.Activations(activation_bits=8),
        wb.Quantize(weight_bits=4),
        wb.Repair(repair_ratio=0.1),
        wb.Transfer(align="none", **TAUGHT),
        wb.QAT(qat_steps=2, qat_batch=8),
        wb.Distill(steps=2, **QUICK),
    ),
    "all but structure, solved": lambda: (
        wb.Prune(sparsity=0.5, criterion="sparsegpt", allocation="sensitivity"),
        wb.Activations(activation_scaling="static", activation_granularity="tensor", smoothing=0.5),
        wb.Quantize(weight_bits=3.5, rounding="gptq"),
        wb.Repair(repair_ratio=0.1),
        wb.Distill(steps=2, **QUICK),
    ),
    "all, and the cache": lambda: (
        wb.Prune(sparsity=0.25, pattern="heads"),
        wb.Prune(sparsity=0.3, criterion="wanda"),
        wb.Activations(activation_bits=8, smoothing=0.5),
        wb.Quantize(weight_bits=4, rounding="gptq"),
        wb.KVCache(kv_bits=8),
        wb.QAT(qat_steps=2, qat_batch=8),
        wb.Distill(steps=2, **QUICK),
    ),
}
PART: dict[str, Callable[[], wb.Step]] = {
    "L": lambda: wb.LowRank(rank_ratio=0.4, factorization="svd"),
    "P": lambda: wb.Prune(sparsity=0.4, criterion="wanda"),
    "S": lambda: wb.Prune(sparsity=0.25, pattern="neurons"),
    "Q": lambda: wb.Quantize(weight_bits=4, grid="symmetric"),
    "A": lambda: wb.Activations(activation_bits=8, smoothing=0.5),
    "K": lambda: wb.KVCache(kv_bits=8),
    "R": lambda: wb.Repair(repair_ratio=0.1),
    "T": lambda: wb.Transfer(align="none", **TAUGHT),
    "W": lambda: wb.QAT(qat_steps=2, qat_batch=8),
    "D": lambda: wb.Distill(steps=2, **QUICK),
}


def pair(first: str, second: str) -> Callable[[], Steps]:
    """Give the two steps of a pair, made when they are asked for."""
    return lambda: (PART[first](), PART[second]())


PAIRS = {f"{first} {second}": pair(first, second) for first, second in itertools.permutations(PART, 2)}
RECIPES = {**LOW_RANK, **PRUNE, **QUANTIZE, **AROUND, **TRAINING, **TOGETHER, **PAIRS}
PARTS_OF = {  # K needs a language model, S neurons; pairs of the slowest models are fewer
    "fashion-vit": "LPSQARD",
    "fashion-cnn": "LPQARD",
    "llama": "LPSQAKRTWD",
    "gpt2": "LPSQAKRTWD",
    "resnet": "LPQARTWD",
    "whisper": "LPQR",
}
ITEMS = {"evaluation_items": 32, "calibration_items": 16, "training_items": 24}


def recipes_of(model: str) -> list[str]:
    """Name the recipes that are recorded of a model: all but some pairs, where those are slow or refused."""
    return [name for name in RECIPES if name not in PAIRS or set(name) <= {*PARTS_OF[model], " "}]


def embedded(name: str) -> Task:
    """Load a model that comes with the workbench, with few items."""
    return load_task(name, offline=True, progress=False, **ITEMS)


def whisper() -> Task:
    """Make a tiny Whisper with 24 noises and their words; no name says in which folder it was."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sound = speech_models.sounds(folder / "d", speech_models.words(24))
        items = {"evaluation_items": 8, "calibration_items": 3, "training_items": 3}
        task = load_task(speech_models.whisper(folder / "m"), sound, progress=False, **items)
    return dataclasses.replace(task, model_name="tiny-whisper", data_name="noises", notes=())


MODELS: dict[str, Callable[[], Task]] = {
    "fashion-vit": lambda: embedded("fashion-vit"),
    "fashion-cnn": lambda: embedded("fashion-cnn"),
    "llama": lambda: structure_models.task_of("grouped"),
    "gpt2": lambda: structure_models.task_of("scaled"),
    "resnet": lambda: structure_models.task_of("bottleneck"),
    "whisper": whisper,
}


def task_named(name: str) -> Task:
    """Make one of the models, always from the same seed."""
    torch.manual_seed(0)
    return MODELS[name]()
