"""Write a compressed model to files, and load it back with the same outputs, bit for bit.

A directory holds `model.safetensors` (packed), `config.json` (transformers), `compression.json` (how to
unpack it, the recipe, the measurement, versions), a card, and the tokenizer or preprocessor files. It is
written to one side, read back, compared, and only then renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn

from workbench.compress.pruning.surgery import apply_differences, differences
from workbench.compress.pruning.surgery.rebuilding import skeleton_of
from workbench.compress.quantization.kv_cache import cache_format_of, use_cache_of
from workbench.errors import ExportError, ModelError
from workbench.formats.kv_cache import CacheFormat
from workbench.hub.safe_folder import check_folder
from workbench.measure.card import card
from workbench.measure.size import file_content
from workbench.modules.checkpoint_types import main_type, type_words
from workbench.modules.expert_files import blocks_of_experts, separate_tensors
from workbench.modules.experts import experts_in, separate_experts
from workbench.modules.factored import Factors, Form, Repaired, factors_like, form_of, repaired_like
from workbench.modules.input_quantizer import QuantizesInputs, described, from_description
from workbench.modules.layer import replace_module
from workbench.modules.packing import pack_model, unpack_state
from workbench.tasks.registry import KINDS
from workbench.util.quiet import quiet
from workbench.util.side_folders import OLD, clean_side_folders, side_folder
from workbench.zoo.safe_config import check_keys, safe_config, settings

if TYPE_CHECKING:
    from workbench.compress import Compressed
    from workbench.measure.measurement import Measurement
    from workbench.tasks.base import Task

FORMAT = 1
MANIFEST, WEIGHTS = "compression.json", "model.safetensors"
# What config.json says of weights that only the workbench unpacks. transformers refuses quantized weights of
# no method; of a method that it does not know it only warns, and draws the weights at random
OURS = {"written_by": "compression-workbench", "opened_by": "workbench.load(folder)"}


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory that an export must not replace, before any work is done.

    What exports left there whose processes were killed is cleaned first.

    Raises:
        ExportError: it exists and is no export, or is one and `overwrite` is False, or its parent cannot be
            written.
    """
    clean_side_folders(directory.absolute())
    if directory.exists() and not directory.is_dir():
        raise ExportError(f"{str(directory)!r} is a file: give a directory that does not exist yet")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / MANIFEST).is_file():
            raise ExportError(
                f"{str(directory)!r} holds files that are no export of the workbench: give a directory that"
                " does not exist yet"
            )
        if not overwrite:
            raise ExportError(
                f"{str(directory)!r} holds an earlier export: pass overwrite=True (--overwrite) to replace it"
            )
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ExportError(f"cannot write to {str(parent)!r}: choose a directory that you may write to")


def export(
    task: Task, compressed: Compressed, point: Measurement, directory: Path, *, overwrite: bool = False
) -> Path:
    """Write the compressed model to `directory` and return it.

    Raises:
        ExportError: the target is taken or cannot be written; nothing is left half written.

    """
    check_target(directory, overwrite=overwrite)
    directory = directory.absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        side = side_folder(directory)
    except OSError as error:
        raise ExportError(f"cannot write to {str(directory.parent)!r}: {error.strerror}") from None
    try:
        write_files(task, compressed, point, side)
        verify(side, compressed.model)
        side.chmod(0o755)
        put_in_place(side, directory)
    except OSError as error:
        raise ExportError(
            f"cannot write the export {str(directory)!r}: {error.strerror}; nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(side, ignore_errors=True)
    return directory


def write_files(task: Task, compressed: Compressed, point: Measurement, side: Path) -> None:
    """Write every file of an export into the directory `side`, each flushed to disk."""
    packed = pack_model(compressed.model, compressed.layers)
    content = file_content(packed)
    manifest = {
        "format": FORMAT,
        "task": task.kind.name,
        "auto_class": task.kind.auto_class,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        "experts": blocks_of_experts(compressed.model),
        "structure": structure(task, compressed),
        "low_rank": {
            name: form_of(module).to_json()
            for name, module in compressed.model.named_modules()
            if isinstance(module, Factors)
        },
        "repair": {
            name: len(module.first.weight)  # type: ignore[arg-type]
            for name, module in compressed.model.named_modules()
            if isinstance(module, Repaired)
        },
        "activations": {
            name: described(module)
            for name, module in compressed.model.named_modules()
            if isinstance(module, QuantizesInputs)
        },
        "kv_cache": None if (kept := cache_format_of(compressed.model)) is None else asdict(kept),
        "encodings": packed.manifest(),
        "recipe": json.loads(compressed.recipe.to_json()),
        "measurement": json.loads(point.to_json()),
    }
    files = {
        WEIGHTS: content,
        MANIFEST: json.dumps(manifest, indent=1).encode(),
        "config.json": config_file(compressed.model, manifest, {x.dtype for x in packed.tensors.values()}),
        "README.md": card(point).encode(),
    }
    for name, data in {**task.files, **files}.items():
        (side / name).parent.mkdir(exist_ok=True)
        with (side / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def config_file(model: nn.Module, manifest: dict[str, Any], stored: set[torch.dtype]) -> bytes:
    """Return config.json: what transformers opens where it would open it rightly, else what it refuses.

    Of what it opens: where the types in which tensors are `stored` are not all the one that the file names,
    which transformers would cast them to, it names that in which the model runs here.
    """
    config: Any = model.config
    settings = json.loads(config.to_json_string())
    own = ("structure", "low_rank", "repair", "activations", "kv_cache")
    kinds = {about["kind"] for about in manifest["encodings"].values()}
    if kinds - {"dense", "shared"} or any(manifest[key] for key in own):
        settings["quantization_config"] = OURS
    elif {type_words(dtype) for dtype in stored if dtype.is_floating_point} != {settings.get("dtype")}:
        settings["dtype"] = type_words(main_type(model))
    return f"{json.dumps(settings, indent=2, sort_keys=True)}\n".encode()


def structure(task: Task, compressed: Compressed) -> dict[str, dict[str, Any]]:
    """Return the sizes that the configuration alone does not say, by module, where structure was removed (see
    `surgery.differences`); else {}.
    """
    if not any(getattr(step, "structured", False) for step in compressed.recipe):
        return {}
    plain = skeleton_of(task.kind, compressed.model.config, list(experts_in(compressed.model)))
    return differences(compressed.model, plain)


def put_in_place(side: Path, directory: Path) -> None:
    """Rename `side` to `directory`, moving an earlier export out of the way first and deleting it last."""
    old = None
    if directory.exists():
        old = side.with_name(f"{side.name}{OLD}")
        directory.rename(old)
    try:
        side.rename(directory)
    except BaseException:
        if old is not None:
            old.rename(directory)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def verify(directory: Path, model: nn.Module) -> None:
    """Read an export back and compare every tensor with the model in memory, bit for bit.

    Raises:
        ExportError: a tensor differs.

    """
    expected, loaded = model.state_dict(), load(directory).state_dict()
    different = [
        name for name in expected if name not in loaded or not torch.equal(expected[name].cpu(), loaded[name])
    ]
    if different or len(loaded) != len(expected):
        raise ExportError(
            f"the export does not load back as the same model: {', '.join(different[:3]) or 'extra tensors'};"
            " nothing was written"
        )


def load(directory: str | Path, device: str = "cpu") -> nn.Module:
    """Return the model of an export, unpacked, in eval mode on `device`: an ordinary transformers model.

    Raises:
        ExportError: the directory is no export, its format is newer than this version, or a file is damaged.

    """
    directory = Path(directory)
    try:
        check_folder(directory)
        check_keys(directory, settings(directory / "config.json"))
    except ModelError as error:
        raise ExportError(f"the export is not read: {error}") from None
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        content = (directory / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise ExportError(
            f"{str(directory)!r} is no export of the workbench: {Path(error.filename).name} is missing"
        ) from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{str(directory)!r} cannot be read: {error}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ExportError(f"{str(directory)!r} has format {version!r}; this version reads format {FORMAT}")
    missing = [
        key for key in ("weights_sha256", "auto_class", "low_rank", "encodings") if key not in manifest
    ]
    if missing:
        raise ExportError(f"{str(directory)!r} is damaged: {MANIFEST} lacks {', '.join(missing)}")
    if hashlib.sha256(content).hexdigest() != manifest["weights_sha256"]:
        raise ExportError(f"{str(directory / WEIGHTS)!r} is damaged: its sha256 is not the one in {MANIFEST}")
    tensors = separate_tensors(safetensors.torch.load(content), manifest.get("experts", {}))
    state = unpack_state(tensors, manifest["encodings"])
    try:
        model = skeleton(directory, manifest)
        model.load_state_dict(state, strict=True, assign=True)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, ModelError) as error:
        raise ExportError(
            f"{str(directory)!r} is damaged: {MANIFEST}, config.json and {WEIGHTS} do not fit together:"
            f" {' '.join(str(error).split())}"
        ) from None
    model.tie_weights()  # type: ignore[operator]
    generates(model, directory)
    return model.requires_grad_(False).eval().to(device)


def generates(model: nn.Module, directory: Path) -> None:
    """Give a model that generates the settings that came with it (which tokens begin and end, which are never
    written).
    """
    if (directory / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        settings = GenerationConfig.from_pretrained(directory, local_files_only=True)
        model.generation_config = settings  # type: ignore[assignment]


def skeleton(directory: Path, manifest: dict[str, Any]) -> nn.Module:
    """Return the untrained model of an export with its sizes and its low-rank layers in place."""
    import transformers

    classes = {kind.auto_class for kind in KINDS}
    if manifest["auto_class"] not in classes:
        raise ExportError(
            f"{str(directory)!r} asks for the class {manifest['auto_class']!r}; known:"
            f" {', '.join(sorted(classes))}; load the plugin whose kind of task this model"
            " is for"
        )
    config, _ = safe_config(directory)
    if getattr(config, "quantization_config", None) == OURS:
        del config.quantization_config
    with quiet():
        model: nn.Module = getattr(transformers, manifest["auto_class"]).from_config(
            config, trust_remote_code=False
        )
    separate_experts(model, list(manifest.get("experts", {})))
    apply_differences(model, manifest.get("structure", {}))
    for name, form in manifest["low_rank"].items():
        replace_module(model, name, factors_like(model.get_submodule(name), Form.from_json(form)))
    for name, rank in manifest.get("repair", {}).items():
        replace_module(model, name, repaired_like(model.get_submodule(name), rank))
    for name, about in manifest.get("activations", {}).items():
        replace_module(model, name, from_description(model.get_submodule(name), about))
    if manifest.get("kv_cache") is not None:
        use_cache_of(model, CacheFormat(**manifest["kv_cache"]))
    return model
