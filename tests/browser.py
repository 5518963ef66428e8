"""Find a Chromium or Chrome for the tests marked `browser`, or install one.

Run as a script before the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find() -> str | None:
    """Return the path of a browser that is here: the system's, or Playwright's own."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    for place in PLACES:
        if Path(place).exists():
            return place
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def attempt(command: list[str], seconds: int) -> None:
    """Run an installer; whether it worked is seen by looking for the browser again."""
    try:
        subprocess.run(
            command, check=False, timeout=seconds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return


def install() -> None:
    """Try Playwright's own download, then the distribution's package where we may install it."""
    attempt([sys.executable, "-m", "playwright", "install", "chromium"], 300)
    if find() is None and shutil.which("apt-get") and os.geteuid() == 0:
        attempt(["apt-get", "update", "-qq"], 120)
        attempt(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], 600)


def main() -> None:
    """Say which browser the tests will use, or that their part is left out."""
    if find() is None:
        print("no Chromium or Chrome found: trying to install one")
        install()
    print(f"browser for tests: {find() or 'none, so the tests marked `browser` are left out'}")


if __name__ == "__main__":
    main()
