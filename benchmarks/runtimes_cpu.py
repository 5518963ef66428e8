"""Every runtime of this CPU on whole models, all forms timed in turn in one run: ratios to plain torch and to
ONNX Runtime's floats.

    python benchmarks/runtimes_cpu.py --out benchmarks/results/runtimes-cpu

writes OUT.json and OUT.md. MiniLM is the catalogue's where it can be had, else a BERT of its shape with
random weights.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from scipy import stats

import workbench as wb
from workbench.compress import compress
from workbench.compress.quantization.activations import Activations
from workbench.recipe import Recipe
from workbench.runtime.plan import realise
from workbench.runtime.roofline import limits_of
from workbench.tasks.base import Items, Task
from workbench.util.device import describe
from workbench.zoo import load_task

W8 = {"weight_bits": 8, "grid": "symmetric"}
FORMS = {  # label: (runtime, steps)
    "torch, fp32": ("torch", ()),
    "torch, W8A8 dynamic per token": ("auto", (Activations(), wb.Quantize(**W8))),
    "ONNX Runtime, fp32": ("onnx", ()),
    "ONNX Runtime, W8A8 dynamic per tensor": (
        "onnx",
        (Activations(activation_granularity="tensor", activation_grid="asymmetric"), wb.Quantize(**W8)),
    ),
    "ONNX Runtime, W8A8 dynamic per token": ("onnx", (Activations(), wb.Quantize(**W8))),
    "ONNX Runtime, W8A8 static": (
        "onnx",
        (Activations(activation_scaling="static", activation_granularity="tensor"), wb.Quantize(**W8)),
    ),
    "ONNX Runtime, W4 g32 packed": ("onnx", (wb.Quantize(weight_bits=4, group_size=32),)),
    "ONNX Runtime, fp32, rank 30%": ("onnx", (wb.LowRank(rank_ratio=0.3),)),
}


def random_bert(tokens: int) -> Task:
    """A classifier of MiniLM's shape: 6 layers of 384, random weights and tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    from workbench.tasks.text_classification import TEXT_CLASSIFICATION

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    model = BertForSequenceClassification(config).eval().requires_grad_(False)

    def items(count: int, seed: int) -> Items:
        ids = torch.randint(1000, 20000, (count, tokens), generator=torch.Generator().manual_seed(seed))
        return Items(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros(count, dtype=torch.long)
        )

    return Task(
        TEXT_CLASSIFICATION,
        model,
        "random BERT of MiniLM's shape",
        "random",
        "noise",
        items(64, 1),
        items(16, 2),
        items(16, 3),
    )


def task_of(name: str) -> Task:
    """Return a task of the catalogue; the stand-in where MiniLM cannot be had."""
    try:
        return load_task(name, offline=False, progress=False, device="cpu")
    except wb.errors.WorkbenchError as error:
        if "MiniLM" not in name:
            raise
        print(f"{name}: {error}; a random BERT of its shape instead")
        return random_bert(64)


def quantized_by_torch(task: Task) -> torch.nn.Module:
    """torch.ao's own dynamic int8 (deprecated), for comparison."""
    import torch.ao.quantization as q

    return q.quantize_dynamic(task.model, {torch.nn.Linear}, dtype=torch.qint8)


def measured(task: Task, batch: int, rounds: int) -> list[dict[str, object]]:
    """Return one row a form: median milliseconds, ratios with intervals, distance of its answers."""
    items = task.evaluation[:batch]
    running, rows, kept = {}, {}, {}
    with torch.inference_mode():
        wanted = task.kind.logits(task.model, items).float()
    for label, (runtime, steps) in FORMS.items():
        start = time.perf_counter()
        try:
            compressed = compress(task, Recipe(*steps))
        except wb.errors.WorkbenchError as error:
            rows[label] = {"form": label, "left out": str(error)[:200]}
            continue
        middle = time.perf_counter()
        realised = realise(
            compressed,
            "cpu",
            runtime,
            kind=task.kind,
            items=items,
            once=lambda key, compute: kept[key] if key in kept else kept.setdefault(key, compute()),
        )
        rows[label] = {
            "form": label,
            "compress_s": round(middle - start, 2),
            "build_s": round(time.perf_counter() - middle, 2),
            "runs": list(realised.plan.kernels),
            "no_kernel": list(realised.no_kernel),
            "warnings": list(realised.warnings),
        }
        running[label] = realised.model
        with torch.inference_mode():
            answers, simulated = (
                task.kind.logits(model, items).float() for model in (realised.model, compressed.model)
            )
        rows[label] |= {
            "from_dense": float((answers - wanted).norm() / wanted.norm()),
            "from_simulated": float((answers - simulated).norm() / simulated.norm()),
        }
    running["torch.ao quantize_dynamic (deprecated)"] = quantized_by_torch(task)
    rows["torch.ao quantize_dynamic (deprecated)"] = {"form": "torch.ao quantize_dynamic (deprecated)"}
    times: dict[str, list[float]] = {label: [] for label in running}
    order = list(running)
    with torch.inference_mode():
        for index in range(-3, rounds):
            for label in order if index % 2 else reversed(order):
                start = time.perf_counter()
                task.kind.run(running[label], items)
                if index >= 0:
                    times[label].append(1000 * (time.perf_counter() - start))
    for label, own in times.items():
        rows[label] |= {
            "median_ms": statistics.median(own),
            "of_torch": ratio(times["torch, fp32"], own),
            "of_onnx": ratio(times["ONNX Runtime, fp32"], own),
        }
    return list(rows.values())


def ratio(before: list[float], after: list[float]) -> list[float]:
    """Return the median of the ratios of one round each, and its 95% interval."""
    ratios = [a / b for a, b in zip(before, after, strict=True)]
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return [statistics.median(ratios), float(interval.low), float(interval.high)]


def page(results: dict[str, object]) -> str:
    """Return the results as markdown."""
    lines = [
        f"# Runtimes on {results['device']}",
        "",
        f"{results['date']}; {results['versions']}; `{results['command']}`. {results['limits']}.",
        "",
        (
            f"Load of the machine, which was shared: {results['load']} at the start and the end. Forms are"
            f" timed in turn, {results['rounds']} rounds; ratios are of one round each, median and 95%"
            " interval. Integer forms use the codes of the recipe; `distance` is that of their answers from"
            " the simulated model's, relative."
        ),
        "",
    ]
    for block in results["blocks"]:
        lines += [
            f"## {block['model']}, {block['batch']} items of {block['shape']}",
            "",
            "| form | ms | against torch fp32 | against ONNX Runtime fp32 | distance | built in |",
            "|---|---|---|---|---|---|",
        ]
        for row in block["rows"]:
            if "median_ms" not in row:
                lines.append(f"| {row['form']} | left out: {row['left out']} | | | | |")
                continue
            torch_ratio, onnx_ratio = (
                f"{low[0]:.2f}x [{low[1]:.2f}, {low[2]:.2f}]" for low in (row["of_torch"], row["of_onnx"])
            )
            apart = f"{row['from_simulated']:.1g}" if "from_simulated" in row else ""
            built = f"{row['build_s']:.1f} s" if "build_s" in row else ""
            lines.append(
                f"| {row['form']} | {row['median_ms']:.2f} | {torch_ratio} | {onnx_ratio} | {apart} |"
                f" {built} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/runtimes-cpu"))
    parser.add_argument(
        "--models",
        default=(
            "fashion-cnn:1,fashion-cnn:16,fashion-cnn:64,fashion-vit:16,"
            "all-MiniLM-L6-v2:1,all-MiniLM-L6-v2:16"
        ),
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "onnxruntime", "onnx", "onnxscript", "transformers")
    }
    results: dict[str, object] = {
        "device": describe(torch.device("cpu")),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": " ".join(["python", *sys.argv]),
        "rounds": options.rounds,
        "limits": limits_of("cpu").words(),
        "load": [os.getloadavg()[0]],
        "blocks": [],
    }
    tasks: dict[str, Task] = {}
    for spec in options.models.split(","):
        name, _, batch = spec.partition(":")
        if name not in tasks:
            tasks[name] = task_of(name)
        task = tasks[name]
        rows = measured(task, int(batch), options.rounds)
        shape = list(next(iter(task.evaluation.inputs.values())).shape[1:])
        results["blocks"].append(
            {"model": task.model_name, "batch": int(batch), "shape": shape, "rows": rows}
        )
        for row in rows:
            print(
                task.model_name,
                batch,
                row["form"],
                (
                    f"{row['median_ms']:.2f} ms, {row['of_torch'][0]:.2f}x torch, {row['of_onnx'][0]:.2f}x"
                    " onnx fp32"
                    if "median_ms" in row
                    else row
                ),
                flush=True,
            )
        results["load"] = [results["load"][0], os.getloadavg()[0]]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1))
        options.out.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
