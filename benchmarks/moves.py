"""Kernel-side: from a slider's move to the first measured look and to the whole set, on a Llama of a given size.

    python benchmarks/moves.py --shape 135m --device cuda --out benchmarks/results/moves-135m.json

Weights and tokens are random: times depend on shapes, not on values. A move goes through `widgets.session.Session`, as in
the panel, without a browser. `predicted` is when the prediction was there, `first` the look at the first items.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import workbench as wb
from widgets.choice import Choice
from widgets.session import Session
from workbench.device import describe, pick
from workbench.tasks.base import Task
from workbench.tasks.language_modelling import LANGUAGE_MODELLING, window_items
from workbench.versions import versions

SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary, tied
    "tiny": (64, 2, 4, 2, 128, 512, True),
    "135m": (576, 30, 9, 3, 1536, 49152, True),
    "1.1b": (2048, 22, 32, 4, 5632, 32000, False),
    "6.7b": (4096, 32, 32, 32, 11008, 32000, False),
    "6.7b-8-layers": (4096, 8, 32, 32, 11008, 32000, False),
}


def random_llama(shape: str, device: torch.device) -> torch.nn.Module:
    """Return a Llama with random weights, bfloat16 on a GPU and float32 elsewhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, shared, middle, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared, intermediate_size=middle,
        vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval().requires_grad_(False)


def random_task(shape: str, device: torch.device, context: int, windows: int) -> Task:
    """Return a language-modelling task of random tokens."""
    model = random_llama(shape, device)
    generator = torch.Generator().manual_seed(1)
    def ids(count: int) -> torch.Tensor:
        return torch.randint(SHAPES[shape][5], (count, context), generator=generator)

    sets = [window_items(ids(count)) for count in (windows, 16, 16)]
    return Task(LANGUAGE_MODELLING, model, f"llama-{shape}-random", f"llama-{shape}-random", "random tokens", *sets, batch_size=16)


def moves(count: int) -> dict[str, list[wb.Recipe]]:
    """Return recipes by slider, each a new position."""
    return {
        "sparsity": [wb.Recipe(wb.Prune(sparsity=0.3 + 0.01 * i)) for i in range(count)],
        "bits": [wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64, scale_search=False)) for bits in (2, 3, 4, 5, 6, 7, 8)],
        "bits, scale search": [wb.Recipe(wb.Quantize(weight_bits=bits, group_size=64)) for bits in (2, 3, 4, 5, 6, 7, 8)],
        "sparsegpt": [wb.Recipe(wb.Prune(sparsity=0.3 + 0.01 * i, criterion="sparsegpt")) for i in range(count)],
        "rank": [wb.Recipe(wb.LowRank(rank_ratio=0.2 + 0.01 * i, factorization="svd")) for i in range(count)],
        "sparsity + bits": [wb.Recipe(wb.Prune(sparsity=0.3 + 0.01 * i), wb.Quantize(weight_bits=4, group_size=64)) for i in range(count)],
    }


class Watch:
    """Writes down when what arrives after a move."""

    def __init__(self, session: Session) -> None:
        """Watch nothing yet."""
        self.session, self.seen = session, dict[str, float]()
        self.start = 0.0
        session.on_live = self.note

    def note(self) -> None:
        """Note the time of the first of each."""
        live, now = self.session.live, 1000 * (time.perf_counter() - self.start)
        if live.prediction is not None:
            self.seen.setdefault("predicted", now)
        if live.point is not None:
            self.seen.setdefault("first", now)
            if live.point.items == live.point.items_total:
                self.seen.setdefault("all", now)

    def move(self, recipe: wb.Recipe) -> dict[str, float]:
        """Move, wait until everything is measured, and return milliseconds."""
        self.seen = {}
        self.start = time.perf_counter()
        self.session.start(recipe)
        while self.session.measurer.busy:
            time.sleep(0.001)
        return self.seen


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return medians in milliseconds, the first (cold) move left out."""
    warm = rows[1:] or rows
    return {"moves": len(warm), **{f"{name}_ms": round(statistics.median(row[name] for row in warm if name in row), 1) for name in ("predicted", "first", "all")}}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--device")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--moves", type=int, default=8)
    parser.add_argument("--only", help="one slider's name")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick(options.device)
    task = random_task(options.shape, device, options.context, options.windows)
    errors: list[BaseException] = []
    result = {
        "what": "milliseconds in the kernel from a slider's move; medians over new positions on a warm bench; random weights",
        "command": "python " + " ".join(sys.argv), "date": dt.datetime.now(dt.UTC).date().isoformat(), "device": describe(device), "versions": versions(),
        "shape": options.shape, "context": options.context, "windows": options.windows,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        session = Session(on_live=lambda: None, on_history=lambda: None, on_loaded=lambda: None, on_error=errors.append, on_not_loaded=errors.append,
                          ledger=f"{folder}/points.journal", progress=False)  # fmt: skip
        session.load_now(Choice(task))
        watch = Watch(session)
        for name, recipes in moves(options.moves).items():
            if options.only in {None, name}:
                result[name] = summary([watch.move(recipe) for recipe in recipes])
                print(name, result[name], flush=True)
        session.close()
    if errors:
        raise errors[0]
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
