"""How much of a model has been fetched so far, read from the folders that a download fills.

Nothing is asked of the network.
"""

from __future__ import annotations

from pathlib import Path

from workbench.hub import hub, wheel_archive
from workbench.zoo.catalogue import find


def arrived_bytes(name: str) -> int:
    """Return the bytes on this disk of a model that comes from the hub or an archive, unfinished files
    included; 0 for any other.
    """
    listed = find(name)
    repository = (
        listed.hub
        if listed
        else name
        if name.count("/") == 1 and not name.startswith((".", "/", "~"))
        else None
    )
    folders = (
        [] if repository is None else [hub.cache() / f"models--{repository.replace('/', '--')}" / "blobs"]
    )
    if listed is not None and listed.archive is not None:
        converted = listed.archive.directory()
        folders += [converted, *wheel_archive.cache().glob(f".{converted.name}.*")]
    return sum(content(folder) for folder in folders)


def content(folder: Path) -> int:
    """Return the bytes of the files below a folder, 0 if there is none; files may come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
