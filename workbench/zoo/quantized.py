"""Checkpoints whose weights are quantized already: dequantized by transformers' own code where that can, and
said to be what they are; else refused with what would work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from workbench.errors import ModelError

# What transformers dequantizes while it loads, and the package that this needs besides
WHILE_LOADING = {"fp8": "accelerate", "mxfp4": "accelerate", "compressed-tensors": "compressed-tensors"}
AFTERWARDS = {"bitsandbytes": "bitsandbytes"}  # what its models do when they are asked to


def method_of(config: Mapping[str, Any]) -> str:
    """Return how config.json says that the weights are quantized, "" where it does not."""
    nested = config.get("text_config")
    for values in (config, nested if isinstance(nested, Mapping) else {}):
        given = values.get("quantization_config") or values.get("compression_config")
        if given:
            said = given.get("quant_method") if isinstance(given, Mapping) else None
            return str(said or ("bitsandbytes" if loads_in_bits(given) else "an unnamed method"))
        if isinstance(values.get("quantization"), Mapping) and "bits" in values["quantization"]:
            return "MLX"
    return ""


def loads_in_bits(given: Any) -> bool:
    """Return whether a quantization_config is one of bitsandbytes that does not name it."""
    return isinstance(given, Mapping) and bool(given.get("load_in_8bit") or given.get("load_in_4bit"))


def check_readable(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse quantized weights that cannot be dequantized here.

    Raises:
        ModelError: by this method never, or not without a package that is not installed.
    """
    if (directory / "compression.json").is_file():
        raise ModelError(
            f"{directory} is an export of the workbench, compressed already:"
            f" workbench.load({str(directory)!r}) opens it; give the original weights to compress them anew"
        )
    method = method_of(config)
    if not method:
        return
    package = {**WHILE_LOADING, **AFTERWARDS}.get(method)
    if package is None:
        raise ModelError(
            f"{directory} is quantised already (by {method}); give the original weights: transformers"
            f" dequantizes {', '.join([*WHILE_LOADING, *AFTERWARDS])} alone"
        )
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ModelError(
            f"{directory} is quantised already (by {method}); to dequantize it, install what reads it: pip"
            f" install {package}; or give the original weights"
        )


def loading_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which transformers' loader dequantizes, {} for other weights."""
    method = method_of(config)
    if method not in WHILE_LOADING:
        return {}
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return {"quantization_config": AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)}


def dequantized(model: Any, config: Mapping[str, Any]) -> nn.Module:
    """Return a model that was loaded from quantized weights as an ordinary one.

    Raises:
        ModelError: a weight is still packed.
    """
    if method_of(config) in AFTERWARDS:
        model = model.dequantize()
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    packed = [name for name, value in model.named_parameters() if not value.is_floating_point()]
    if packed:
        raise ModelError(f"weight {packed[0]!r} is still packed after dequantizing ({len(packed)} such)")
    plain: nn.Module = model
    return plain


def note(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on weights that were dequantized, none for others."""
    method = method_of(config)
    said = (
        f"the checkpoint is quantized already (by {method}) and was dequantized by transformers: what is lost"
        " is counted from there, and sizes are against its own file"
    )
    return (said,) if method else ()
