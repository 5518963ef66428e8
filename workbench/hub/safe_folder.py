"""A model's folder is read from within alone: no link and no entry of an index leads out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from workbench.errors import ModelError

FOLDERS = ("1_Pooling", "additional_chat_templates")  # in a model's, from which something is read
READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".bin", ".gguf")  # what a loader may open


def check_folder(directory: Path) -> None:
    """Refuse a folder whose files lie elsewhere, or whose indexes name files elsewhere.

    Links of the hub's cache, from a snapshot to the files of the same model, are followed.

    Raises:
        ModelError: with the link or the entry, and where it leads.

    """
    home = directory.resolve()
    homes = (home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []))
    for path in readable(directory):
        check_place(path, homes)
        for name in indexed(path) if path.name.endswith(".index.json") else ():
            if not is_inside(name):
                raise ModelError(
                    f"{path} names {name[:80]!r}, which is no file of its folder: it is not read"
                )
            check_place(path.parent / name, homes)


def check_place(path: Path, homes: tuple[Path, ...]) -> None:
    """Refuse a path that leads out of all these folders, or to no file."""
    place = path.resolve()
    if not any(place.is_relative_to(home) for home in homes):
        raise ModelError(
            f"{path} leads out of its folder, to {place}: it is not read; copy the file there if the model"
            " needs it"
        )
    if path.exists() and not path.is_file():
        raise ModelError(f"{path} is no file: it is not read")


def readable(directory: Path) -> Iterator[Path]:
    """Yield what a loader may open, in the folder and in those in it that loaders know."""
    for folder in (directory, *(directory / name for name in FOLDERS)):
        yield from (path for path in sorted(folder.glob("*")) if path.suffix in READ)


def indexed(path: Path) -> list[str]:
    """Return the files that an index of weights names; none of one that is no index: its reader says so."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []
    return sorted({name for name in names if isinstance(name, str)})


def is_inside(name: str) -> bool:
    """Return whether the name of a file, as it may be written on any system, stays in its folder."""
    return all(
        not path.is_absolute() and not path.drive and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    ) and not name.startswith(("/", "\\"))
