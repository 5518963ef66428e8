"""One page of tables and figures from the results that the parts have written.

The same files give the same page.

`benchmarks/results/README.md` is the page; the lines between two markers in the project's README quote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import drawing
from benchmarks.suite.drawing import number

PAGE = "README.md"
AIM = 100  # times as soon as others to the first measured look
BEGIN, END = "<!-- measured by `python -m benchmarks` -->", "<!-- end of what is measured -->"
Result = dict[str, Any]
TITLES = {
    "slider": "Slider to point",
    "limits": "Against the machine's limits",
    "memory": "Peak memory",
    "against": "Against the naive way and today's tools",
    "growth": "How cost grows",
    "streaming": "Models larger than one GPU",
    "coverage": "Do the intervals hold?",
    "prediction": "Do the predictions hold?",
}


def results(folder: Path) -> list[Result]:
    """Return the suite's results in a folder, in the order of their file names."""
    runs = [
        {"part": path.stem} | json.loads(path.read_text()) | {"file": path.name}
        for path in sorted(folder.glob("*.json"))
    ]
    return [run for run in runs if run["part"] in TITLES]


def of(runs: Sequence[Result], part: str) -> list[Result]:
    """Return one part's results, GPUs first."""
    return sorted(
        (run for run in runs if run["part"] == part), key=lambda run: (not on_gpu(run), run["file"])
    )


def on_gpu(result: Result) -> bool:
    """Return whether a result was measured on a GPU."""
    return str(result["file"]).endswith("-cuda.json")


def where(result: Result) -> str:
    """Return the device in few words."""
    return str(result["device"]).replace("NVIDIA ", "").replace(" 80GB HBM3", "")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a table in Markdown; None is an empty cell."""
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows),
        "",
    ]


def aimed(value: float | None, aim: float | None, *, least: bool = False) -> str | None:
    """Return a number and, where there is an aim, whether it is reached."""
    if value is None or aim is None:
        return number(value)
    reached = value >= aim if least else value <= aim
    return f"{number(value)} (aim {number(aim)}: {'reached' if reached else '**not reached**'})"


def slider(runs: list[Result]) -> list[str]:
    """Return the table of slider moves."""
    rows = [
        (
            run["target"],
            where(run),
            row["name"],
            row["moves"],
            *(number(row.get(f"{name}_ms")) for name in ("predicted",)),
            aimed(row.get("first_ms"), run.get("aim_first_ms")),
            *(number(row.get(f"{name}_ms")) for name in ("first_worst", "all", "complete", "cold_first")),
        )
        for run in runs
        for row in run["rows"]
    ]
    return table(
        (
            "model",
            "device",
            "slider",
            "moves",
            "predicted, ms",
            "first look, ms",
            "slowest first look, ms",
            "whole set, ms",
            "with latency and memory, ms",
            "first move: first look, ms",
        ),
        rows,
    )


def limits(runs: list[Result]) -> list[str]:
    """Return two tables: evaluation beside the arithmetic floor, application beside a copy's bandwidth."""
    rows, moves = [], []
    for run in runs:
        for row in run["rows"]:
            if row["name"] == "evaluation":
                rows.append(
                    (
                        run["target"],
                        where(run),
                        f"{row['labels']:,}",
                        number(row["ms"]),
                        number(row["floor_ms"]),
                        aimed(row["times_floor"], row.get("aim_times_floor")),
                        number(row["tflop_per_s"]),
                    )
                )
            else:
                moved, busy = row.get("moved_of_bandwidth"), row.get("busy_of_bandwidth")
                last = None if busy is None else aimed(busy, row["aim_of_bandwidth"], least=True)
                moves.append(
                    (
                        run["target"],
                        where(run),
                        row["name"].removeprefix("apply "),
                        number(row["ms"]),
                        number(row["first_ms"]),
                        number(row.get("busy_ms")),
                        number(row["least_bytes"] / 1e6),
                        number(row["of_bandwidth"]),
                        number(row["moved_bytes"] / 1e6) if moved else None,
                        number(moved),
                        last,
                    )
                )
    return [
        *table(
            (
                "model",
                "device",
                "tokens or labels",
                "evaluation, ms",
                "arithmetic floor, ms",
                "times the floor",
                "matrix product here, TFLOP/s",
            ),
            rows,
        ),
        *table(
            (
                "model",
                "device",
                "step",
                "a move, ms",
                "first, ms",
                "device busy, ms",
                "least MB",
                "of a copy's bandwidth",
                "MB read and written by passes",
                "of a copy's bandwidth",
                "the same while the device is busy",
            ),
            moves,
        ),
    ]


def memory(runs: list[Result]) -> list[str]:
    """Return peaks beside what they may be."""
    rows = []
    for run in runs:
        budget = run.get("cache_budget_bytes")
        for row in run["rows"]:
            if "failed" in row:
                rows.append((run["target"], where(run), row["name"], *[None] * 6, row["failed"]))
                continue
            promised = number(row["promised_bytes"] / 1e6) if "promised_bytes" in row else None
            mega = [
                number(value / 1e6)
                for value in (
                    row["peak_bytes"],
                    run["dense_bytes"],
                    row["compressed_bytes"],
                    row["cached_bytes"],
                )
            ]
            rows.append(
                (
                    run["target"],
                    where(run),
                    row["name"],
                    *mega,
                    "none stated" if budget is None else number(budget / 1e6),
                    number(row["beyond_bytes"] / 1e6),
                    promised,
                )
            )
    return table(
        (
            "model",
            "device",
            "slider",
            "peak, MB",
            "dense model, MB",
            "compressed copy, MB",
            "cached, MB",
            "cache budget, MB",
            "beyond the model, its copy and the cached, MB",
            "masks and codes, MB",
        ),
        rows,
    )


def against(runs: list[Result]) -> list[str]:
    """Return each way beside this product, for the first and for a later setting."""
    lines = []
    for run in runs:
        peers = ", ".join(f"{name} {version}" for name, version in run["peers"].items())
        lines += [
            (
                f"**{run['target']}**, {where(run)}, {run['items']} items of {run['tokens_an_item']}"
                f" labels{f'; {peers}' if peers else ''}. Ratios are theirs over ours, for a later setting"
                " (and the first of a session)."
            ),
            "",
        ]
        rows = []
        for row in run["rows"]:
            if "failed" in row:
                rows.append((row["name"], row["setting"], f"does not run here: {row['failed']}", *[None] * 8))
                continue
            theirs, mine = row["theirs"], row["ours"]
            times = [
                f"{aimed(row[f'warm_full_over_{what}'], AIM if what == 'first_look' else None, least=True)}"
                f" ({number(row[f'cold_full_over_{what}'])})"
                for what in ("predicted", "first_look", "full")
            ]
            rows.append(
                (
                    row["name"],
                    row["setting"],
                    f"{number(theirs['warm_full_s'])} ({number(theirs['cold_full_s'])})",
                    *(
                        f"{number(mine[f'warm_{what}_s'])} ({number(mine[f'cold_{what}_s'])})"
                        for what in ("predicted", "first_look", "full")
                    ),
                    *times,
                    None if "processor_over_full" not in row else number(row["processor_over_full"]),
                    f"{theirs['value']:g} / {mine['warm_value']:g}",
                )
            )
        lines += table(
            (
                "way",
                "setting",
                "theirs, s",
                "our prediction, s",
                "our first look, s",
                "our full interval, s",
                "over prediction",
                "over first look",
                "over full",
                "over full, processor time",
                f"{run['metric']}: theirs / ours",
            ),
            rows,
        )
    return lines


def streaming(runs: list[Result]) -> list[str]:
    """Return moves of models that are streamed from the host or spread over GPUs, resident ones beside
    them."""
    lines = [
        (
            "`resident` is the same bench with all of one GPU's memory. Fused kernels are off, as models that"
            " are moved about run without."
        ),
        "",
    ]
    for run in runs:
        bits = {
            True: "the same bits come out",
            False: "**other bits come out**",
            None: "qualities were not compared",
        }[run["same_bits"]]
        limit = f", {number(run['memory_gb'])} GB of memory allowed" if run.get("memory_gb") else ""
        note = f"; {run['note']}" if run.get("note") else ""
        lines += [
            (
                f"**{run['target']}**, {where(run)}{limit}, {run['windows']} windows of {run['context']}"
                f" tokens, a model of {number(run['model_bytes'] / 1e6)} MB; {bits}{note}."
            ),
            "",
        ]
        rows = [
            (
                f"{row['move']}: {row['recipe']}",
                {"device": "resident"}.get(row["placement"], row["placement"]),
                "first" if row["time"] == 0 else "later",
                number(row.get("compress_s")),
                number(row["first_s"]),
                number(row.get("forecast_first_s")),
                number(row.get("all_s")),
                number(row.get("forecast_all_s")),
                number(row["complete_s"]),
                number(row["peak_bytes"] / 1e6) if "peak_bytes" in row else None,
            )
            for row in run["rows"]
        ]
        lines += table(
            (
                "slider",
                "placement",
                "of its kind",
                "compressed, s",
                "first look, s",
                "forecast, s",
                "all items, s",
                "forecast, s",
                "with packed sizes and what follows, s",
                "peak on the first GPU, MB",
            ),
            rows,
        )
    return lines


def growth(runs: list[Result]) -> list[str]:
    """Return a table for each thing that grows."""
    lines = []
    for run in runs:
        for kind in dict.fromkeys(row["grows"] for row in run["rows"]):
            mine = [row for row in run["rows"] if row["grows"] == kind]
            columns = [name for name in mine[0] if name.endswith("_ms")]
            lines += [f"**{kind}**, {where(run)}", ""]
            lines += table(
                ("of", kind, *(f"{name.removesuffix('_ms').replace('_', ' ')}, ms" for name in columns)),
                [(row["name"], f"{row['size']:,}", *(number(row[name]) for name in columns)) for row in mine],
            )
    return lines


def plain(runs: list[Result]) -> list[str]:
    """Return the rows of each result as a table, with their own names."""
    lines = []
    for run in runs:
        rows = run.get("rows") or [
            {"model": each["model"], "way": way} | figures
            for each in run.get("models", [])
            for way, figures in each.get("ways", {}).items()
        ]
        columns = [name for name in (rows[0] if rows else {}) if not isinstance(rows[0][name], list | dict)]
        lines += (
            [
                run.get("what", ""),
                "",
                *table(
                    columns,
                    [
                        [
                            number(value) if isinstance(value := row.get(name), float) else value
                            for name in columns
                        ]
                        for row in rows
                    ],
                ),
            ]
            if columns
            else [run.get("what", ""), ""]
        )
    return lines


TABLES: dict[str, Callable[[list[Result]], list[str]]] = {
    "slider": slider,
    "limits": limits,
    "memory": memory,
    "against": against,
    "growth": growth,
    "streaming": streaming,
    "coverage": plain,
    "prediction": plain,
}


def figures(runs: list[Result]) -> dict[str, str]:
    """Return the drawings by file name."""
    drawings = {}
    moves = [
        (
            f"{run['target']}: {row['name']}",
            f"{run['target']}",
            row["first_ms"],
            run.get("aim_first_ms"),
            on_gpu(run),
        )
        for run in of(runs, "slider")
        for row in run["rows"]
        if "first_ms" in row
    ]
    for gpu, name in ((True, "suite-slider-cuda.svg"), (False, "suite-slider-cpu.svg")):
        rows = [row[:4] for row in moves if row[4] == gpu]
        if rows:
            drawings[name] = drawing.bars(
                "From a slider's move to the first measured look (stroke: the aim)",
                "milliseconds, median",
                rows,
            )
    rows = []
    for run in of(runs, "against"):
        good = [row for row in run["rows"] if "failed" not in row]
        for row in good:
            rows.append(
                (
                    f"{run['target']}, {run['items']} items: {row['name']}",
                    "theirs",
                    row["theirs"]["warm_full_s"],
                    None,
                )
            )
        for setting in dict.fromkeys(row["setting"] for row in good):
            mine = next(row["ours"] for row in good if row["setting"] == setting)
            rows += [
                (f"this, {setting}: {title}", title, max(mine[f"warm_{name}_s"], 1e-4), None)
                for name, title in (
                    ("full", "full interval"),
                    ("first_look", "first look"),
                    ("predicted", "predicted"),
                )
            ]
    if rows:
        drawings["suite-against.svg"] = drawing.bars(
            "From a setting to its quality, a later setting of a session", "seconds", rows
        )
    points = [row for run in of(runs, "growth") for row in run["rows"] if row["grows"] == "ledger"]
    if points:
        names = [name for name in points[0] if name.endswith("_ms") and not name.endswith("_processor_ms")]
        drawings["suite-ledger.svg"] = drawing.lines(
            "A ledger that grows",
            "points",
            "milliseconds",
            {
                name.removesuffix("_ms").replace("_", " "): [
                    (row["size"], max(row[name], 0.01)) for row in points
                ]
                for name in names
            },
        )
    return drawings


FIGURES = {
    "slider": ("suite-slider-cuda.svg", "suite-slider-cpu.svg"),
    "against": ("suite-against.svg",),
    "growth": ("suite-ledger.svg",),
}


def sources(runs: list[Result]) -> list[str]:
    """Return how each result came about."""
    rows = []
    for run in runs:
        load, versions = run.get("load", {}), run.get("versions", {})
        loaded = (
            f"{load.get('average_at_start', '')} to"
            f" {load.get('average_at_end', '')}{', ' + load['note'] if load.get('note') else ''}"
            if load
            else None
        )
        rows.append(
            (
                f"[{run['file']}]({run['file']})",
                f"`{run.get('command', '')}`",
                str(run.get("date", ""))[:16],
                run.get("device"),
                ", ".join(
                    f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions
                ),
                loaded,
                run.get("stopped"),
            )
        )
    return table(("result", "command", "date", "device", "versions", "load average", "stopped"), rows)


def page(runs: list[Result]) -> str:
    """Return the page."""
    drawn = figures(runs)
    lines = [
        "# What the suite measures",
        "",
        (
            "`python -m benchmarks` writes this page from the JSON files beside it. Times are of one run"
            " each; how busy the machine was stands at the end."
        ),
        "",
    ]
    for part, title in TITLES.items():
        mine = of(runs, part)
        if mine:
            lines += [
                f"## {title}",
                "",
                *(
                    [f"{mine[0]['what'][0].upper()}{mine[0]['what'][1:]}.", ""]
                    if TABLES[part] is not plain and mine[0].get("what")
                    else []
                ),
                *TABLES[part](mine),
            ]
            lines += [f"![{title}]({name})\n" for name in FIGURES.get(part, ()) if name in drawn]
    return "\n".join([*lines, "## How each came about", "", *sources(runs)]).rstrip() + "\n"


def quoted(runs: list[Result]) -> str:
    """Return the table that the project's README quotes: sparsity of every model whose slider moved."""
    rows = [
        (
            run["target"],
            where(run),
            f"{run['items']} x {run['tokens_an_item']}",
            number(row.get("predicted_ms")),
            number(row.get("first_ms")),
            number(row.get("all_ms")),
        )
        for run in of(runs, "slider")
        for row in run["rows"]
        if row["name"] == "sparsity" and "first_ms" in row
    ]
    head = ("model", "device", "items x labels", "predicted, ms", "first measured look, ms", "whole set, ms")
    return "\n".join([BEGIN, *table(head, rows), END])


def write(folder: Path, readme: Path | None = None) -> None:
    """Write the page and its figures into the folder of the results, and the quoted lines into the project's
    README."""
    runs = results(folder)
    (folder / PAGE).write_text(page(runs))
    for name, text in figures(runs).items():
        (folder / name).write_text(text)
    if readme is not None:
        text = readme.read_text()
        before, rest = text.split(BEGIN)
        readme.write_text(before + quoted(runs) + rest.split(END)[1])
