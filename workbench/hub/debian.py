"""Files of a Debian package, fetched and unpacked into the user's cache without root.

Nothing of it is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from workbench.errors import DataError

SECONDS = 600
PROOF = ".complete"


def unpacked(package: str, *, offline: bool = False) -> Path:
    """Return the folder into which a package was unpacked (its `usr` lies there), fetched on first use.

    Raises:
        DataError: offline and not in the cache, no Debian tools here, or a failed download.

    """
    from filelock import FileLock

    from workbench.hub.wheel_archive import cache

    target = cache() / f"debian-{package}"
    if (target / PROOF).is_file():
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
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not (target / PROOF).is_file():
                make(package, target)
    except OSError as error:
        raise DataError(f"data of Debian's {package} cannot be stored in {target.parent}: {error}") from None
    return target


def make(package: str, target: Path) -> None:
    """Download and unpack beside `target`, then rename."""
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        command(
            ["apt-get", "download", package],
            folder,
            f"Debian's {package} cannot be fetched (apt-get update may help)",
        )
        found = sorted(folder.glob("*.deb"))
        if not found:
            raise DataError(f"Debian's {package} cannot be fetched: apt-get wrote no file")
        made = folder / "unpacked"
        command(
            ["dpkg-deb", "-x", str(found[0]), str(made)], folder, f"Debian's {package} cannot be unpacked"
        )
        (made / PROOF).touch()
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


def command(words: list[str], folder: Path, problem: str) -> None:
    """Run a tool in a folder; its last line goes into the error."""
    # Fixed words only
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    if done.returncode:
        said = (
            [line for line in done.stderr.splitlines() if line.startswith("E:")]
            or done.stderr.splitlines()
            or ["no message"]
        )
        raise DataError(f"{problem}: {said[-1][:200]}")
