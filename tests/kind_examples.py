"""A tiny model and data for each kind of task that is registered, as folders and files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import speech_models
import tiny_models
from PIL import Image
from test_similarity import encoder, pairs

SPELLED = ("one", "too", "apple", "ball", "egg", "cat", "dog", "bee", "jazz", "kitten", "mill", "letter")


def pictures(folder: Path) -> Path:
    """Write 24 pictures of each of two classes."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(24):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


def judged(path: Path) -> Path:
    """Write 48 texts of two classes."""
    draw = np.random.default_rng(0)
    rows = [
        (" ".join(f"w{i}" for i in draw.integers(0, 60, 5)), ("bad", "good")[row % 2]) for row in range(48)
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


# (an empty folder) -> a model's folder and data for it
EXAMPLES: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "image classification": lambda at: (tiny_models.vit(at / "model"), pictures(at / "data")),
    "text classification": lambda at: (tiny_models.bert(at / "model"), judged(at / "data.csv")),
    "language modelling": lambda at: (
        tiny_models.llama(at / "model"),
        tiny_models.words_file(at / "data.txt", 800),
    ),
    "sentence similarity": lambda at: (encoder(at / "model"), pairs(at / "data.csv")),
    "speech recognition": lambda at: (
        speech_models.whisper(at / "model"),
        speech_models.sounds(at / "data", speech_models.words(24)),
    ),
    "speech recognition (CTC)": lambda at: (
        speech_models.wav2vec2(at / "model"),
        speech_models.sounds(at / "data", [f"a {word} letter {word}" for word in SPELLED]),
    ),
}
