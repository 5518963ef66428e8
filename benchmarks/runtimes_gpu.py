"""Every packed form against dense bf16 on a GPU, both captured as CUDA graphs (or both compiled), in one run:
which is faster, at how many tokens.

    python benchmarks/runtimes_gpu.py --shapes 135m 1.1b 6.7b --out benchmarks/results/runtimes-h100.json

Llamas with random weights: times depend on shapes, not on values. A ratio is the median over rounds in which
dense and packed are timed one after the other. `floor` is the time in which the weights that are stored could
be read at the bandwidth that a large copy reaches on this device, measured in the same run; a fraction of 1
would be that floor. Answers are compared with those of the simulated model (`apart`, relative). Writes a page
(.md) beside the JSON.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from shapes import SHAPES, random_task
from torch import nn

import workbench as wb
from workbench.compress import compress
from workbench.errors import WorkbenchError
from workbench.measure.memory import unique_bytes
from workbench.runtime.execution import CapturedModel, Compiled
from workbench.runtime.plan import plan, with_kernels
from workbench.util.device import Clock, describe, pick
from workbench.util.environment import versions

TOKENS = (1, 16, 256, 2048)
RECIPES = {
    "W8 g64": wb.Recipe(wb.Quantize(weight_bits=8, group_size=64, scale_search=False)),
    "W6 g64": wb.Recipe(wb.Quantize(weight_bits=6, group_size=64, scale_search=False)),
    "W4 g64": wb.Recipe(wb.Quantize(weight_bits=4, group_size=64, scale_search=False)),
    "W3 g64": wb.Recipe(wb.Quantize(weight_bits=3, group_size=64, scale_search=False)),
    "W2 g64": wb.Recipe(wb.Quantize(weight_bits=2, group_size=64, scale_search=False)),
    "W8A8": wb.Recipe(wb.Activations(), wb.Quantize(weight_bits=8, grid="symmetric", scale_search=False)),
    "W8A8 float8": wb.Recipe(
        wb.Activations(activation_format="float8"), wb.Quantize(weight_bits=8, number_format="float8")
    ),
    "rank 25% + W4 g64": wb.Recipe(
        wb.LowRank(rank_ratio=0.25, factorization="svd"),
        wb.Quantize(weight_bits=4, group_size=64, scale_search=False),
    ),
}
MODES = {"graph": CapturedModel, "compiled": lambda model: CapturedModel(Compiled(model))}


def ratio(
    dense: nn.Module, compressed: nn.Module, ids: torch.Tensor, rounds: int = 15
) -> tuple[float, float, float]:
    """Return (median ms of dense, of the other, median of their ratios), timed in turn."""
    clock = Clock(ids.device)
    times: list[tuple[float, float]] = []
    with torch.inference_mode():
        for index in range(rounds + 3):
            pair = (
                clock.time_ms(lambda: dense(input_ids=ids, use_cache=False)),
                clock.time_ms(lambda: compressed(input_ids=ids, use_cache=False)),
            )
            if index >= 3:
                times.append(pair)
    return (
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
    )


def bandwidth(device: torch.device) -> float:
    """Return bytes a second of a large copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (
        2
        * source.nbytes
        / statistics.median(Clock(device).time_ms(lambda: target.copy_(source)) for _ in range(9))
        * 1000
    )


def weights_read(model: nn.Module) -> int:
    """Return the bytes of everything a forward pass of one token reads: all weights but the embedding's
    table."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)
    }
    return unique_bytes(
        tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in tables
    )


def rows(
    shape: str, device: torch.device, mode: str, names: list[str], *, tokens: list[int], speed: float
) -> Iterator[dict]:
    """Yield the figures of one shape in one mode."""
    task = random_task(shape, device, 64, 2)
    kind, items = task.kind, task.evaluation[:1].to(device)
    ids = {count: torch.randint(SHAPES[shape][5], (1, count), device=device) for count in {16, *tokens}}
    dense = MODES[mode](task.model)
    for name in names:
        row = {"shape": shape, "recipe": name, "mode": mode}
        try:
            compressed = compress(task, RECIPES[name], shared=True)
            planned = plan(compressed, "cuda")
            built = with_kernels(compressed, planned, kind, items)
            model, warnings = built.model, built.warnings
            if model is compressed.model:
                yield row | {"failed": "; ".join([*planned.no_kernel, *warnings])[:300]}
                continue
            with torch.inference_mode():
                wanted = compressed.model(input_ids=ids[16], use_cache=False).logits.float()
                apart = float(
                    (model(input_ids=ids[16], use_cache=False).logits.float() - wanted).norm() / wanted.norm()
                )
            del wanted
            read, running = weights_read(model), MODES[mode](model)
            row |= {
                "kernels": list(built.kernels),
                "no_kernel": list(planned.no_kernel),
                "warnings": list(warnings),
                "apart": apart,
                "bytes": read,
                "dense_bytes": weights_read(task.model),
            }
            for count in tokens:
                before, after, faster = ratio(dense, running, ids[count])
                row |= {f"dense_ms_{count}": before, f"ms_{count}": after, f"ratio_{count}": faster}
            row |= {
                "floor_ms": 1000 * read / speed,
                "of_floor": 1000 * read / speed / row["ms_1"],
                "dense_of_floor": 1000 * row["dense_bytes"] / speed / row["dense_ms_1"],
            }
            yield row
        except (RuntimeError, WorkbenchError) as error:
            yield row | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        finally:
            compressed = model = running = built = None
            gc.collect()
            torch.cuda.empty_cache()


def page(result: dict) -> str:
    """Return the figures as a page."""
    lines = [
        "# Packed forms against dense bf16 on a GPU",
        "",
        (
            f"{result['device']}, {result['date']}, torch {result['versions']['torch']}, transformers"
            f" {result['versions']['transformers']}; `{result['command']}`."
        ),
        (
            f"A large copy reaches {result['bandwidth'] / 1e12:.2f} TB/s. Ratios are dense / packed, more"
            " than 1 is faster; `of floor` is the share of that bandwidth at one token (dense: in brackets)."
        ),
        "",
        "| shape | mode | recipe | "
        + " | ".join(f"{count} token{'s' * (count > 1)}" for count in TOKENS)
        + " | of floor | bytes against dense | apart | kernels |",
        "|---" * (7 + len(TOKENS)) + "|",
    ]
    for row in result["rows"]:
        if "failed" in row:
            lines.append(
                f"| {row['shape']} | {row['mode']} | {row['recipe']} | "
                + "| " * len(TOKENS)
                + f"| | | | {row['failed']} |"
            )
            continue
        cells = " | ".join(
            (
                f"**{row[f'ratio_{count}']:.2f}x** ({row[f'dense_ms_{count}']:.2f} to"
                f" {row[f'ms_{count}']:.2f} ms)"
                if f"ratio_{count}" in row
                else ""
            )
            for count in TOKENS
        )
        lines.append(
            f"| {row['shape']} | {row['mode']} | {row['recipe']} | {cells} | {row['of_floor']:.0%}"
            f" ({row['dense_of_floor']:.0%}) | {row['bytes'] / row['dense_bytes']:.0%} | {row['apart']:.1e} |"
            f" {'; '.join(row['kernels'])} |"
        )
    return "\n".join([*lines, "", *(f"{note}\n" for note in result.get("notes", []))])


def main() -> None:
    """Run, print, write after every row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["135m"])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["graph"])
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, default=list(TOKENS))
    parser.add_argument(
        "--add", action="store_true", help="keep the rows that the file has, but for those measured now"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick("cuda")
    speed = bandwidth(device)
    result = {
        "device": describe(device),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "bandwidth": speed,
        "rows": [],
    }
    if options.add and options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        result |= {"rows": before["rows"], "notes": before.get("notes", [])}
    for shape, mode in itertools.product(options.shapes, options.modes):
        for row in rows(shape, device, mode, options.recipes, tokens=options.tokens, speed=speed):
            result["rows"] = [
                old
                for old in result["rows"]
                if any(old[name] != row[name] for name in ("shape", "mode", "recipe"))
            ] + [row]
            print(
                {
                    key: round(value, 3) if isinstance(value, float) else value
                    for key, value in row.items()
                    if key not in {"kernels", "no_kernel"}
                },
                flush=True,
            )
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
