"""Read raw data by name: files here, files of the hub, and the text and pictures that are always at hand."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.errors import DataError, ModelError
from workbench.tasks.columns import Raw
from workbench.tasks.fashion_mnist import SLICE
from workbench.tasks.reading import tables
from workbench.tasks.reading.folders import SUFFIXES, picture_folder
from workbench.tasks.utterances import PROMPTS, asterisk_prompts, audio_folder
from workbench.util.text import nearest

PYTHON_DOCS = "python-docs"
WIKITEXT = "wikitext-2"
WIKITEXT_HUB = "Salesforce/wikitext:wikitext-2-raw-v1"
WORDSIM = "wordsim353"
STSB = "sts-b"
STSB_HUB = "sentence-transformers/stsb"
HUB_NAMES = {WIKITEXT: WIKITEXT_HUB, STSB: STSB_HUB}
NAMES = (SLICE, PYTHON_DOCS, WIKITEXT, WORDSIM, STSB, PROMPTS)
BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read(data: str | Path | Any, *, offline: bool = False, progress: bool = True) -> Raw:
    """Return the raw rows of named data.

    Raises:
        DataError: no such data, or data that cannot be read.

    """
    if not isinstance(data, str | Path):
        return _given(data)
    name = str(data)
    if name == PYTHON_DOCS:
        return python_docs()
    if name in FETCHED:
        return FETCHED[name](offline=offline, progress=progress)
    if name in HUB_NAMES:
        return Raw(name, _hub(HUB_NAMES[name], offline=offline, progress=progress))
    path = Path(data).expanduser()
    if path.exists():
        return Raw(name, *_local(path, progress=progress))
    if path.suffix.lower() in BUILDERS or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"data {name!r}: there is no such file or folder")
    if name.count("/") != 1:
        raise DataError(
            f"unknown data {name!r}; {nearest(name, NAMES)}; or give a file, a folder of images, or a hub"
            " data set as owner/name"
        )
    return Raw(name, _hub(name, offline=offline, progress=progress))


def first_of(names: Sequence[str], *, offline: bool = False, progress: bool = True) -> Raw:
    """Return the first of some named data that can be had, with a note that says which and why."""
    refused: list[str] = []
    for name in names[:-1]:
        try:
            raw = read(name, offline=offline, progress=progress)
        except DataError as error:
            reason = str(error).removeprefix(f"data {HUB_NAMES.get(name, name)!r} ")
            refused.append(f"{name} {reason.split('; use --offline')[0]}")
        else:
            return replace(raw, notes=(f"{name} from the hub was used, since no data were named",))
    raw = read(names[-1], offline=offline, progress=progress)
    if not refused:
        return raw
    return replace(raw, notes=(*raw.notes, f"{names[-1]} was used, since {' and '.join(refused)}"))


def wordsim353(*, offline: bool = False, progress: bool = True) -> Raw:
    """Return 353 pairs of words with the mean of 13 to 16 people's scores from 0 to 10 (Finkelstein et al.
    2002), as gensim's tests hold them.

    Raises:
        DataError: not in the cache, and it cannot be fetched.
    """
    from datasets import Dataset

    from workbench.hub import wheel_archive

    try:
        folder = wheel_archive.fetch(wheel_archive.WORDSIM353, offline=offline, progress=progress)
    except ModelError as error:
        raise DataError(str(error).replace("model ", "data ", 1)) from None
    lines = [
        line.split("\t")
        for line in (folder / wheel_archive.WORDSIM353.proof).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    rows = {
        "word1": [line[0] for line in lines],
        "word2": [line[1] for line in lines],
        "score": [float(line[2]) for line in lines],
    }
    return Raw(
        WORDSIM,
        {"train": Dataset.from_dict(rows)},
        ("word pairs: WordSim-353 (Finkelstein et al. 2002), from the test data of gensim 4.4.0",),
    )


def python_docs() -> Raw:
    """Return the help pages inside this Python (`pydoc_data.topics`, PSF licence): about 465,000 characters
    of prose.

    Raises:
        DataError: this Python was built without them.
    """
    from datasets import Dataset

    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            f"data {PYTHON_DOCS!r}: this Python has no pydoc_data.topics; name other text"
        ) from None
    texts = list(dict.fromkeys(topics[key] for key in sorted(topics)))
    version = platform.python_version()
    return Raw(
        PYTHON_DOCS,
        {"train": Dataset.from_dict({"text": texts})},
        (f"text: help pages of Python {version} (PSF licence)",),
    )


def _given(data: Any) -> Raw:
    """Return a data set that the caller has read already."""
    from datasets import Dataset, DatasetDict

    if isinstance(data, Dataset):
        return Raw("given dataset", {"train": data})
    if isinstance(data, DatasetDict):
        return Raw("given dataset", dict(data))
    raise DataError(
        f"data must be a name, a path, a datasets.Dataset or a DatasetDict; got {type(data).__name__}"
    )


def _local(path: Path, *, progress: bool) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Read a file, a folder of images, or a folder with files named after splits (train.csv, test.csv); and
    return notes.
    """
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise DataError(
                f"data {str(path)!r}: unknown kind of file {path.suffix!r}; known: {', '.join(BUILDERS)}, or"
                " a folder of images"
            )
        if not path.stat().st_size:
            raise DataError(f"data {str(path)!r}: the file is empty")
        return _build(path, {"train": path}, progress=progress)
    files = {
        file.stem: file
        for file in sorted(path.iterdir())
        if file.suffix.lower() in BUILDERS and file.stem in {"train", "test", "validation"}
    }
    if files:
        suffixes = {file.suffix.lower() for file in files.values()}
        if len(suffixes) > 1:
            raise DataError(f"data {str(path)!r} mix kinds of files: {', '.join(sorted(suffixes))}")
        return _build(path, files, progress=progress)
    spoken = audio_folder(path)
    if spoken is not None:
        return spoken, ()
    if (seen := picture_folder(path)) is not None:
        return seen
    if not any(file.suffix.lower() in SUFFIXES for file in path.rglob("*")):
        raise DataError(
            f"data {str(path)!r}: the folder holds neither images, nor files such as train.csv and test.csv,"
            " nor a metadata.csv of sound files"
        )
    return _load("imagefolder", str(path), progress=progress, data_dir=str(path)), ()


def _build(
    path: Path, files: Mapping[str, Path], *, progress: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read files of one kind, by split, with the builder for it, each in its own encoding; and return
    notes.
    """
    by_split: dict[str, Any] = {}
    notes: list[str] = []
    for split, file in files.items():
        builder = BUILDERS[file.suffix.lower()]
        told, said = ({}, ()) if builder == "parquet" else tables.options(file, builder)
        loaded = _load(builder, str(path), progress=progress, data_files={split: str(file)}, **told)
        by_split |= loaded
        notes += said
    return by_split, tuple(notes)


def _hub(name: str, *, offline: bool, progress: bool) -> dict[str, Any]:
    """Read a hub data set, `owner/name` or `owner/name:config`; offline only what is cached.

    Code is never run.
    """
    from workbench.hub import hub

    identifier, _, config = name.partition(":")
    try:
        with hub.session(offline=offline, progress=progress, what=f"data {name!r}"):
            return _load(identifier, name, progress=progress, name=config or None)
    except hub.Unreachable as error:
        try:
            with hub.cache_only():
                return _load(identifier, name, progress=False, name=config or None)
        except DataError:
            raise DataError(str(error)) from None


def _load(builder: str, shown: str, *, progress: bool, **options: Any) -> dict[str, Any]:
    """Return the splits that `datasets.load_dataset` makes, or one line of what it says."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    if not progress:
        datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(builder, **options))
    except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
        cause = error.__cause__ or error
        raise DataError(
            f"data {shown!r} cannot be read: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        ) from None
    finally:
        if bars:
            datasets.enable_progress_bars()


FETCHED: Mapping[str, Callable[..., Raw]] = {
    WORDSIM: wordsim353,
    PROMPTS: asterisk_prompts,
}  # from an archive or a package
