"""Utterances: which rows of some data can be heard and have words, and how they become a speech model's
items.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from workbench.errors import DataError
from workbench.hub import debian
from workbench.tasks import audio, columns
from workbench.tasks.columns import Raw
from workbench.tasks.items import ItemCounts, Items, Pool, Pools
from workbench.tasks.reading import tables
from workbench.tasks.transcripts import Writing

MOST_SECONDS = 30.0
READ_AHEAD = 2  # utterances listened to for each one wanted, so that some may be left out
AUDIO_NAMES = ("audio", "file", "file_name", "path", "speech", "sound")
WORD_NAMES = ("text", "transcription", "transcript", "sentence", "normalized_text", "words")
PROMPTS = "asterisk-prompts"
PACKAGE = "asterisk-core-sounds-en-wav"
PROMPTS_FOLDER = "usr/share/asterisk/sounds/en_US_f_Allison"
PROMPTS_SHA256 = (  # of all 106 files, one after the other
    "e5c5794349e9e410be3739700fd9a9b5b26f9593e767e37bd8a0ed1478c318e7"
)


@dataclass(frozen=True)
class Utterance:
    """A row that can be used: where its sound is, its words, and how long it lasts."""

    audio: Any
    words: str
    seconds: float
    what: str


# As the other sources
def asterisk_prompts(*, offline: bool = False, progress: bool = True) -> Raw:  # noqa: ARG001
    """Return 106 English telephone prompts of one speaker (Allison Smith, CC-BY-SA 3.0), 8 kHz, with the
    transcripts of this package.

    Raises:
        DataError: not in the cache and they cannot be fetched, or other files than those that were
            transcribed.
    """
    from datasets import Dataset

    with (Path(__file__).parent / "prompts" / "asterisk_transcripts.tsv").open(
        encoding="utf-8", newline=""
    ) as file:
        rows = [(row[0], row[1]) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    folder = debian.unpacked(PACKAGE, offline=offline) / PROMPTS_FOLDER
    paths = [folder / f"{name}.wav" for name, _ in rows]
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise DataError(f"data {PROMPTS!r}: Debian's {PACKAGE} has no {path.name} any more")
        digest.update(path.read_bytes())
    if digest.hexdigest() != PROMPTS_SHA256:
        raise DataError(
            f"data {PROMPTS!r}: the recordings are not those that were transcribed (their sha256 is"
            f" {digest.hexdigest()[:12]}...)"
        )
    dataset = Dataset.from_dict({"audio": [str(path) for path in paths], "text": [text for _, text in rows]})
    notes = (
        (
            f"speech: {len(rows)} prompts of Asterisk, one speaker, Allison Smith (CC-BY-SA 3.0): easy, so"
            " error rates are optimistic"
        ),
    )
    return Raw(PROMPTS, {"train": dataset}, notes)


def audio_folder(path: Path) -> Mapping[str, Any] | None:
    """Return the rows of a folder with metadata.csv (`file_name` and words), or of its train and test
    folders; None if there is none.

    Raises:
        DataError: a table without these columns, or a file that it names is missing.
    """
    from datasets import Dataset

    tables = {split: path / split / "metadata.csv" for split in ("train", "test", "validation")} | {
        "": path / "metadata.csv"
    }
    present = {split or "train": table for split, table in tables.items() if table.is_file()}
    return {split: Dataset.from_dict(metadata(table)) for split, table in present.items()} or None


def metadata(table: Path) -> dict[str, list[str]]:
    """Return the columns `audio` (paths) and `text` of a metadata.csv."""
    told, _ = tables.options(table, "csv")
    with table.open(encoding=told.get("encoding", "utf-8"), newline="") as file:
        quoting = told.get("quoting", csv.QUOTE_MINIMAL)
        read = csv.DictReader(file, delimiter=told["sep"], quoting=quoting)
        rows, names = list(read), list(read.fieldnames or ())
    words_column = next((name for name in WORD_NAMES if name in names), None)
    if "file_name" not in names or words_column is None:
        raise DataError(
            f"{table} has columns {', '.join(names) or '(none)'}; expected file_name and one of"
            f" {', '.join(WORD_NAMES)}"
        )
    if not rows:
        raise DataError(
            f"{table} has the columns {', '.join(names)} and no row: give one for each file of sound"
        )
    for number, row in enumerate(rows):
        if not (table.parent / (row["file_name"] or "?")).is_file():
            raise DataError(f"{table}, row {number}: there is no file {row['file_name']!r}")
    return {
        "audio": [str(table.parent / row["file_name"]) for row in rows],
        "text": [row[words_column] or "" for row in rows],
    }


def speech_columns(name: str, rows: Any) -> tuple[str, str]:
    """Return the columns of sound and words.

    Raises:
        DataError: a column is missing; the message lists those that are there.

    """
    typed = [column for column, feature in rows.features.items() if type(feature).__name__ == "Audio"]
    sound = next((column for column in (*typed, *AUDIO_NAMES) if column in rows.column_names), None)
    words_column = next((column for column in WORD_NAMES if column in rows.column_names), None)
    if sound is None or words_column is None:
        raise DataError(
            f"data {name!r} have columns {', '.join(rows.column_names)}; speech recognition expects sound in"
            " a column 'audio' and words in a column 'text'"
        )
    return sound, words_column


class Maker(Protocol):
    """What makes a model's items from utterances."""

    def items(self, utterances: Sequence[Utterance]) -> Items:
        """Return their items, all padded to one length."""


def speech_pools(
    raw: Raw, sizes: ItemCounts, writing: Writing, maker: Callable[[Sequence[Utterance]], Maker]
) -> Pools:
    """Return utterances, one item a row, as `maker` of all of them makes their items.

    What cannot be heard, has no words or is too long is left out and counted in the notes.

    Raises:
        DataError: missing columns, a file that cannot be read, or nothing that is left.
    """
    held_out_name = columns.held_out(raw)
    train = columns.train_name(raw, held_out_name)
    wanted = {train: sizes.calibration + sizes.training + (0 if held_out_name else sizes.evaluation)} | (
        {held_out_name: sizes.evaluation} if held_out_name else {}
    )
    left, rates = dict[str, list[str]](), Counter[int]()
    heard = {
        split: listened(raw.name, raw.splits[split], count, writing, (left, rates))
        for split, count in wanted.items()
    }
    everything = [utterance for some in heard.values() for utterance in some]
    make = maker(everything)
    notes = [
        f"{counted(len(names), 'utterance')} left out: {reason} ({some_of(names)})"
        for reason, names in sorted(left.items())
    ]
    words_column = speech_columns(raw.name, raw.splits[train])[1]
    others = [name for name in WORD_NAMES if name in raw.splits[train].column_names and name != words_column]
    if others:
        notes.append(f"words are read from column {words_column!r}; not read: {', '.join(others)}")
    notes += [
        f"sound of {rate:,} Hz ({counted(count, 'file')}) is resampled to {audio.RATE:,} Hz"
        for rate, count in sorted(rates.items())
        if rate != audio.RATE
    ]

    def pool(some: Sequence[Utterance]) -> Pool:
        return Pool(len(some), lambda index: make.items([some[i] for i in index]))

    return pool(heard[train]), pool(heard[held_out_name]) if held_out_name else None, tuple(notes)


def listened(
    name: str, rows: Any, wanted: int, writing: Writing, counts: tuple[dict[str, list[str]], Counter[int]]
) -> list[Utterance]:
    """Return the usable ones of up to twice as many rows as are wanted, drawn over the whole split.

    Note the files left out by reason, and count rates.
    """
    left, rates = counts
    sound, words_column = speech_columns(name, rows)
    if type(rows.features[sound]).__name__ == "Audio":
        from datasets import Audio

        rows = rows.cast_column(sound, Audio(decode=False))
    order = sorted(np.random.default_rng(0).permutation(len(rows))[: READ_AHEAD * wanted + 16].tolist())
    usable = []
    for number, row in zip(order, rows.select(order), strict=True):
        text = row[words_column] if isinstance(row[words_column], str) else ""
        if not any(map(str.isalnum, writing.normalise(text))):
            left.setdefault("no words", []).append(name_of(row[sound]))
            continue
        what = f"item {number} of data {name!r} ({name_of(row[sound])})"
        opened = audio.opened(row[sound], what)
        rates[opened.rate] += 1
        if opened.silent or opened.seconds > MOST_SECONDS:
            left.setdefault("silent" if opened.silent else f"longer than {MOST_SECONDS:g} s", []).append(
                name_of(row[sound])
            )
            continue
        usable.append(Utterance(row[sound], " ".join(text.split()), opened.seconds, what))
    if not usable:
        reasons = (
            ", ".join(f"{len(names)} {reason} ({some_of(names)})" for reason, names in left.items())
            or "no rows"
        )
        raise DataError(
            f"data {name!r} hold no utterance that can be used: {reasons}; give files of at most"
            f" {MOST_SECONDS:g} s in which something is heard, each with its words in column {words_column!r}"
        )
    return usable


def name_of(sound: Any) -> str:
    """Return a file's name for messages."""
    return Path(str(sound.get("path") or "in memory") if isinstance(sound, dict) else str(sound)).name


def counted(count: int, noun: str) -> str:
    """Return such as `1 file`, `2 files`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def some_of(names: Sequence[str]) -> str:
    """Return the first three of some names, and whether there are more."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


@dataclass(frozen=True)
class Windows:
    """Makes Whisper's items: 30 seconds of features, and tokens padded to one length for all."""

    writing: Writing
    length: int

    @classmethod
    def of(cls, utterances: Sequence[Utterance], writing: Writing, config: Mapping[str, Any]) -> Windows:
        """Return the maker for all utterances of the data.

        Raises:
            DataError: words longer than the decoder can hold.

        """
        lengths = [len(writing.prefix) + len(tokens_of(utterance.words, writing)) for utterance in utterances]
        most = int(config.get("max_target_positions") or 448)
        if max(lengths) > most:
            raise DataError(
                f"{utterances[lengths.index(max(lengths))].what} has words of {max(lengths)} tokens; the"
                f" decoder holds {most}"
            )
        return cls(writing, max(lengths))

    def items(self, utterances: Sequence[Utterance]) -> Items:
        """Return `input_features` [N, mels, 3000], `attention_mask` [N, 3000] (sound or filling),
        `decoder_input_ids` and labels [N, length].
        """
        extracted = [self.features(utterance) for utterance in utterances]
        given = torch.full((len(extracted), self.length), self.writing.end)
        labels = torch.full((len(extracted), self.length), -100)
        for row, utterance in enumerate(utterances):
            start, tokens = len(self.writing.prefix), tokens_of(utterance.words, self.writing)
            given[row, : start + len(tokens)] = torch.tensor([*self.writing.prefix, *tokens])
            labels[row, start - 1 : start + len(tokens)] = torch.tensor([*tokens, self.writing.end])
        inputs = {
            name: torch.cat([tensors[name] for tensors in extracted])
            for name in ("input_features", "attention_mask")
        }
        return Items({**inputs, "decoder_input_ids": given}, labels)

    def features(self, utterance: Utterance) -> dict[str, Tensor]:
        """Return the features of one utterance."""
        samples = audio.opened(utterance.audio, utterance.what).samples
        extracted = self.writing.features(
            samples, sampling_rate=audio.RATE, return_tensors="pt", return_attention_mask=True
        )
        return {
            "input_features": extracted["input_features"].float(),
            "attention_mask": extracted["attention_mask"].long(),
        }


def tokens_of(words: str, writing: Writing) -> list[int]:
    """Return the tokens of words as Whisper writes them: after a space, without prefix and end."""
    return list(writing.tokenizer(f" {words}", add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Frames:
    """Makes items of models that read the wave: samples and letters padded to one length for all."""

    writing: Writing
    samples: int
    length: int

    @classmethod
    def of(cls, utterances: Sequence[Utterance], writing: Writing) -> Frames:
        """Return the maker for all utterances of the data."""
        return cls(
            writing,
            max(round(utterance.seconds * audio.RATE) for utterance in utterances),
            max(len(letters_of(utterance.words, writing)) for utterance in utterances),
        )

    def items(self, utterances: Sequence[Utterance]) -> Items:
        """Return `input_values`, `attention_mask` [N, samples] and labels [N, length]."""
        values, mask = (
            torch.zeros(len(utterances), self.samples),
            torch.zeros(len(utterances), self.samples, dtype=torch.long),
        )
        labels = torch.full((len(utterances), self.length), -100)
        for row, utterance in enumerate(utterances):
            samples = audio.opened(utterance.audio, utterance.what).samples
            wave = self.writing.features(samples, sampling_rate=audio.RATE, return_tensors="pt")[
                "input_values"
            ][0]
            values[row, : len(wave)], mask[row, : len(wave)] = wave, 1
            letters = letters_of(utterance.words, self.writing)
            labels[row, : len(letters)] = torch.tensor(letters)
        return Items({"input_values": values, "attention_mask": mask}, labels)


def letters_of(words: str, writing: Writing) -> list[int]:
    """Return the tokens of words, in the case that the model writes, without punctuation."""
    plain = " ".join(
        "".join(letter if letter.isalnum() or letter in " '" else " " for letter in words).split()
    )
    vocabulary = writing.tokenizer.get_vocab()
    return list(
        writing.tokenizer(plain.upper() if "A" in vocabulary else plain.lower(), add_special_tokens=False)[
            "input_ids"
        ]
    )
