"""What a model's configuration may ask of transformers: nothing that fetches or runs code.

transformers takes any key of config.json. Some of them make it fetch kernels or classes from a hub, also
where only a folder is given, and some lead to files elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import ModelError
from workbench.util.library_internals import forget_kernels, kernels_of
from workbench.util.quiet import quiet
from workbench.util.text import kind_and_words

BUILT_IN = {"eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"}  # of transformers and torch alone
# By other packages, or where those are not there by code from a hub
ELSEWHERE = {"flash_attention_2", "flash_attention_3", "flash_attention_4", "deepgemm", "sonicmoe"}
CHOICES = ("attn_implementation", "experts_implementation")
TIMM = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
OTHERS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def check_keys(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder whose configurations ask for code, or for files elsewhere.

    Raises:
        ModelError: with the key and its value.

    """
    for key, value in asked_for(config):
        if value not in BUILT_IN | ELSEWHERE:
            raise refused(directory, key, value, "is code from a hub")
    for key in ("attribute_map", "transformers_weights"):
        if key in config and config[key] != "model.safetensors":
            raise refused(directory, key, config[key], "gives other names to what is loaded")
    check_timm(directory, config)
    for name in (*OTHERS, "audio_tokenizer_config.json"):
        content = settings(directory / name)
        if "audio_tokenizer" in content or (content and name not in OTHERS):
            raise refused(directory, "audio_tokenizer", content, "is another model", name)


def check_timm(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model of timm that is made from other files than those of its folder."""
    if config.get("model_type") != "timm_wrapper":
        return
    name, given = str(config.get("architecture", "")), config.get("model_args") or {}
    if {"/", ":"} & set(name):
        raise refused(directory, "architecture", name, "is on a hub")
    if bad := TIMM & set(given):
        raise refused(directory, "model_args", sorted(bad), "loads other files")


def refused(directory: Path, key: str, value: Any, why: str, file: str = "config.json") -> ModelError:
    """Return the error of a key that is not followed."""
    return ModelError(
        f"{directory / file} asks for {key}={str(value)[:80]!r}, which {why}: the workbench never fetches or"
        " runs it; remove that key if the model is right without it"
    )


def asked_for(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, value) of everything in a configuration that picks an implementation, however deep."""
    name = key.strip("_").removesuffix("_internal")
    if isinstance(value, Mapping):
        for inner_key, entry in value.items():
            yield from asked_for(entry, key if name in CHOICES else str(inner_key))
    elif isinstance(value, list):
        for entry in value:
            yield from asked_for(entry, key)
    elif name in CHOICES and value is not None:
        yield key, str(value)


def settings(path: Path) -> dict[str, Any]:
    """Return the content of a file of settings, {} where it is not there or no table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def safe_config(directory: Path) -> tuple[Any, bool]:
    """Return transformers' configuration of a folder without what would fetch kernels, and whether there was
    any, whichever key says so.

    Raises:
        ModelError: its values are none that its model type takes.

    """
    from transformers import AutoConfig

    with quiet():
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise ModelError(
                f"{directory / 'config.json'} does not describe a model: {kind_and_words(error)}"
            ) from None
    asked = not set(kernels_of(config)) <= BUILT_IN
    if asked:
        forget_kernels(config)
    return config, asked


def kept_at_home(directory: Path) -> dict[str, Any]:
    """Return the arguments with which a loader fetches no kernels, {} where none are asked for."""
    config, asked = safe_config(directory)
    return {"config": config} if asked else {}


def notes(directory: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the notes on what a folder asks for and does not get."""
    listed = [
        f"config.json asks for {key}={value!r}, which is left out: transformers' own is used"
        for key, value in dict.fromkeys(asked_for(config))
        if value in ELSEWHERE
    ]
    files = [name for name in ("config.json", *OTHERS) if settings(directory / name).get("auto_map")]
    if files:
        listed.append(
            f"the model comes with code of its own (auto_map in {', '.join(files)}), which is not run:"
            " transformers' own classes are used"
        )
    return tuple(listed)
