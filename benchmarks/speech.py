"""Five losses side by side: a Whisper decoder is cut, then taught by its dense self through LoRA.

Word error rates, paired.

    python benchmarks/speech.py --out benchmarks/results/speech-whisper-base
    python benchmarks/speech.py --frames 1500 --steps 400 --batch 16 --device cuda --seconds 500 --out
        benchmarks/results/speech-whisper-base-long

Losses: cross entropy; + KL; + KL + hidden MSE; + KL + cosine; + KL + geodesic (2606.00771). Only the decoder
is compressed and taught, so the encoder runs once for all: what it heard stays on the device, cut after
`--frames` (50 a second; 300 are 6 s, 1500 all), and only utterances that end two seconds before and have up
to 32 tokens are used. Evaluation utterances are never trained on; all are by one speaker. Writes a .json with
every figure and a .md with the table after each training, all losses of a seed before the next seed: a run
that is cut off leaves what it measured, and the same command with `--resume` goes on from there. With
`--seconds` no training begins that would not end in time, going by the longest so far. Word errors are
averaged over seeds before utterances are drawn again, so intervals are those of utterances, not of seeds; the
spread over seeds stands beside them.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.metrics.bootstrap import word_error_rates
from workbench.metrics.estimate import Estimate
from workbench.metrics.scores import Scores
from workbench.tasks import score
from workbench.tasks.base import Items, Task
from workbench.tasks.likelihood import likelihoods
from workbench.tasks.speech_recognition import SpeechRecognition, encode, greedy, longest
from workbench.tasks.transcripts import spoken_scores
from workbench.util.device import describe, pick
from workbench.util.environment import versions
from workbench.zoo import load_task

DECODER = ("re:^model.decoder.layers",)
TOKENS = 32  # of words and the end
LENGTH = TOKENS + 3  # and those before the words
# Hundredths of a second that stay after the last word: with none, even the teacher goes on without an end
SILENCE = 200
LOSSES: dict[str, dict[str, Any]] = {
    "CE": {"kl_weight": 0, "align": "none"},
    "CE + KL": {"align": "none"},
    "CE + KL + MSE": {"align": "mse"},
    "CE + KL + cosine": {"align": "cosine"},
    "CE + KL + geodesic": {"align": "geodesic"},
}


@dataclass(frozen=True)
class Heard(SpeechRecognition):
    """Speech recognition from what the encoder made of it: `encoded` [N, frames, width] in the place of
    features."""

    def logits(self, model: torch.nn.Module, items: Items) -> Tensor:
        return model(
            encoder_outputs=(items.inputs["encoded"],),
            decoder_input_ids=items.inputs["decoder_input_ids"],
            use_cache=False,
        ).logits

    def score(self, model: torch.nn.Module, items: Items) -> Scores:
        forced = likelihoods(self.logits(model, items), items.labels)
        heard = self.writes.texts(greedy(model, items.inputs["encoded"], self.writes, longest(model, items)))
        return spoken_scores(self.writes.texts(items.labels), heard, forced.loss, forced.weight)


@torch.inference_mode()
def heard(task: Task, items: Items, frames: int, device: torch.device) -> Items:
    """Return the items that fit, on the device, with the encoder's output in the place of sound."""
    short = (items.inputs["attention_mask"].sum(1) <= 2 * frames - SILENCE) & (
        (items.labels != -100).sum(1) <= TOKENS
    )
    kept = items[short.nonzero().flatten()]
    encoded = torch.cat([encode(task.model, part.to(device))[:, :frames] for part in kept.batches(8)])
    return Items(
        {
            "encoded": encoded.clone(),
            "decoder_input_ids": kept.inputs["decoder_input_ids"][:, :LENGTH].to(device),
        },
        kept.labels[:, :LENGTH].to(device),
    )


def encoded_task(model: str, frames: int, device: torch.device) -> Task:
    """Return the model with its data heard.

    Projections and decompositions are fitted to all training items.
    """
    task = load_task(
        model, device=device, calibration_items=8, training_items=45, offline=True, progress=False
    )
    pools = {
        name: heard(task, getattr(task, name), frames, device)
        for name in ("evaluation", "calibration", "training")
    }
    both = pools["calibration"], pools["training"]
    every = Items(
        {name: torch.cat([part.inputs[name] for part in both]) for name in both[0].inputs},
        torch.cat([part.labels for part in both]),
    )
    return replace(
        task,
        kind=Heard(writing=task.kind.writes),
        evaluation=pools["evaluation"],
        calibration=every,
        training=every,
        batch_size=64 if device.type == "cuda" else 16,
    )


def students(options: argparse.Namespace) -> tuple[wb.Step, tuple[wb.Step, ...]]:
    """Return the step that makes the student, and those that follow the teaching: a folded LoRA would leave a
    grid."""
    rounded = (wb.Quantize(weight_bits=options.bits, group_size=64, targets=DECODER),) if options.bits else ()
    if options.student == "rank":
        return wb.LowRank(rank_ratio=options.rank_ratio, targets=DECODER), rounded
    return wb.Prune(sparsity=options.depth, pattern="layers", targets=DECODER), rounded


def scores_of(task: Task, model: torch.nn.Module, device: torch.device) -> Scores:
    """Return the scores of all evaluation utterances."""
    return Scores.join(
        [score(task.kind, model, part.to(device)) for part in task.evaluation.batches(task.batch_size)]
    )


def averaged(several: list[Scores]) -> Scores:
    """Return one set of scores with word errors averaged over seeds, utterance by utterance."""
    errors = torch.stack([scores.details["word errors"] for scores in several]).mean(0)
    return replace(
        several[0],
        loss=torch.stack([scores.loss for scores in several]).mean(0),
        details={**several[0].details, "word errors": errors},
    )


def told(estimate: Estimate, *, signed: bool = False) -> str:
    """Return percent with its interval."""
    sign = "+" if signed else ""
    return (
        f"{100 * estimate.value:{sign}.1f} ({100 * estimate.low:{sign}.1f} to"
        f" {100 * estimate.high:{sign}.1f})"
    )


def row(
    name: str, several: list[Scores], others: tuple[Scores, Scores, Scores | None], about: dict[str, Any]
) -> dict[str, Any]:
    """Return the figures of a way to teach.

    `others` are the teacher, the untaught student, and what CE + KL reached, if it was measured.
    """
    mine, (dense, start, reference) = averaged(several), others
    word_count = dense.details["words"].sum()
    _, rate, change = word_error_rates(dense, mine, 0.95)
    figures = {
        "wer": rate,
        "change_from_teacher": change,
        "change_from_untaught": word_error_rates(start, mine, 0.95)[2],
    }
    if reference is not None:
        figures["change_from_ce_kl"] = word_error_rates(reference, mine, 0.95)[2]
    per_seed = [float(scores.details["word errors"].sum() / word_count) for scores in several]
    loss, seconds = float((mine.loss * mine.weight).sum() / mine.weight.sum()), about.get("seconds", [])
    cells = [
        name,
        told(rate),
        (
            f"{100 * min(per_seed):.1f} to {100 * max(per_seed):.1f} of {len(several)}"
            if len(per_seed) > 1
            else "-"
        ),
    ]
    cells += [
        told(figures[key], signed=True) if key in figures else "-"
        for key in ("change_from_teacher", "change_from_untaught", "change_from_ce_kl")
    ]
    cells += [
        f"{loss:.3f}",
        about.get("trainable", "-"),
        f"{sum(seconds) / len(seconds):.0f}" if seconds else "-",
    ]
    values = {key: [value.value, value.low, value.high] for key, value in figures.items()}
    utterances = {
        "word_errors": [scores.details["word errors"].int().tolist() for scores in several],
        "nats": [[round(value, 6) for value in scores.loss.tolist()] for scores in several],
    }
    return {
        "loss": name,
        "per_seed": per_seed,
        "loss_nats": loss,
        **about,
        **values,
        "utterances": utterances,
        "line": "| " + " | ".join(cells) + " |",
    }


HEADER = (
    "| taught by | WER % (95%) | over seeds | against the teacher | against the untaught student | against CE"
    " + KL | loss, nats a token | trainable | seconds |\n" + "|---" * 9 + "|"
)


@dataclass
class Trainings:
    """The trainings measured so far; mutable.

    `scores` and `facts` (trainable numbers, seconds, recipe) are by loss.
    """

    dense: Scores
    untaught: Scores
    scores: dict[str, list[Scores]]
    facts: dict[str, dict[str, Any]]

    def add(self, name: str, scores: Scores, recipe: wb.Recipe, trainable: str, seconds: float) -> None:
        """Count one training."""
        self.scores.setdefault(name, []).append(scores)
        about = self.facts.setdefault(name, {"trainable": trainable, "seconds": [], "recipe": repr(recipe)})
        about["seconds"].append(round(seconds, 1))

    def read(self, rows: list[dict[str, Any]]) -> None:
        """Count the trainings in the rows of an earlier run."""
        for entry in rows:
            if entry["loss"] not in LOSSES:
                continue
            several = zip(entry["utterances"]["word_errors"], entry["utterances"]["nats"], strict=True)
            self.scores[entry["loss"]] = [
                replace(
                    self.untaught,
                    loss=torch.tensor(nats, dtype=torch.float64),
                    details={
                        **self.untaught.details,
                        "word errors": torch.tensor(errors, dtype=torch.float64),
                    },
                )
                for errors, nats in several
            ]
            self.facts[entry["loss"]] = {name: entry[name] for name in ("trainable", "seconds", "recipe")}

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of every way to teach that was tried."""
        others = (
            self.dense,
            self.untaught,
            averaged(self.scores["CE + KL"]) if "CE + KL" in self.scores else None,
        )
        still = [
            row("(the teacher)", [self.dense], others, {}),
            row("(untaught student)", [self.untaught], others, {}),
        ]
        return still + [
            row(name, self.scores[name], others, self.facts[name]) for name in LOSSES if name in self.scores
        ]


def earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of an earlier run with the same settings, none without --resume or without its file."""
    path = options.out.with_suffix(".json") if options.out else None
    if not options.resume or path is None or not path.is_file():
        return []
    previous = json.loads(path.read_text())
    if previous.get("settings") != settings(options):
        sys.exit(
            f"{path} was measured with {previous.get('settings')}, this would be {settings(options)}: give"
            " another --out, or leave --resume out"
        )
    rows: list[dict[str, Any]] = previous["rows"]
    return rows


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that figures depend on."""
    return {
        name: value
        for name, value in vars(options).items()
        if name not in {"losses", "seeds", "seconds", "device", "note", "out", "resume"}
    }


def run(options: argparse.Namespace) -> Iterator[tuple[Trainings, dict[str, Any]]]:
    """Teach the student in every way, with every seed, and score it.

    Yield the results after each training, with the facts that stay.
    """
    began, device, rows = time.perf_counter(), pick(options.device), earlier(options)
    task = encoded_task(options.model, options.frames, device)
    statistics, (cut, rounded) = Statistics(task), students(options)
    start = compress(task, wb.Recipe(cut, *rounded), statistics).model
    results = Trainings(scores_of(task, task.model, device), scores_of(task, start, device), {}, {})
    results.read(rows)
    sizes = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in (("teacher_parameters", task.model), ("student_parameters", start))
    }
    data = {
        "training_utterances": len(task.training),
        "evaluation_utterances": len(task.evaluation),
        "evaluation_words": int(results.dense.details["words"].sum()),
    }
    about: dict[str, Any] = {
        **sizes,
        **data,
        "student": " and ".join(map(repr, (cut, *rounded))),
        "trainings": "none",
    }
    print(f"ready after {time.perf_counter() - began:.0f} s: {data}", flush=True)
    plan = [(seed, name) for seed in range(options.seeds) for name in options.losses]
    longest_yet = 0.0
    for done, (seed, name) in enumerate(plan):
        if seed < len(results.scores.get(name, [])):
            about["trainings"] = f"{done + 1} of {len(plan)}"
            continue
        if options.seconds and time.perf_counter() - began + longest_yet > options.seconds:
            about["trainings"] = (
                f"{sum(map(len, results.scores.values()))} of {len(plan)}: ended early, as the next would not"
                f" have been done within --seconds {options.seconds:g}"
            )
            break
        step = wb.Transfer(
            transfer_steps=options.steps,
            transfer_batch=options.batch,
            transfer_rate=options.rate,
            lora_rank=options.lora_rank,
            align_projection=options.projection,
            align_weight=options.align_weight,
            transfer_look_every=0,
            seed=seed,
            targets=DECODER,
            **LOSSES[name],
        )
        recipe, begun = wb.Recipe(cut, step, *rounded), time.perf_counter()
        compressed = compress(task, recipe, statistics)
        seconds = time.perf_counter() - begun
        scores = scores_of(task, compressed.model, device)
        (trainable,) = {
            match[0]
            for line in compressed.report
            if (match := re.search(r"[\d,]+ numbers, [\d.]+%", line.outcome))
        }
        results.add(name, scores, recipe, trainable.replace(" numbers, ", " = "), seconds)
        longest_yet = max(longest_yet, time.perf_counter() - begun)
        about["trainings"] = f"{done + 1} of {len(plan)}"
        rate = float(scores.details["word errors"].sum() / results.dense.details["words"].sum())
        print(
            f"{name}, seed {seed}: {seconds:.0f} s, loss {compressed.curve[0][1]:.3f} to"
            f" {compressed.curve[-1][1]:.3f},"
            f" WER {100 * rate:.1f}%; {about['trainings']} after {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        yield results, about
    yield results, about


def write(out: Path | None, results: Trainings, about: dict[str, Any]) -> str:
    """Write the results so far to files; return the table."""
    rows = results.rows()
    table = HEADER + "\n" + "\n".join(entry.pop("line") for entry in rows)
    if out:
        out.with_suffix(".json").write_text(
            json.dumps(
                {"what": "five losses for a compressed Whisper decoder", **about, "rows": rows}, indent=1
            )
            + "\n"
        )
        said = "\n".join(
            f"- {name}:"
            f" {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}"
            for name, value in about.items()
        )
        out.with_suffix(".md").write_text(
            f"# Five losses for a compressed Whisper decoder\n\n{said}\n\n{table}\n"
        )
    return table


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="whisper-base")
    parser.add_argument("--student", choices=["rank", "depth"], default="rank")
    parser.add_argument("--rank-ratio", type=float, default=0.3)
    parser.add_argument("--depth", type=float, default=0.34, help="fraction of the decoder's blocks that go")
    parser.add_argument(
        "--bits",
        type=int,
        default=0,
        help="round the decoder's weights to so many bits in groups of 64 after teaching; 0 does not",
    )
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--lora-rank", type=int, default=4)
    parser.add_argument("--projection", choices=["fixed", "trained", "none"], default="fixed")
    parser.add_argument("--align-weight", type=float, default=1.0)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help="begin no training that would end later than this after the start; 0 does all",
    )
    parser.add_argument("--resume", action="store_true", help="go on where the files of --out end")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", help="what a reader should know, such as what else the machine did")
    parser.add_argument("--out", type=Path, help="path without suffix")
    options = parser.parse_args()
    facts = {
        "command": "python " + " ".join(sys.argv),
        "settings": settings(options),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": describe(pick(options.device)),
        "versions": versions(),
    }
    noted = {"note": options.note} if options.note else {}
    table = ""
    for results, about in run(options):
        table = write(options.out, results, {**facts, **about, **noted})
    print(table)


if __name__ == "__main__":
    main()
