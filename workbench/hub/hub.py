"""Fetch from a model hub into its own cache: only safe files, verified, and in one clear line when it cannot
be reached.

`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME` and `HF_HUB_CACHE` are read when a function is called. A download
whose connection breaks goes on where it stopped; after a killed process, finished files are kept and the one
under way starts over (the hub library decides both).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from workbench.errors import ModelError

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
IGNORED = (
    "[!1]*/*",
    "consolidated*",
)  # other formats in sub-folders (but 1_Pooling/config.json), and second copies of the weights
PROBE_SECONDS = 5.0


class Unreachable(ModelError):  # noqa: N818  a fact about the network
    """The hub cannot be reached, or may not be, and what was asked for is not in the cache.

    `reason` says it in a few words.
    """

    def __init__(self, what: str, reason: str, advice: str) -> None:
        """Make one line of what was wanted, why it cannot be had, and what would work."""
        super().__init__(f"{what} cannot be fetched: {reason}; {advice}")
        self.reason = reason


def endpoint() -> str:
    """Return the address of the hub: HF_ENDPOINT, or the library's default."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def cache() -> Path:
    """Return the folder of the hub's cache."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def forced_offline() -> bool:
    """Return whether the environment says to stay offline."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def cached(repository: str) -> bool:
    """Return whether a model's weights are in the cache."""
    return any(cache().glob(f"models--{repository.replace('/', '--')}/snapshots/*/*.safetensors"))


def snapshot(
    repository: str, *, patterns: Sequence[str] = PATTERNS, offline: bool = False, progress: bool = True
) -> Path:
    """Return the folder with a model's files, fetched or already cached, each large one checked against its
    sha256.

    Raises:
        Unreachable: no connection (or `offline`) and not in the cache.
        ModelError: no such model, one that needs a token, a failed or damaged download.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(
        snapshot_download,
        repository,
        allow_patterns=list(patterns),
        ignore_patterns=list(IGNORED),
        endpoint=endpoint(),
        cache_dir=cache(),
    )
    what = f"model {repository!r}"
    try:
        with session(offline=offline, progress=progress, what=what):
            folder = Path(fetch())
    except Unreachable as error:
        try:
            folder = Path(fetch(local_files_only=True))
        except Exception:  # noqa: BLE001  libraries raise what they like; the user sees one line
            raise error from None
    except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
        raise ModelError(f"{what} cannot be fetched from {endpoint()}: {_reason(error)}") from None
    verify(folder, what)
    return folder


def verify(folder: Path, what: str) -> None:
    """Check each file that the cache names by its sha256 (all large ones); one that differs is deleted.

    Where the cache has no links (Windows without developer mode) nothing is checked here.

    Raises:
        ModelError: a file that is not what the hub promised.

    """
    for path in sorted(folder.glob("*")):
        blob = path.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", blob.name) and file_sha256(blob) != blob.name:
            blob.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise ModelError(
                f"{what}: {path.name} is damaged (its sha256 is not {blob.name[:12]}...); it was deleted, so"
                " the next run fetches it again"
            )


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_names(repository: str) -> tuple[list[str], str]:
    """Return (the names of all files of a model on the hub, why they cannot be listed, "" if they can)."""
    from huggingface_hub import HfApi

    try:
        return list(HfApi(endpoint=endpoint()).list_repo_files(repository)), ""
    except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
        return [], f"; its files could not be listed: {_reason(error)}"


@contextmanager
def session(*, offline: bool, progress: bool, what: str) -> Iterator[None]:
    """Probe the hub, then let the caller use it with or without progress bars.

    Raises:
        Unreachable: offline is asked for, or nothing answers within `PROBE_SECONDS`.

    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if offline or forced_offline():
        raise Unreachable(
            what,
            "offline was asked for, and it is not in the cache",
            "run once without --offline, or give a local directory",
        )
    _probe(what)
    bars = not are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            enable_progress_bars()


@contextmanager
def cache_only() -> Iterator[None]:
    """Keep `datasets` off the network.

    It and the hub library note this choice at import, so it is set and put back.
    """
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _probe(what: str) -> None:
    """Raise `Unreachable` unless the hub answers anything at all, soon."""
    from huggingface_hub import get_session

    address = endpoint()
    try:
        get_session().head(address, timeout=PROBE_SECONDS)
    except Exception as error:  # noqa: BLE001  libraries raise what they like; the user sees one line
        raise Unreachable(
            what,
            f"the hub {address} cannot be reached ({_reason(error)})",
            "use --offline if it is cached, or give a local directory",
        ) from None


def _reason(error: BaseException) -> str:
    """Return the reason of an error in a few words."""
    names = {
        "RepositoryNotFoundError": "there is no such model, or it is private and needs a token (HF_TOKEN)",
        "GatedRepoError": "its owner asks for an agreement first: accept it on the hub and set HF_TOKEN",
        "RevisionNotFoundError": "it has no main revision",
    }
    return names.get(type(error).__name__) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
