"""From Run All to a panel that answers, stage by stage, in JupyterLab or in a bare Python.

    python benchmarks/explorer_startup.py [--kernel-only] [--rounds 3]

The first round warms caches and the ledger and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNEL = """
import json, time
start, laps = time.perf_counter(), {}
def lap(name): laps[name] = round(time.perf_counter() - start, 2)
from widgets import Explorer
lap("imported")
panel = Explorer("fashion-vit")
lap("panel made")
while panel.session.bench is None: time.sleep(0.01)
lap("model loaded")
while panel.session.state.phase != "measured": time.sleep(0.01)
lap("first point")
print(json.dumps(laps))
"""


def kernel(state: Path) -> dict[str, float]:
    """Time the kernel's part alone."""
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_STATE_HOME": str(state)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def browser_rounds(state: Path, rounds: int) -> list[dict[str, float]]:
    """Time Run All in JupyterLab, with a fresh kernel each round."""
    sys.path.insert(0, str(ROOT / "tests"))
    import browser
    import lab
    from playwright.sync_api import sync_playwright

    all_laps = []
    with (
        tempfile.TemporaryDirectory() as folder,
        lab.server(ROOT / "notebooks" / "explore.ipynb", Path(folder), {"XDG_STATE_HOME": str(state)}) as url,
        sync_playwright() as play,
    ):
        chromium = play.chromium.launch(executable_path=browser.find(), args=list(browser.FLAGS))
        opened = lab.Lab(chromium.new_page(viewport={"width": 1280, "height": 800}))
        opened.open(url)
        for index in range(rounds):
            if index:
                opened.restart()
            time.sleep(1)
            start, laps = time.perf_counter(), {}
            opened.run_all()
            for name, place in (
                ("panel in the page", ".wb-panel .noUi-handle"),
                ("plot in the page", ".wb-panel .main-svg"),
                ("model loaded", ".wb-dense b"),
                ("first point", ".wb-measured"),
            ):
                opened.page.wait_for_selector(place, timeout=60_000, state="attached")
                laps[name] = round(time.perf_counter() - start, 2)
            all_laps.append(laps)
        chromium.close()
    return all_laps


def main() -> None:
    """Print the median of each stage in seconds since Run All."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        laps = [kernel(state) for _ in range(asked.rounds + 1)][1:]
        print("kernel alone:", {name: statistics.median(lap[name] for lap in laps) for name in laps[0]})
        if not asked.kernel_only:
            laps = browser_rounds(state, asked.rounds + 1)[1:]
            print("JupyterLab:", {name: statistics.median(lap[name] for lap in laps) for name in laps[0]})


if __name__ == "__main__":
    main()
