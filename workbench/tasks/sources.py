"""Read raw data by name: files here, files of the hub, and the text and pictures that are always at hand."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import DataError
from workbench.words import nearest

SLICE = "fashion-mnist-slice"
PYTHON_DOCS = "python-docs"
WIKITEXT = "wikitext-2"
WIKITEXT_HUB = "Salesforce/wikitext:wikitext-2-raw-v1"
NAMES = (SLICE, PYTHON_DOCS, WIKITEXT)
NAMES_FOR = {"image classification": (SLICE,), "language modelling": (PYTHON_DOCS, WIKITEXT)}  # by the kind of task
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Raw:
    """Rows as they were found: `datasets.Dataset` by split name."""

    name: str
    splits: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def slice_arrays() -> dict[str, np.ndarray]:
    """Return the embedded slice: evaluation_images [2000, 28, 28] and training_images [5000, 28, 28] uint8, and *_labels [N].

    Raises:
        DataError: the file is not in the package.

    """
    from workbench.zoo.catalogue import EMBEDDED

    path = EMBEDDED / f"{SLICE}.npz"
    if not path.is_file():
        raise DataError(f"the embedded data {path} are missing: install the package again, or make them with workbench.zoo.train")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


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
    if name == WIKITEXT:
        return Raw(WIKITEXT, _hub(WIKITEXT_HUB, offline=offline, progress=progress))
    path = Path(data).expanduser()
    if path.exists():
        return Raw(name, _local(path, progress=progress))
    if path.suffix.lower() in BUILDERS or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"data {name!r}: there is no such file or folder")
    if name.count("/") != 1:
        raise DataError(f"unknown data {name!r}; {nearest(name, NAMES)}; or give a file, a folder of images, or a hub data set as owner/name")
    return Raw(name, _hub(name, offline=offline, progress=progress))


def default_text(*, offline: bool = False, progress: bool = True) -> Raw:
    """Return the text that a language model is measured on when none is named: WikiText-2, else Python's own help pages."""
    try:
        raw = read(WIKITEXT, offline=offline, progress=progress)
    except DataError as error:
        docs = python_docs()
        reason = str(error).removeprefix(f"data {WIKITEXT_HUB!r} ").split("; use --offline")[0]
        return Raw(docs.name, docs.splits, (*docs.notes, f"{PYTHON_DOCS} was used, since {WIKITEXT} {reason}"))
    return Raw(raw.name, raw.splits, (f"{WIKITEXT} from the hub was used, since no data were named",))


def python_docs() -> Raw:
    """Return the help pages inside this Python (`pydoc_data.topics`, PSF licence): about 465,000 characters of prose.

    Raises:
        DataError: this Python was built without them.

    """
    from datasets import Dataset

    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(f"data {PYTHON_DOCS!r}: this Python has no pydoc_data.topics; name other text") from None
    texts = list(dict.fromkeys(topics[key] for key in sorted(topics)))
    version = platform.python_version()
    return Raw(PYTHON_DOCS, {"train": Dataset.from_dict({"text": texts})}, (f"text: help pages of Python {version} (PSF licence)",))


def _given(data: Any) -> Raw:
    """Return a data set that the caller has read already."""
    from datasets import Dataset, DatasetDict

    if isinstance(data, Dataset):
        return Raw("given dataset", {"train": data})
    if isinstance(data, DatasetDict):
        return Raw("given dataset", dict(data))
    raise DataError(f"data must be a name, a path, a datasets.Dataset or a DatasetDict; got {type(data).__name__}")


def _local(path: Path, *, progress: bool) -> dict[str, Any]:
    """Read a file, a folder of images, or a folder with files named after splits (train.csv, test.csv)."""
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise DataError(f"data {str(path)!r}: unknown kind of file {path.suffix!r}; known: {', '.join(BUILDERS)}, or a folder of images")
        if not path.stat().st_size:
            raise DataError(f"data {str(path)!r}: the file is empty")
        return _build(path, {"train": str(path)}, path.suffix.lower(), progress=progress)
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix.lower() in BUILDERS and file.stem in {"train", "test", "validation"}}
    if files:
        suffixes = {file.suffix.lower() for file in files.values()}
        if len(suffixes) > 1:
            raise DataError(f"data {str(path)!r} mix kinds of files: {', '.join(sorted(suffixes))}")
        return _build(path, {split: str(file) for split, file in files.items()}, suffixes.pop(), progress=progress)
    if not any(file.suffix.lower() in PICTURES for file in path.rglob("*")):
        raise DataError(f"data {str(path)!r}: the folder holds neither images nor files such as train.csv and test.csv")
    return _load("imagefolder", str(path), progress=progress, data_dir=str(path))


def _build(path: Path, files: dict[str, str], suffix: str, *, progress: bool) -> dict[str, Any]:
    """Read files of one kind with the builder for it."""
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return _load(BUILDERS[suffix], str(path), progress=progress, data_files=files, **options)


def _hub(name: str, *, offline: bool, progress: bool) -> dict[str, Any]:
    """Read a hub data set, `owner/name` or `owner/name:config`; offline only what is cached. Code is never run."""
    from workbench.zoo import hub

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
        raise DataError(f"data {shown!r} cannot be read: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()
