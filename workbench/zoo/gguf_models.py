"""Models in one GGUF file, as llama.cpp takes them: dequantized once by transformers' own code, and kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

from workbench.errors import ModelError
from workbench.hub.made_once import made_once
from workbench.hub.wheel_archive import convert_gguf
from workbench.util.folders import cache_folder
from workbench.util.text import file_name, size

ENDING = ".gguf"


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or that a folder without another model holds; None without one.

    Raises:
        ModelError: several, of which one has to be named, or a part of one.
    """
    if path.is_dir():
        files = sorted(path.glob(f"*{ENDING}"))
        if not files or (path / "config.json").is_file() or any(path.glob("*.safetensors")):
            return None
    else:
        files = [path] if path.is_file() and path.suffix == ENDING else []
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise ModelError(f"{path} holds {len(files)} GGUF files ({names}): give the path of one of them")
    if files and "-of-" in files[0].stem:
        raise ModelError(
            f"{files[0]} is a part of a model: join the parts (llama.cpp: llama-gguf-split --merge) and give"
            " the whole file"
        )
    return files[0] if files else None


def converted(file: Path) -> tuple[Path, str]:
    """Return (the folder of a GGUF file's model in float32, what a user must know of it); made at first use.

    Raises:
        ModelError: transformers cannot read the file, or there is no room.
    """
    about = file.stat()
    mark = hashlib.sha256(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_folder("gguf") / f"{file_name(file.stem)}-{mark}"

    def make(folder: Path) -> Path:
        model_folder = folder / "model"
        model_folder.mkdir()
        convert_gguf(file, model_folder)
        return model_folder

    try:
        made_once(target, (target / "config.json").is_file, make)
    except OSError as error:
        raise ModelError(f"{file} cannot be converted in {target.parent}: {error}") from None
    said = (
        f"the weights come from the GGUF file {file.name} ({size(about.st_size)}) and were dequantized by"
        " transformers: what is lost is counted from there, and sizes are against that file"
    )
    return target, said
