"""Files of a Debian package, fetched and unpacked into the user's cache without root.

Nothing of it is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

from workbench.errors import DataError
from workbench.hub.made_once import made_once
from workbench.util.folders import cache_folder

SECONDS = 600
PROOF = ".complete"


def unpacked(package: str, *, offline: bool = False) -> Path:
    """Return the folder into which a package was unpacked (its `usr` lies there), fetched on first use.

    Raises:
        DataError: offline and not in the cache, no Debian tools here, or a failed download.

    """
    target = cache_folder("archives") / f"debian-{package}"
    proof = target / PROOF
    if proof.is_file():
        return target
    if offline:
        raise DataError(
            f"data of Debian's {package} are not in the cache, and offline was asked for: run once without"
            " --offline"
        )
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise DataError(
            f"data of Debian's {package} need {' and '.join(missing)}, which this system has not; name other"
            " data (data=...)"
        )
    try:
        made_once(target, proof.is_file, partial(made, package))
    except OSError as error:
        raise DataError(f"data of Debian's {package} cannot be stored in {target.parent}: {error}") from None
    return target


def made(package: str, folder: Path) -> Path:
    """Download and unpack in a folder; return the one within it that has the package's files."""
    command(
        ["apt-get", "download", package],
        folder,
        f"Debian's {package} cannot be fetched (apt-get update may help)",
    )
    packages = sorted(folder.glob("*.deb"))
    if not packages:
        raise DataError(f"Debian's {package} cannot be fetched: apt-get wrote no file")
    unpacked_in = folder / "unpacked"
    command(
        ["dpkg-deb", "-x", str(packages[0]), str(unpacked_in)],
        folder,
        f"Debian's {package} cannot be unpacked",
    )
    (unpacked_in / PROOF).touch()
    return unpacked_in


def command(arguments: list[str], folder: Path, problem: str) -> None:
    """Run a tool in a folder; its last line goes into the error."""
    # Fixed words only
    done = subprocess.run(  # noqa: S603
        arguments, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        said = (
            [line for line in done.stderr.splitlines() if line.startswith("E:")]
            or done.stderr.splitlines()
            or ["no message"]
        )
        raise DataError(f"{problem}: {said[-1][:200]}")
