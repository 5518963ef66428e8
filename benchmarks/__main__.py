"""Measure this product's speed, and write a page of tables and figures about it.

    python -m benchmarks                                             # everything that this machine can run,
        then the page
    python -m benchmarks --only slider limits --target 1.1b --device cuda
    python -m benchmarks --only page                                 # the page again, from the results that
        are there

A target is a shape with random weights (benchmarks/shapes.py) or a model by name. Results go to
benchmarks/results/, one JSON a part, target and sort of device; a part that is interrupted keeps the rows
that it has.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.suite import against, growth, limits, memory, page, slider
from benchmarks.suite.record import RESULTS, Options, Record
from workbench.util.device import pick

Part = Callable[[str, Options, Record], None]
PARTS: dict[
    str, tuple[Part, str, dict[str, tuple[str, ...]]]
] = {  # what runs it, what it says, its targets by sort of device
    "slider": (
        slider.run,
        slider.WHAT,
        {"cpu": ("fashion-vit", "fashion-cnn", "smollm2-135m"), "cuda": ("135m", "1.1b", "6.7b")},
    ),
    "limits": (limits.run, limits.WHAT, {"cpu": ("smollm2-135m",), "cuda": ("135m", "1.1b", "6.7b")}),
    "memory": (memory.run, memory.WHAT, {"cpu": ("fashion-vit",), "cuda": ("135m", "1.1b", "6.7b")}),
    "against": (
        against.run,
        against.WHAT,
        {"cpu": ("fashion-vit", "smollm2-135m"), "cuda": ("135m", "1.1b")},
    ),
    "growth": (growth.run, growth.WHAT, {"cpu": ("fashion-vit",), "cuda": ("135m",)}),
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "page"], help="these parts only")
    parser.add_argument(
        "--target",
        "--shape",
        "--model",
        nargs="+",
        dest="targets",
        help="these models or shapes instead of a part's own",
    )
    parser.add_argument("--device")
    parser.add_argument("--moves", type=int, default=Options.moves, help="of each slider, after the first")
    parser.add_argument(
        "--seconds",
        type=float,
        default=Options.seconds,
        help="at most so long for one part on one target, about",
    )
    parser.add_argument("--context", type=int, default=Options.context, help="tokens in a window of a shape")
    parser.add_argument(
        "--windows", type=int, default=Options.windows, help="windows that a shape is evaluated on"
    )
    parser.add_argument("--items", type=int, help="evaluation items of a named model, fewer than its own")
    parser.add_argument(
        "--dtype",
        help=(
            "that a named model is loaded in, such as bfloat16, which its checkpoint on the hub may have and"
            " the offline one has not"
        ),
    )
    parser.add_argument(
        "--quality-only",
        action="store_true",
        help=(
            "end a slider's move when all items are read: latency and memory take ten times as long on a GPU"
        ),
    )
    parser.add_argument("--sliders", nargs="+", default=(), help="these sliders only")
    parser.add_argument("--peers", type=Path, help="folder with torchao and llm-compressor, for `against`")
    parser.add_argument("--note", default="", help="about the machine's load, kept with the result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Run the parts, then write the page.

    A part that fails is reported, the others go on, the exit code is 1.
    """
    given = arguments()
    options = Options(
        given.device,
        given.moves,
        given.seconds,
        given.context,
        given.windows,
        given.items,
        tuple(given.sliders),
        given.peers,
        note=given.note,
        dtype=given.dtype,
        quality_only=given.quality_only,
    )
    sort, failed = pick(given.device).type, list[str]()
    for name, (run, what, targets) in PARTS.items():
        if given.only and name not in given.only:
            continue
        for target in given.targets or targets[sort]:
            record = Record(name, target, what, given.device, given.out, given.note)
            try:
                run(target, options, record)
            except KeyboardInterrupt:
                record.stop("interrupted")
                raise SystemExit(130) from None
            except Exception as error:  # noqa: BLE001  one part's failure is not the others'
                traceback.print_exc()
                record.stop(" ".join(f"{type(error).__name__}: {error}".split())[:400])
                failed.append(f"{name} {target}")
    page.write(given.out, RESULTS.parents[1] / "README.md" if given.out == RESULTS else None)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
