"""Whether a checkpoint's tensors are those of the model that its config.json describes: all there, none over,
each of its shape. What transformers would draw at random, leave out or cut is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from workbench.errors import ModelError
from workbench.tasks.base import Kind

# Ends of names that say what a checkpoint is, and what would work with it; the first that fits is told
SIGNS: tuple[tuple[str, str], ...] = (
    (
        r"\.(lora_[AB]|lora_embedding_[AB]|base_layer)(\.|$)|lora_magnitude_vector",
        (
            "they are those of an adapter (LoRA) that is not merged: merge it into its base model (peft:"
            " model.merge_and_unload(), then save_pretrained) and give that"
        ),
    ),
    (
        r"\.(qweight|qzeros|g_idx)$",
        "they are packed by GPTQ or AWQ, and config.json does not say so: give the original weights",
    ),
    (
        r"\.(weight_packed|weight_shape|weight_zero_point)$",
        (
            "they are packed by compressed-tensors, and config.json has no quantization_config: put back the"
            " config.json that belongs to them, or give the original weights"
        ),
    ),
    (
        r"\.(weight_scale|weight_scale_inv|input_scale|output_scale|[kqv]_scale)$",
        (
            "they scale quantized weights, and config.json has no quantization_config: put back the"
            " config.json that belongs to them, or give the original weights"
        ),
    ),
    (
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.",
        (
            "they belong to weights that bitsandbytes has quantized, and config.json does not say so: give"
            " the original weights"
        ),
    ),
    (
        r"\.(scales|biases)$",
        (
            "they scale weights that were packed by MLX or GPTQ, and config.json does not say so: give"
            " the original weights"
        ),
    ),
    (
        r"_(blocks|scales)$",
        "they are packed in MXFP4, and config.json does not say so: give the original weights",
    ),
)
CONSTANTS = r"(^|\.)(position_ids|inv_freq|masked_bias|num_batches_tracked)$"  # worked out, not learned


def check_fit(directory: Path, kind: Kind, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuse a model with a weight that did not come from the files, or files with one that it does not take.

    `info` is what transformers tells of loading it.

    Raises:
        ModelError: names the first tensor, how many there are, and what would work.
    """
    missing = sorted(info["missing_keys"])
    extra = spare(model, info["unexpected_keys"])
    hint = told_by([*extra, *missing])
    if missing:
        why = f"; {hint}" if hint else f"; was it trained for {kind.name}?"
        beside = f" (and holds {count(extra)} that it does not take, such as {extra[0]!r})" if extra else ""
        raise ModelError(
            f"{directory} lacks {len(missing)} weights of the model, the first is {missing[0]!r}{beside}:"
            f" they would be random numbers{why}"
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, given, wanted = mismatched[0]
        raise ModelError(
            f"{directory}: weight {name!r} has shape {list(given)} in the file, {list(wanted)} by config.json"
            f" ({len(mismatched)} such)" + (f"; {hint}" if hint else "")
        )
    if extra:
        why = hint or more_blocks(model, extra) or "config.json describes another model than the one in them"
        raise ModelError(
            f"{directory} holds {count(extra)} that {type(model).__name__} does not take, the first is"
            f" {extra[0]!r}: {why}"
        )


def spare(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of tensors that a model does not take, without those that it works out by itself."""
    worked_out = {name for name, _ in model.named_buffers()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    worked_out |= {name.removeprefix(prefix) for name in worked_out}
    return sorted(name for name in names if name not in worked_out and not re.search(CONSTANTS, name))


def told_by(names: Iterable[str]) -> str:
    """Return a sentence on a checkpoint from the names of its tensors that do not fit, "" if unknown."""
    listed = list(names)
    return next((meaning for sign, meaning in SIGNS if any(re.search(sign, name) for name in listed)), "")


def more_blocks(model: nn.Module, names: Iterable[str]) -> str:
    """Return how many blocks the files and config.json have, where tensors are those of blocks beyond its
    number.
    """
    for name in names:
        for number in re.finditer(r"\.(\d+)\.", name):
            listed, place = name[: number.start()], int(number.group(1))
            try:
                blocks = model.get_submodule(listed)
            except AttributeError:
                continue
            if isinstance(blocks, nn.ModuleList) and place >= len(blocks):
                return (
                    f"config.json describes {len(blocks)} blocks of {listed!r}, and this is one of block"
                    f" {place}: correct the number of layers there"
                )
    return ""


def count(names: list[str]) -> str:
    """Return such as `1 tensor`."""
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"
