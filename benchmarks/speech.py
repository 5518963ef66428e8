"""Five losses side by side: a Whisper decoder is cut, then taught by its dense self through LoRA; word error rates, paired.

    python benchmarks/speech.py --out benchmarks/results/speech-whisper-base
    python benchmarks/speech.py --student depth --steps 400 --device cuda --out benchmarks/results/speech-whisper-base-depth

Losses: cross entropy; + KL; + KL + hidden MSE; + KL + cosine; + KL + geodesic (2606.00771). Only the decoder is compressed and
taught, so the encoder runs once for all: what it heard is kept, cut after `--frames` (50 a second; 300 are 6 s, 1500 all), and
only utterances that end two seconds before and have up to 32 tokens are used. Evaluation utterances are never trained on; all are by one speaker. Writes
a .json with every figure and a .md with the table. Word errors are averaged over seeds before utterances are drawn again, so
intervals are those of utterances, not of seeds; the spread over seeds stands beside them.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import workbench as wb
from workbench.compress import compress
from workbench.device import describe, pick
from workbench.measure.estimate import Estimate
from workbench.measure.resampling import word_error_rates
from workbench.statistics import Statistics
from workbench.tasks import score
from workbench.tasks.base import Items, Scores, Task
from workbench.tasks.choosing import likelihoods
from workbench.tasks.speech_recognition import SpeechRecognition, encode, greedy, longest
from workbench.tasks.spoken_words import spoken_scores
from workbench.versions import versions
from workbench.zoo import load_task

DECODER = ("re:^model.decoder.layers",)
TOKENS = 32  # of words and the end
LENGTH = TOKENS + 3  # and those before the words
SILENCE = 200  # hundredths of a second that stay after the last word: with none, even the teacher goes on without an end
LOSSES: dict[str, dict[str, Any]] = {
    "CE": {"kl_weight": 0, "align": "none"}, "CE + KL": {"align": "none"}, "CE + KL + MSE": {"align": "mse"},
    "CE + KL + cosine": {"align": "cosine"}, "CE + KL + geodesic": {"align": "geodesic"},
}  # fmt: skip


@dataclass(frozen=True)
class Heard(SpeechRecognition):
    """Speech recognition from what the encoder made of it: `encoded` [N, frames, width] in the place of features."""

    def logits(self, model: torch.nn.Module, items: Items) -> Tensor:
        return model(encoder_outputs=(items.inputs["encoded"],), decoder_input_ids=items.inputs["decoder_input_ids"], use_cache=False).logits

    def score(self, model: torch.nn.Module, items: Items) -> Scores:
        forced = likelihoods(self.logits(model, items), items.labels)
        heard = self.writes.texts(greedy(model, items.inputs["encoded"], self.writes, longest(model, items)))
        return spoken_scores(self.writes.texts(items.labels), heard, forced.loss, forced.weight)


@torch.inference_mode()
def heard(task: Task, items: Items, frames: int, device: torch.device) -> Items:
    """Return the items that fit, with the encoder's output in the place of sound."""
    short = (items.inputs["attention_mask"].sum(1) <= 2 * frames - SILENCE) & ((items.labels != -100).sum(1) <= TOKENS)
    kept = items[short.nonzero().flatten()]
    encoded = torch.cat([encode(task.model, part.to(device))[:, :frames].cpu() for part in kept.batches(8)])
    return Items({"encoded": encoded.clone(), "decoder_input_ids": kept.inputs["decoder_input_ids"][:, :LENGTH]}, kept.labels[:, :LENGTH])


def encoded_task(model: str, frames: int, device: torch.device) -> Task:
    """Return the model with its data heard; projections and decompositions are fitted to all training items."""
    task = load_task(model, device=device, calibration_items=8, training_items=45, offline=True, progress=False)
    parts = {name: heard(task, getattr(task, name), frames, device) for name in ("evaluation", "calibration", "training")}
    both = parts["calibration"], parts["training"]
    every = Items({name: torch.cat([part.inputs[name] for part in both]) for name in both[0].inputs}, torch.cat([part.labels for part in both]))
    return replace(task, kind=Heard(writing=task.kind.writes), evaluation=parts["evaluation"], calibration=every, training=every, batch_size=16)


def students(options: argparse.Namespace) -> wb.Step:
    """Return the step that makes the student."""
    if options.student == "rank":
        return wb.LowRank(rank_ratio=options.rank_ratio, targets=DECODER)
    return wb.Prune(sparsity=options.depth, pattern="layers", targets=DECODER)


def scores_of(task: Task, model: torch.nn.Module, device: torch.device) -> Scores:
    """Return the scores of all evaluation utterances."""
    return Scores.join([score(task.kind, model, part.to(device)) for part in task.evaluation.batches(task.batch_size)])


def averaged(several: list[Scores]) -> Scores:
    """Return one set of scores with word errors averaged over seeds, utterance by utterance."""
    errors = torch.stack([one.details["word errors"] for one in several]).mean(0)
    return replace(several[0], loss=torch.stack([one.loss for one in several]).mean(0), details={**several[0].details, "word errors": errors})


def told(estimate: Estimate, *, signed: bool = False) -> str:
    """Return percent with its interval."""
    sign = "+" if signed else ""
    return f"{100 * estimate.value:{sign}.1f} ({100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f})"


def row(name: str, several: list[Scores], others: tuple[Scores, Scores, Scores], about: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one way to teach; `others` are the teacher, the untaught student, and what CE + KL reached."""
    mine, (dense, start, reference) = averaged(several), others
    words = dense.details["words"].sum()
    _, rate, change = word_error_rates(dense, mine, 0.95)
    gained, against = word_error_rates(start, mine, 0.95)[2], word_error_rates(reference, mine, 0.95)[2]
    per_seed = [float(one.details["word errors"].sum() / words) for one in several]
    figures = {"wer": rate, "change_from_teacher": change, "change_from_untaught": gained, "change_from_ce_kl": against}
    cells = [name, told(rate), f"{100 * min(per_seed):.1f} to {100 * max(per_seed):.1f}" if len(per_seed) > 1 else "-", told(change, signed=True), told(gained, signed=True),
             told(against, signed=True), f"{float((mine.loss * mine.weight).sum() / mine.weight.sum()):.3f}", about.get("trainable", "-"), f"{about['seconds']:.0f}" if about.get("seconds") else "-"]  # fmt: skip
    return {"loss": name, "per_seed": per_seed, **about, **{key: [value.value, value.low, value.high] for key, value in figures.items()}, "line": "| " + " | ".join(cells) + " |"}


HEADER = "| taught by | WER % (95%) | over seeds | against the teacher | against the untaught student | against CE + KL | loss, nats a token | trainable | seconds |\n" + "|---" * 9 + "|"


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Teach the student in every way, with every seed, and score it."""
    device = pick(options.device)
    task = encoded_task(options.model, options.frames, device)
    statistics, cut = Statistics(task), students(options)
    start = compress(task, wb.Recipe(cut), statistics).model
    dense, untaught = scores_of(task, task.model, device), scores_of(task, start, device)
    found: dict[str, list[Scores]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in options.losses:
        for seed in range(options.seeds):
            step = wb.Transfer(transfer_steps=options.steps, transfer_batch=options.batch, transfer_rate=options.rate, lora_rank=options.lora_rank, align_projection=options.projection,
                               align_weight=options.align_weight, seed=seed, targets=DECODER, **LOSSES[name])  # fmt: skip
            begun = time.perf_counter()
            made = compress(task, wb.Recipe(cut, step), statistics)
            seconds = time.perf_counter() - begun
            found.setdefault(name, []).append(scores_of(task, made.model, device))
            (words,) = {match[0] for line in made.report if (match := re.search(r"[\d,]+ numbers, [\d.]+%", line.outcome))}
            facts[name] = {"trainable": words.replace(" numbers, ", " = "), "seconds": seconds, "recipe": repr(wb.Recipe(cut, step))}
            print(name, seed, f"{seconds:.0f} s", made.curve[0][1], made.curve[-1][1], float(found[name][-1].details["word errors"].sum() / dense.details["words"].sum()), flush=True)
    reference = averaged(found["CE + KL"]) if "CE + KL" in found else untaught
    others = dense, untaught, reference
    rows = [row("(the teacher)", [dense], others, {}), row("(untaught student)", [untaught], others, {})]
    rows += [row(name, several, others, facts[name]) for name, several in found.items()]
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in (("teacher_parameters", task.model), ("student_parameters", start))}
    return rows, {**sizes, "training_utterances": len(task.training), "evaluation_utterances": len(task.evaluation), "evaluation_words": int(dense.details["words"].sum()), "student": repr(cut)}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="whisper-base")
    parser.add_argument("--student", choices=["rank", "depth"], default="rank")
    parser.add_argument("--rank-ratio", type=float, default=0.3)
    parser.add_argument("--depth", type=float, default=0.34, help="fraction of the decoder's blocks that go")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--lora-rank", type=int, default=4)
    parser.add_argument("--projection", choices=["fixed", "trained", "none"], default="fixed")
    parser.add_argument("--align-weight", type=float, default=1.0)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="path without suffix")
    options = parser.parse_args()
    rows, facts = run(options)
    table = HEADER + "\n" + "\n".join(made.pop("line") for made in rows)
    print(table)
    about = {"command": "python " + " ".join(sys.argv), "date": dt.datetime.now(dt.UTC).date().isoformat(), "device": describe(pick(options.device)), "versions": versions(), **facts}
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps({"what": "five losses for a compressed Whisper decoder", **about, "rows": rows}, indent=1) + "\n")
        said = "\n".join(f"- {name}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}" for name, value in about.items())
        options.out.with_suffix(".md").write_text(f"# Five losses for a compressed Whisper decoder\n\n{said}\n\n{table}\n")


if __name__ == "__main__":
    main()
