"""What a change of the code does to the time from a slider's move to its first look: two checkouts in turn.

    python benchmarks/before_after.py --before OTHER --target fashion-vit --target fashion-cnn --out FILE
    python benchmarks/before_after.py --before OTHER --target 1.1b --device cuda --out FILE

Whole processes run in turn, the other checkout first, then this one, as often as `--rounds` says. Each makes
the moves of every slider on one model, after two that are not counted, and says their median. The ratio is
the median over rounds of this checkout's time over the other's. Nothing but the public API is used, so that
any version can be held against any other.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

MOVES = r"""
import json, statistics, sys, tempfile, time
target, device = sys.argv[1:3]
import workbench as wb
ledger = tempfile.mkdtemp() + "/points.journal"
if target[0].isdigit():
    sys.path.insert(0, "benchmarks")
    import torch
    from shapes import random_task
    task = random_task(target, torch.device(device), 512, 64)
    bench = wb.Bench(task, device=device, ledger=ledger, progress=False)
else:
    bench = wb.Bench(target, device=device, ledger=ledger, progress=False)
SLIDERS = {
    "sparsity": [wb.Recipe(wb.Prune(sparsity=0.30 + 0.01 * i)) for i in range(12)],
    "sparsity, wanda": [wb.Recipe(wb.Prune(sparsity=0.30 + 0.01 * i, criterion="wanda")) for i in range(12)],
    "bits": [wb.Recipe(wb.Quantize(weight_bits=2 + i % 7, scale_search=False, group_size=16 * (i > 6)))
             for i in range(12)],
    "rank": [wb.Recipe(wb.LowRank(rank_ratio=0.20 + 0.01 * i)) for i in range(12)],
    "sparsity and bits": [wb.Recipe(wb.Prune(sparsity=0.30 + 0.01 * i), wb.Quantize(weight_bits=4))
                          for i in range(12)],
}
found = {}
for name, recipes in SLIDERS.items():
    times = []
    for recipe in recipes:
        begin = time.perf_counter()
        moving = bench.stream(recipe, again=True)
        next(moving)
        if device == "cuda":
            import torch
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
        moving.close()
    found[name] = statistics.median(times[2:])
print(json.dumps(found))
"""


def moved(checkout: Path, target: str, device: str) -> dict[str, float]:
    """Return the median milliseconds to a first look by slider, in a process of its own."""
    path = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", MOVES, target, device],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compared(before: Path, target: str, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return, by slider, both medians in milliseconds and the ratio of this checkout to the other."""
    here = Path(__file__).parents[1]
    pairs = [(moved(before, target, device), moved(here, target, device)) for _ in range(rounds)]
    return {
        slider: {
            "before_ms": round(statistics.median(old[slider] for old, _ in pairs), 2),
            "after_ms": round(statistics.median(new[slider] for _, new in pairs), 2),
            "ratio": round(statistics.median(new[slider] / old[slider] for old, new in pairs), 3),
            "ratios": [round(new[slider] / old[slider], 3) for old, new in pairs],
        }
        for slider in pairs[0][0]
    }


def main() -> None:
    """Compare and print, and write a file if asked."""
    parser = argparse.ArgumentParser(description="two checkouts in turn: milliseconds from a move to a look")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument(
        "--target", action="append", required=True, help="a model by name, or 135m, 1.1b, 6.7b"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import torch
    import transformers

    name = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or "CPU"
    result = {
        "command": f"python benchmarks/before_after.py --target {' --target '.join(given.target)}"
        f" --device {given.device} --rounds {given.rounds}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": name,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "load": os.getloadavg()[0],
        "targets": {
            target: compared(given.before.resolve(), target, given.device, given.rounds)
            for target in given.target
        },
    }
    for target, sliders in result["targets"].items():
        for slider, times in sliders.items():
            print(f"{target:12} {slider:20} {times['before_ms']:9.1f} {times['after_ms']:9.1f} ms", end="  ")
            print(f"{times['ratio']:.3f}  {times['ratios']}")
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
