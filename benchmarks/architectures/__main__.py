"""Every family of method on tiny random models of many architectures.

    python -m benchmarks.architectures --out benchmarks/results/architectures
    python -m benchmarks.architectures --only mixtral mamba

Each model is saved as a folder and read with data from files, as a user's own is. A cell says what share of
the model's weights a recipe touched, where it was measured, exported and loaded back to the same bits and
answers; or why it was refused. Weights are random, so that no quality is shown. Writes a .json with every
figure and a .md with the table.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import workbench as wb
from benchmarks.architectures import data, models
from workbench.errors import WorkbenchError
from workbench.util.device import describe, pick
from workbench.util.environment import versions
from workbench.zoo import load_task

FAMILIES: dict[str, wb.Recipe] = {
    "50% sparse": wb.Recipe(wb.Prune(sparsity=0.5)),
    "2:4": wb.Recipe(wb.Prune(pattern="2:4")),
    "Wanda": wb.Recipe(wb.Prune(sparsity=0.5, criterion="wanda")),
    "SparseGPT": wb.Recipe(wb.Prune(sparsity=0.5, criterion="sparsegpt")),
    "heads": wb.Recipe(wb.Prune(sparsity=0.5, pattern="heads")),
    "neurons": wb.Recipe(wb.Prune(sparsity=0.5, pattern="neurons")),
    "channels": wb.Recipe(wb.Prune(sparsity=0.5, pattern="channels")),
    "experts": wb.Recipe(wb.Prune(sparsity=0.5, pattern="experts")),
    "layers": wb.Recipe(wb.Prune(sparsity=0.34, pattern="layers")),
    "rank 0.5": wb.Recipe(wb.LowRank(rank_ratio=0.5)),
    "W4": wb.Recipe(wb.Quantize(weight_bits=4, group_size=8)),
    "GPTQ W3": wb.Recipe(wb.Quantize(weight_bits=3, rounding="gptq")),
    "AWQ W4": wb.Recipe(wb.Quantize(weight_bits=4, group_size=8, rounding="awq")),
    "W8A8": wb.Recipe(wb.Quantize(weight_bits=8), wb.Activations(activation_bits=8)),
    "W8, KV cache 4": wb.Recipe(wb.Quantize(weight_bits=8), wb.KVCache(kv_bits=4)),
    "distilled": wb.Recipe(wb.Prune(sparsity=0.5), wb.Distill(steps=2, distill_batch=4, look_every=0)),
}


@dataclass(frozen=True)
class Cell:
    """What became of one recipe on one model. `refused` is the reason, "" where nothing was refused."""

    touched: float | None = None  # share of the model's weights, 0 to 1; None: unknown
    measured: bool = False
    exported: bool = False
    same: bool = False  # loaded back: every tensor and every answer, bit for bit
    refused: str = ""
    crashed: bool = False  # an error that is none of the workbench's own

    @property
    def text(self) -> str:
        """Return the cell in the table, a mark in front of what fell short."""
        share = "?" if self.touched is None else f"{100 * self.touched:.0f}%"
        if self.refused:
            return "crashed" if self.crashed else f"{share}, no export" if self.measured else "refused"
        return share if self.same else f"{share}, other bits"


def same_bits(task: Any, model: torch.nn.Module, folder: Path) -> bool:
    """Return whether an export loads back to the same tensors and answers."""
    loaded, expected = wb.load(folder), model.state_dict()
    state = loaded.state_dict()
    tensors = list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in state)
    with torch.no_grad():
        answers = [task.kind.logits(answering, task.evaluation[:4]) for answering in (loaded, model)]
    return tensors and torch.equal(*answers)


def reason(error: Exception, folder: str) -> str:
    """Return an error as one line, the temporary folder by its last part."""
    return " ".join(str(error).split()).replace(folder, Path(folder).name)


def tried(bench: wb.Bench, recipe: wb.Recipe, folder: Path) -> Cell:
    """Return the outcome of a recipe: measured, exported, loaded back."""
    cell: dict[str, Any] = {}
    try:
        point = bench.measure(recipe)
        cell = {"touched": None if point.coverage is None else point.coverage.share, "measured": True}
        bench.export(recipe, folder)
        same = same_bits(bench.task, bench.compress(recipe).model, folder)
        return Cell(**cell, exported=True, same=same)
    except WorkbenchError as error:
        return Cell(**cell, refused=reason(error, bench.task.model_name))
    except Exception as error:  # noqa: BLE001  a crash is a row of the table
        return Cell(**cell, refused=f"{type(error).__name__}: {' '.join(str(error).split())}", crashed=True)


def row(architecture: models.Architecture, place: Path, families: list[str]) -> dict[str, Cell]:
    """Return the cells of one architecture."""
    folder, root = models.save(architecture, place / architecture.model_type), place / architecture.kind
    root.mkdir(exist_ok=True)
    try:
        task = load_task(
            folder,
            str(data.DATA[architecture.kind](root)),
            context=16 if architecture.kind == "language" else None,
            evaluation_items=16,
            calibration_items=16,
            training_items=16,
            progress=False,
        )
    except WorkbenchError as error:
        return dict.fromkeys(families, Cell(refused=reason(error, str(folder))))
    bench = wb.Bench(task, device="cpu", ledger=place / f"{architecture.model_type}.journal", progress=False)
    return {
        name: tried(bench, FAMILIES[name], place / "out" / architecture.model_type / name.replace("/", "-"))
        for name in families
    }


def page(rows: dict[str, dict[str, Cell]], about: dict[str, Any]) -> str:
    """Return the table in Markdown, with the reasons of what was refused below."""
    families = list(next(iter(rows.values())))
    reasons: dict[str, list[str]] = {}
    for name, cells in rows.items():
        for family, cell in cells.items():
            if cell.refused:
                reasons.setdefault(cell.refused, []).append(f"{name} ({family})")
    sorts = {architecture.model_type: architecture.sort for architecture in models.ARCHITECTURES}
    lines = [
        "# Every family of method on tiny random models of many architectures",
        "",
        ", ".join(
            [
                f"`{about['command']}`",
                about["date"],
                about["device"],
                *(f"{name} {about['versions'][name]}" for name in ("torch", "transformers")),
            ]
        ),
        "",
        "A share is that of the model's weights which the recipe touched. Where it stands alone, the recipe",
        "was measured, exported and loaded back to the same bits and answers.",
        "",
        f"| model | sort | {' | '.join(families)} |",
        f"|---|---|{'---|' * len(families)}",
        *(
            f"| {name} | {sorts[name]} | {' | '.join(cell.text for cell in cells.values())} |"
            for name, cells in rows.items()
        ),
        "",
        "## Why refused",
        "",
        *(f"- {', '.join(places)}: {reason}" for reason, places in reasons.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what was asked for, print each row, write both files."""
    parser = argparse.ArgumentParser(description="every family of method on many architectures")
    parser.add_argument("--only", nargs="*", help="model types, such as mixtral; without it, all")
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--out", type=Path, help="without ending: a .json and a .md are written")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        for architecture in models.ARCHITECTURES:
            if given.only and architecture.model_type not in given.only:
                continue
            cells = row(architecture, Path(place), given.families)
            rows[architecture.model_type] = cells
            print(architecture.model_type, {name: cell.text for name, cell in cells.items()}, flush=True)
    about = {
        "command": "python -m benchmarks.architectures",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(pick("cpu")),
        "versions": versions(),
    }
    if given.out:
        table = {
            name: {family: asdict(cell) for family, cell in cells.items()} for name, cells in rows.items()
        }
        given.out.with_suffix(".json").write_text(json.dumps({**about, "rows": table}, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(page(rows, about))


if __name__ == "__main__":
    main()
