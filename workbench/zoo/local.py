"""Load a model from a folder: config.json, *.safetensors and tokenizer or preprocessor files, and nothing
that can run code.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import DeviceError, ModelError
from workbench.hub.safe_folder import check_folder
from workbench.modules.checkpoint_types import TOTAL, checkpoint_types, note_types
from workbench.modules.experts import separate_experts
from workbench.modules.placement import Placement, place
from workbench.tasks.base import Kind
from workbench.util.quiet import quiet
from workbench.util.text import one_line
from workbench.zoo.checkpoint_fit import check_fit
from workbench.zoo.quantized import check_readable, dequantized, loading_options, method_of
from workbench.zoo.safe_config import check_keys, kept_at_home

PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "*.bin", "*.pkl")
CONVERT = (
    "from transformers import {auto_class}; model = {auto_class}.from_pretrained('{directory}',"
    " weights_only=True); model.save_pretrained('{directory}')"
)


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json, after refusing what cannot be run safely or compressed.

    Raises:
        ModelError: no such file, not JSON, code of its own, an adapter, or weights that are quantised
            already in a way that cannot be undone here.
    """
    check_folder(directory)
    path = directory / "config.json"
    if not path.is_file():
        present = (
            ", ".join(sorted(file.name for file in directory.glob("*"))[:8])
            if directory.is_dir()
            else "no such folder"
        )
        raise ModelError(
            f"{directory} has no config.json (there: {present or 'nothing'}); a transformers model folder is"
            " needed"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a JSON object: {error}") from None
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ModelError(
                f"{directory} needs remote code (auto_map in config.json, model type {model_type!r}); the"
                " workbench never runs it"
            )
        raise ModelError(f"{path}: model type {model_type!r} is unknown to the installed transformers")
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory} holds an adapter (adapter_config.json); merge it into its base model and give that"
        )
    check_readable(directory, config)
    check_keys(directory, config)
    return dict(config)


def check_weights(directory: Path, kind: Kind) -> list[Path]:
    """Return the safetensors files of a folder, after opening each; never reads a pickle.

    Raises:
        ModelError: only a pickle is there, a file is missing, or one is truncated or no safetensors file.

    """
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            files = sorted(
                {
                    directory / name
                    for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                }
            )
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index} is not an index of safetensors files") from None
    else:
        raise ModelError(
            no_weights(
                directory,
                kind,
                [file.name for pattern in PICKLES for file in sorted(directory.glob(pattern))],
            )
        )
    for file in files:
        if not file.is_file():
            raise ModelError(f"{directory} is incomplete: {file.name} is missing")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{file} is damaged or truncated ({error}); fetch it again") from None
    return files


def no_weights(directory: Path | str, kind: Kind, pickles: list[str]) -> str:
    """Return why a model without safetensors is refused, and how to convert the pickle that is there
    instead.
    """
    if not pickles:
        return (
            f"{directory} holds no weights: model.safetensors (or model.safetensors.index.json and its parts)"
            " is missing"
        )
    script = CONVERT.format(auto_class=kind.auto_class, directory=directory)
    return (
        f"{directory} holds its weights only as a pickle ({pickles[0]}), which can run code when loaded, so"
        f" it is refused; if you trust it, convert it once: {script}"
    )


def load_model(
    directory: Path,
    kind: Kind,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    placement: Placement = "device",
) -> nn.Module:
    """Return the model of a folder, in eval mode on `device` or placed as `workbench.modules.placement` says,
    every weight read from the files and finite.

    `dtype` None means float32 on a CPU (where lower precision is slower) and the checkpoint's own elsewhere.

    Raises:
        ModelError: weights missing, of another shape, damaged or not finite, or a class that needs a package
            not here.
        DeviceError: the device is not here, or cannot hold the model.
    """
    import transformers

    files, config = check_weights(directory, kind), read_config(directory)
    wanted = parse_dtype(dtype) or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    loader = getattr(transformers, kind.auto_class)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that options of a quantized checkpoint were given
        try:
            model, info = loader.from_pretrained(
                directory,
                dtype=wanted,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **loading_options(config),
                **kept_at_home(directory),
            )
        except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise ModelError(
                f"{directory} cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from None
    model = dequantized(model, config)
    check_fit(directory, kind, model, info)
    _check_finite(directory, model)
    separate_experts(model)
    note_types(model, files, quantized=bool(method_of(config)))
    try:
        return place(model.eval(), torch.device(device), placement)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device {str(device)!r} cannot hold the model: {one_line(error)}") from None


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype from its name.

    Raises:
        ModelError: not a floating-point type.

    """
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(parsed, torch.dtype) and parsed.is_floating_point):
        raise ModelError(
            f"dtype={dtype!r} is not one that a model can be loaded in; use float32, bfloat16 or float16"
        )
    return parsed


def _check_finite(directory: Path, model: nn.Module) -> None:
    """Refuse NaN and infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{directory}: weight {name!r} has {bad} values that are NaN or infinite; the checkpoint is"
                " damaged"
            )


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the names, shapes, dtypes and bytes of all weights and saved buffers: 16 hexadecimal
    digits. A model that its file holds in other types is another one.

    Tied weights are hashed once. Costs about a second a gigabyte.
    """
    digest = hashlib.sha256()
    if TOTAL in vars(model):
        digest.update(f"from {vars(model)[TOTAL]} bytes".encode())
    seen: set[tuple[int, tuple[int, ...]]] = set()
    types = checkpoint_types(model)
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tuple(tensor.shape))
        in_file = types.get(name, tensor.dtype)
        kinds = f"{tensor.dtype}" if in_file == tensor.dtype else f"{tensor.dtype} of {in_file}"
        digest.update(f"{name} {list(tensor.shape)} {kinds}".encode())
        if place not in seen or tensor.numel() == 0:
            seen.add(place)
            digest.update(
                memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            )
    return digest.hexdigest()[:16]


def exported_files(directory: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return the files of these names that a folder has: what an export takes along, by file name."""
    return {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
