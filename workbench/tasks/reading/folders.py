"""Folders of pictures, a sub-folder a class: names of classes are paths, so that a class may be called
`T-shirt/top`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SUFFIXES = frozenset(
    [
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".avif",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".jp2",
        ".j2k",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    ]
)
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def files(folder: Path) -> Iterator[Path]:
    """Iterate over the files of a folder and of those in it, in order of their paths; hidden ones are left
    out.
    """
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        paths += [Path(place) / name for name in names if not name.startswith((".", "__"))]
    yield from sorted(paths, key=str)


def split_folders(folder: Path, pictures: list[Path]) -> dict[str, list[Path]]:
    """Return the folders of each split: those called train, test and so on, if all that hold pictures are;
    else the folder itself.
    """
    splits: dict[str, list[Path]] = {}
    for name in sorted({path.relative_to(folder).parts[0] for path in pictures}):
        splits.setdefault(SPLITS.get(name.casefold(), ""), []).append(folder / name)
    return {"train": [folder]} if "" in splits else splits


def picture_folder(folder: Path) -> tuple[Mapping[str, Any], tuple[str, ...]] | None:
    """Return the rows of a folder of pictures by split, and notes: columns `image`, and `label` where all
    pictures lie in sub-folders.

    None where there is no picture, or a table says what they are.
    """
    everything = list(files(folder))
    pictures = [path for path in everything if path.suffix.lower() in SUFFIXES]
    if not pictures or any(path.name in TABLES for path in everything):
        return None
    rows_of = {
        split: [
            (path, path.parent.relative_to(place).as_posix())
            for place in places
            for path in pictures
            if place in path.parents
        ]
        for split, places in split_folders(folder, pictures).items()
    }
    names = sorted({name for rows in rows_of.values() for _, name in rows})
    others = Counter(
        path.suffix.lower() or path.name for path in everything if path.suffix.lower() not in SUFFIXES
    )
    listed = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(others.items()))
    notes = (f"files of {folder.name} that are no pictures are left out: {listed}",) if others else ()
    return {split: dataset(rows, names) for split, rows in rows_of.items()}, notes


def dataset(rows: list[tuple[Path, str]], names: list[str]) -> Any:
    """Return pictures with the names of their folders as `datasets` keeps them; without, if some lie in
    none.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    features, columns = {"image": Image()}, {"image": [str(path) for path, _ in rows]}
    if "." in names:
        return Dataset.from_dict(columns, features=Features(features))
    places = {name: place for place, name in enumerate(names)}
    return Dataset.from_dict(
        {**columns, "label": [places[name] for _, name in rows]},
        features=Features({**features, "label": ClassLabel(names=names)}),
    )
