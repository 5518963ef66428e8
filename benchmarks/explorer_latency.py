"""Slider to screen, in a real browser: from the mouse event to the predicted and to the first measured point
in the DOM.

    python benchmarks/explorer_latency.py --moves 50
    python benchmarks/explorer_latency.py --moves 50 --points 5000
    python benchmarks/explorer_latency.py --moves 5 --storm 30

Each move sets the sparsity slider to a value that has not been measured. `idle`: after the last point has
been measured completely; `busy`: while the last one is still being evaluated. `--points` fills the ledger
first: a few recipes are really measured, and their rows are copied under other recipes and keys with sizes
and qualities moved a little; they have the shape of real rows and are no results, and the file is thrown
away. `--storm` moves a slider at random for so many seconds; two seconds after the end, everything that is
shown must belong to the last position. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
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

import workbench as wb
from workbench.measure.measurement import Measurement
from workbench.util.device import describe, pick
from workbench.util.environment import versions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402
import lab  # noqa: E402

LISTEN = """() => {
  const plot = document.querySelector('.wb-panel .js-plotly-plot');
  window.times = {};
  const one = v => v && v.length ? v[0] : null;
  const begin = () => {
    if (window.times.armed) { window.times.armed = false; window.times.start = performance.now(); }
  };
  document.addEventListener('pointermove', begin, true);
  document.addEventListener('mousemove', begin, true);
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
    seen = lab.wait_for(
        lambda: (t := page.evaluate("window.times")).get("measured") and t,
        20,
        lambda: page.evaluate("window.times"),
    )
    if wait:
        lab.wait_for(lambda: panel.state() == "measured", 30)
        time.sleep(0.3)
    return seen


def summarise(seen: list[dict[str, float]]) -> dict[str, float]:
    """Return medians and 95th percentiles in milliseconds."""
    summary: dict[str, float] = {"moves": len(seen)}
    for name in ("predicted", "measured"):
        values = [s[name] for s in seen if name in s]
        summary |= {
            f"{name}_median_ms": round(float(np.median(values)), 1),
            f"{name}_p95_ms": round(float(np.quantile(values, 0.95)), 1),
            f"{name}_seen": len(values),
        }
    return summary


def fill(ledger: Path, points: int) -> None:
    """Fill a ledger with `points` rows of the shape of real ones."""
    bench = wb.Bench("fashion-vit", ledger=ledger, device="cpu", offline=True, progress=False)
    recipes = [
        wb.Recipe(),
        wb.Recipe(wb.Prune(sparsity=0.5)),
        wb.Recipe(wb.Quantize(weight_bits=4)),
        wb.Recipe(wb.Prune(sparsity=0.3), wb.Quantize(weight_bits=6)),
    ]
    measured = [bench.measure(recipe) for recipe in recipes][1:]
    chance = random.Random(1)  # noqa: S311  no secret
    while len(bench.ledger) < points:
        recipe = wb.Recipe(
            wb.Prune(sparsity=round(chance.uniform(0.01, 0.98), 4)),
            wb.Quantize(weight_bits=chance.randint(2, 8)),
        )
        bench.ledger.add(copied(chance.choice(measured), recipe, bench.context.key(recipe), chance))


def copied(row: Measurement, recipe: wb.Recipe, key: str, chance: random.Random) -> Measurement:
    """Return a row under another recipe and key, its size and quality moved."""
    share, lost = chance.uniform(0.3, 2.0), chance.uniform(0.0, 0.3)
    sizes = dataclasses.replace(row.sizes, file_bytes=int(row.sizes.file_bytes * share))
    moved = [
        dataclasses.replace(
            q, compressed=q.compressed.mapped(lambda x: x - lost), change=q.change.mapped(lambda x: x - lost)
        )
        for q in row.quality[:1]
    ]
    return dataclasses.replace(row, recipe=recipe, key=key, sizes=sizes, quality=(*moved, *row.quality[1:]))


SHOWN = """() => {
  const plot = document.querySelector('.wb-panel .js-plotly-plot');
  const list = v => Array.from(v && v._inputArray ? v._inputArray : v || []);
  return {line: document.querySelector('.wb-line code').innerText,
          badge: document.querySelector('.wb-badge').innerText,
          predicted: list(plot.data[5].x), measured: list(plot.data[6].x)};
}"""


def storm(panel: lab.Lab, seconds: float, ledger: Path) -> dict[str, object]:
    """Move at random for so long.

    Two seconds after the end, compare what is shown with the last position and its point.
    """
    page, slider = panel.page, panel.slider("sparsity")
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    middle, chance, moves = track["y"] + track["height"] / 2, random.Random(2), 0  # noqa: S311  no secret
    page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    page.mouse.down()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page.mouse.move(track["x"] + track["width"] * chance.uniform(0.03, 0.97), middle)
        moves += 1
        time.sleep(0.03)
    page.mouse.up()
    ended = time.monotonic()
    time.sleep(2)
    value, shown = panel.readout("sparsity"), page.evaluate(SHOWN)
    recipe = wb.Recipe(wb.Prune(sparsity=value))
    assert shown["line"] == repr(recipe), f"the slider is at {value:g}, the line shows {shown['line']}"
    after_2_s = shown["badge"]
    lab.wait_for(lambda: page.evaluate(SHOWN)["badge"] == "measured", 10)
    complete, last = time.monotonic() - ended, page.evaluate(SHOWN)
    point = next(row for row in wb.Ledger(ledger).rows() if row.recipe == recipe)
    place = [point.sizes.file_bytes / 1e6]
    assert shown["measured"] in (
        [],
        place,
    ), f"two seconds after the storm the plot shows {shown['measured']}, the point has {place}"
    assert (last["measured"], last["predicted"]) == (place, [])
    time.sleep(1)
    assert page.evaluate(SHOWN) == last, "something arrived later"
    return {
        "seconds": seconds,
        "moves": moves,
        "current_after_2_s": True,
        "badge_after_2_s": after_2_s,
        "complete_after_s": round(complete, 2),
    }


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=50, help="with a third as many on an idle kernel")
    parser.add_argument("--points", type=int, default=0, help="rows in the ledger before the start")
    parser.add_argument("--storm", type=float, default=0.0, help="seconds of random moves at the end")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run and write the results."""
    given = options()
    moves, folder = given.moves, Path(tempfile.mkdtemp(prefix="explorer-"))
    ledger = folder / "points.journal"
    results: dict[str, object] = {
        "what": (
            "milliseconds in headless Chromium, from the slider's mouse event to the point in the DOM;"
            " fashion-vit, 2,000 images"
        ),
        "command": "python " + " ".join(sys.argv),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(pick("cpu")),
        "versions": versions(),
        "load_average_at_start": os.getloadavg()[0],
    }
    if given.points:
        fill(ledger, given.points)
        results["points"] = (
            f"{given.points} rows in the ledger: copies of really measured ones under other recipes, sizes"
            " and qualities moved; for timing only"
        )
    environment = {"XDG_STATE_HOME": str(folder / "state"), "OMP_WAIT_POLICY": "passive"}
    with (
        lab.server(
            ROOT / "notebooks" / "explore.ipynb",
            folder,
            environment,
            {"ledger = None": f"ledger = {str(ledger)!r}"},
        ) as url,
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=browser.find(), args=list(browser.FLAGS))
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        panel = lab.Lab(page)
        panel.open(url)
        start = time.perf_counter()
        panel.run_all()
        panel.panel()
        results["run_all_to_panel_s"] = round(time.perf_counter() - start, 2)
        lab.wait_for(
            lambda: page.locator(".wb-badge").count() and panel.state().startswith("measured"),
            60,
            panel.state,
        )
        results["run_all_to_first_point_s"] = round(time.perf_counter() - start, 2)
        panel.settled()
        page.evaluate(LISTEN)
        values = [index / 100 for index in range(5, 95)]
        random.Random(0).shuffle(values)  # noqa: S311  no secret
        idle, busy = values[: max(5, moves // 3)], values[max(5, moves // 3) :][:moves]
        results["idle"] = summarise([move(panel, value, wait=True) for value in idle])
        results["busy"] = summarise([move(panel, value, wait=False) for value in busy])
        if given.storm:
            results["storm"] = storm(panel, given.storm, ledger)
        results["load_average_at_end"] = os.getloadavg()[0]
        chromium.close()
    write(
        results,
        given.out
        or ROOT
        / "benchmarks"
        / "results"
        / f"explorer-latency{'-points' if given.points else ''}{'-storm' if given.storm else ''}.json",
    )


def write(results: dict[str, object], path: Path) -> None:
    """Print the results and keep them."""
    text = json.dumps(results, indent=1)
    print(text)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
