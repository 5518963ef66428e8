"""Random data and processors for tiny models: they are read as a user's own files are."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.architectures.models import CLASSES, WORDS

ITEMS = 160
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
SPOKEN = {
    name: index
    for index, name in enumerate(
        [
            "<|endoftext|>",
            "<|startoftranscript|>",
            "<|en|>",
            "<|transcribe|>",
            "<|translate|>",
            "<|startofprev|>",
        ]
    )
} | {"<|notimestamps|>": 6}


def spoken_word(index: int) -> str:
    """Return the word of a number that no normaliser changes: bax, bex, ... nux."""
    return f"{'bdfgklmn'[index // 5]}{'aeiou'[index % 5]}x"


# --- processors


def write_tokenizer(folder: Path, _size: int) -> None:
    """Write a tokenizer of the words `w0` ... with padding and end-of-text tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(WORDS))]
    numbers = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",  # noqa: S106
        pad_token="[PAD]",  # noqa: S106
        eos_token="[EOS]",  # noqa: S106
    ).save_pretrained(folder)


def write_image_processor(folder: Path, size: int) -> None:
    """Write how pictures become inputs, as vision models on a hub do."""
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)


def write_whisper_processor(folder: Path, _size: int) -> None:
    """Write Whisper's feature extractor, a tokenizer of forty words and how it generates."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperFeatureExtractor

    names = {**SPOKEN, **{spoken_word(i): len(SPOKEN) + i for i in range(40)}}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<|endoftext|>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPOKEN])
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    GenerationConfig(
        decoder_start_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
        no_timestamps_token_id=6,
        is_multilingual=False,
        suppress_tokens=[1, 2, 3, 4, 5, 6],
        begin_suppress_tokens=[0],
        max_length=12,
        return_timestamps=False,
    ).save_pretrained(folder)


def write_letters(folder: Path, _size: int) -> None:
    """Write the feature extractor and the letters of a CTC model."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)


PROCESSORS: dict[str, Callable[[Path, int], None]] = {
    "language": write_tokenizer,
    "text": write_tokenizer,
    "image": write_image_processor,
    "whisper": write_whisper_processor,
    "ctc": write_letters,
}


# --- data


def sentence(draw: np.random.Generator, length: int = 12) -> str:
    """Return random words that the tokenizer knows."""
    return " ".join(f"w{i}" for i in draw.integers(0, WORDS, length))


def write_text(folder: Path) -> Path:
    """Write running text."""
    draw = np.random.default_rng(0)
    path = folder / "text.txt"
    path.write_text("\n".join(sentence(draw) for _ in range(ITEMS * 4)))
    return path


def write_labelled_texts(folder: Path) -> Path:
    """Write texts with a class each, under the names that a configuration without names gives."""
    draw = np.random.default_rng(0)
    path = folder / "texts.jsonl"
    rows = ({"text": sentence(draw), "label": f"LABEL_{i % CLASSES}"} for i in range(ITEMS))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_pictures(folder: Path) -> Path:
    """Write a folder of pictures for each class."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for index in range(ITEMS):
        place = folder / "pictures" / f"LABEL_{index % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return folder / "pictures"


def write_sounds(folder: Path) -> Path:
    """Write half a second of noise and tone for each transcript."""
    import soundfile

    draw, place = np.random.default_rng(0), folder / "sounds"
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(ITEMS // 4):
        wave = draw.normal(0, 0.02, 8_000) + 0.5 * np.sin(np.arange(8_000) * (0.06 + 0.01 * index))
        soundfile.write(place / f"{index}.wav", wave.astype(np.float32), 16_000)
        rows.append((f"{index}.wav", " ".join(spoken_word(i) for i in draw.integers(0, 40, 4))))
    with (place / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "transcription"), *rows])
    return place


DATA: dict[str, Callable[[Path], Path]] = {
    "language": write_text,
    "text": write_labelled_texts,
    "image": write_pictures,
    "whisper": write_sounds,
    "ctc": write_sounds,
}
