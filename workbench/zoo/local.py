"""Load a model from a folder: config.json, *.safetensors and tokenizer or preprocessor files, and nothing
that can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import DeviceError, ModelError
from workbench.modules.placement import Placement, place
from workbench.tasks.audio import RATE
from workbench.tasks.base import Kind
from workbench.tasks.ctc import FrameRecognition
from workbench.tasks.image_classification import ImageClassification, PlainProcessor
from workbench.tasks.speech_recognition import SpeechRecognition
from workbench.tasks.transcripts import Writing, whisper_writing
from workbench.util.quiet import quiet
from workbench.util.text import one_line

PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "*.bin", "*.pkl")
CONVERT = (
    "from transformers import {auto_class}; model = {auto_class}.from_pretrained('{directory}',"
    " weights_only=True); model.save_pretrained('{directory}')"
)
EXPORTED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "normalizer.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json, after refusing what cannot be run safely or compressed.

    Raises:
        ModelError: no such file, not JSON, code of its own, an adapter, or weights that are quantised
            already.
    """
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
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is not a JSON object: {error}") from None
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
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
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise ModelError(f"{directory} is quantised already (by {method}); give the original weights")
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

    check_weights(directory, kind)
    wanted = parse_dtype(dtype) or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    loader = getattr(transformers, kind.auto_class)
    with quiet():
        try:
            model, info = loader.from_pretrained(
                directory,
                dtype=wanted,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise ModelError(
                f"{directory} cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from None
    _check_complete(directory, kind, info)
    _check_finite(directory, model)
    try:
        return place(model.eval(), torch.device(device), placement)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device {str(device)!r} cannot hold the model: {one_line(error)}") from None


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype from its name.

    Raises:
        ModelError: not a floating-point type.

    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ModelError(
            f"dtype={dtype!r} is not one that a model can be loaded in; use float32, bfloat16 or float16"
        )
    return found


def _check_complete(directory: Path, kind: Kind, info: Mapping[str, Any]) -> None:
    """Refuse a model with any weight that did not come from the files: transformers would have drawn it at
    random.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} weights of the model, the first is {missing[0]!r}: "
            f"they would be random numbers; was it trained for {kind.name}?"
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise ModelError(
            f"{directory}: weight {name!r} has shape {list(found)} in the file, {list(wanted)} by config.json"
            f" ({len(mismatched)} such)"
        )


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
    digits.

    Tied weights are hashed once. Costs about a second a gigabyte.
    """
    digest = hashlib.sha256()
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tuple(tensor.shape))
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if place not in seen or tensor.numel() == 0:
            seen.add(place)
            digest.update(
                memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            )
    return digest.hexdigest()[:16]


def load_processor(directory: Path, kind: Kind, config: Mapping[str, Any]) -> Any:
    """Return the tokenizer or image processor of a folder (of a speech model, its `Writing`).

    An image model without preprocessor_config.json gets a `PlainProcessor`.

    Raises:
        ModelError: no tokenizer files, files that cannot be read, or ones that need code of their own.

    """
    options: dict[str, Any] = {}
    images = isinstance(kind, ImageClassification)
    if images:
        if not (directory / "preprocessor_config.json").is_file():
            return _plain_processor(config)
        from transformers.models.auto.image_processing_auto import (
            AutoImageProcessor,  # at the top it may ask for torchvision
        )

        loader: Any = AutoImageProcessor
        options["backend"] = "pil"  # the same pixels with and without torchvision
    else:
        from transformers import AutoTokenizer

        loader = AutoTokenizer
        if not any(
            (directory / name).is_file()
            for name in EXPORTED_FILES
            if name.startswith(("tokenizer.", "vocab", "spiece", "sentencepiece"))
        ):
            raise ModelError(
                f"{directory} has no tokenizer (tokenizer.json, or vocab.txt, or tokenizer.model);"
                f" {kind.name} needs one"
            )
    if isinstance(kind, SpeechRecognition):
        return _writing(directory, kind, config, loader)
    with quiet():
        try:
            processor = loader.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True, **options
            )
        except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise ModelError(
                f"{directory}: its {'preprocessor' if images else 'tokenizer'} "
                f"cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from None
    return processor


def _writing(directory: Path, kind: SpeechRecognition, config: Mapping[str, Any], loader: Any) -> Writing:
    """Return how a speech model hears and writes: its feature extractor, its tokenizer and its special
    tokens.
    """
    from transformers import AutoFeatureExtractor

    if not (directory / "preprocessor_config.json").is_file():
        raise ModelError(
            f"{directory} has no preprocessor_config.json, which says what a speech model makes of sound"
        )
    with quiet():
        try:
            tokenizer = loader.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            features = AutoFeatureExtractor.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise ModelError(
                f"{directory}: its tokenizer or feature extractor cannot be loaded: {type(error).__name__}:"
                f" {one_line(error)}"
            ) from None
    if not isinstance(kind, FrameRecognition):
        return whisper_writing(directory, tokenizer, features)
    if features.model_input_names[0] != "input_values" or features.sampling_rate != RATE:
        raise ModelError(
            f"{directory} reads {features.model_input_names[0]} at {features.sampling_rate} Hz; of CTC models"
            f" only those that read the wave at {RATE} Hz are built"
        )
    return Writing(tokenizer, features, end=int(config.get("pad_token_id") or 0))


def set_padding(model: nn.Module, tokenizer: Any) -> None:
    """Agree on a padding token for texts of different lengths: the tokenizer's, else its end of text.

    Raises:
        ModelError: the tokenizer has neither.

    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has no padding token and no end-of-text token; set pad_token in"
                " tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _plain_processor(config: Mapping[str, Any]) -> PlainProcessor:
    """Return the processor of a model that says nothing but its image size."""
    given = config.get("image_size") or 224
    height, width = given if isinstance(given, list | tuple) else (given, given)
    return PlainProcessor(height=int(height), width=int(width))


def exported_files(directory: Path) -> dict[str, bytes]:
    """Return the tokenizer and preprocessor files that an export takes along, by file name."""
    return {name: (directory / name).read_bytes() for name in EXPORTED_FILES if (directory / name).is_file()}
