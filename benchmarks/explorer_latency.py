"""Slider to screen, in a real browser: from the mouse event to the predicted and to the first measured point in the DOM.

    python benchmarks/explorer_latency.py [moves]

Each move sets the sparsity slider to a value that has not been measured. `idle`: after the last point has been measured
completely; `busy`: while the last one is still being evaluated. Writes benchmarks/results/explorer-latency.json.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from workbench.bench import versions
from workbench.device import describe, pick

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402
import lab  # noqa: E402

LISTEN = """() => {
  const plot = document.querySelector('.wb-panel .js-plotly-plot');
  window.times = {};
  const one = v => v && v.length ? v[0] : null;
  document.addEventListener('pointermove', () => { if (window.times.armed) { window.times.armed = false; window.times.start = performance.now(); } }, true);
  document.addEventListener('mousemove', () => { if (window.times.armed) { window.times.armed = false; window.times.start = performance.now(); } }, true);
  plot.on('plotly_afterplot', () => {
    const t = window.times, now = performance.now();
    if (!t.start) return;
    const p = one(plot.data[5].x), m = one(plot.data[6].x);
    if (t.predicted === undefined && p !== null && p !== t.oldPredicted) t.predicted = now - t.start;
    if (t.measured === undefined && m !== null && m !== t.oldMeasured) t.measured = now - t.start;
  });
}"""
ARM = """() => {
  const plot = document.querySelector('.wb-panel .js-plotly-plot'), one = v => v && v.length ? v[0] : null;
  window.times = {armed: true, oldPredicted: one(plot.data[5].x), oldMeasured: one(plot.data[6].x)};
}"""


def move(panel: lab.Lab, value: float, *, wait: bool) -> dict[str, float]:
    """Move the handle once and return the milliseconds to what was seen."""
    page, slider = panel.page, panel.slider("sparsity")
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    middle = track["y"] + track["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    page.mouse.down()
    page.evaluate(ARM)
    page.mouse.move(track["x"] + track["width"] * value / 0.99, middle)
    page.mouse.up()
    seen = lab.wait_for(lambda: (t := page.evaluate("window.times")).get("measured") and t, 20, lambda: page.evaluate("window.times"))
    if wait:
        lab.wait_for(lambda: panel.state() == "measured", 30)
        time.sleep(0.3)
    return seen


def summarise(seen: list[dict[str, float]]) -> dict[str, float]:
    """Return medians and 95th percentiles in milliseconds."""
    found: dict[str, float] = {"moves": len(seen)}
    for name in ("predicted", "measured"):
        values = [s[name] for s in seen if name in s]
        found |= {f"{name}_median_ms": round(float(np.median(values)), 1), f"{name}_p95_ms": round(float(np.quantile(values, 0.95)), 1), f"{name}_seen": len(values)}
    return found


def main() -> None:
    """Run and write the results."""
    moves = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    folder = Path(tempfile.mkdtemp(prefix="explorer-"))
    results: dict[str, object] = {
        "what": "milliseconds in headless Chromium, from the slider's mouse event to the point in the DOM; fashion-vit, 2,000 images",
        "command": "python " + " ".join(sys.argv),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(pick("cpu")),
        "versions": versions(),
        "load_average_at_start": os.getloadavg()[0],
    }
    environment = {"XDG_STATE_HOME": str(folder / "state"), "OMP_WAIT_POLICY": "passive"}
    with lab.server(ROOT / "notebooks" / "explore.ipynb", folder, environment) as url, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.find(), args=list(browser.FLAGS))
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        panel = lab.Lab(page)
        panel.open(url)
        start = time.perf_counter()
        panel.run_all()
        panel.panel()
        results["run_all_to_panel_s"] = round(time.perf_counter() - start, 2)
        lab.wait_for(lambda: page.locator(".wb-badge").count() and panel.state().startswith("measured"), 60)
        results["run_all_to_first_point_s"] = round(time.perf_counter() - start, 2)
        panel.settled()
        page.evaluate(LISTEN)
        values = [index / 100 for index in range(5, 95)]
        random.Random(0).shuffle(values)  # noqa: S311  no secret
        idle, busy = values[: max(5, moves // 3)], values[max(5, moves // 3) :][:moves]
        results["idle"] = summarise([move(panel, value, wait=True) for value in idle])
        results["busy"] = summarise([move(panel, value, wait=False) for value in busy])
        results["load_average_at_end"] = os.getloadavg()[0]
        chromium.close()
    text = json.dumps(results, indent=1)
    print(text)
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / "explorer-latency.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
