"""What a task is: a model, data to calibrate, train and evaluate on, and how to score each item.

One file a kind of task: `image_classification`, `text_classification`, `language_modelling`,
`sentence_similarity`, `speech_recognition`. Everything after this page sees only `Task`, `Items` and
`Scores`, so that nothing in the engine is special to one model or data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workbench.errors import DataError
from workbench.metrics.scores import Scores

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Items:
    """A materialised set of examples: model inputs by keyword, first dimension = item, and `labels` ([N] or
    [N, L]).

    `inputs` are what `model(**inputs)` takes (`pixel_values` [N, C, H, W]; `input_ids`, `attention_mask` [N,
    L]; two texts an item, [N, 2, L], for sentence similarity). Labels of -100 are not scored (the convention
    of torch's cross entropy).
    """

    inputs: Batch
    labels: Tensor

    def __post_init__(self) -> None:
        """Refuse tensors of different lengths."""
        lengths = {name: len(tensor) for name, tensor in {**self.inputs, "labels": self.labels}.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"inputs and labels differ in length: {lengths}")

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Items:
        """Return the items of a slice or of an index tensor."""
        return Items({name: tensor[index] for name, tensor in self.inputs.items()}, self.labels[index])

    def to(self, device: torch.device | str) -> Items:
        """Return the same items on `device`."""
        return Items(
            {name: tensor.to(device) for name, tensor in self.inputs.items()}, self.labels.to(device)
        )

    def batches(self, size: int) -> Iterator[Items]:
        """Iterate over consecutive batches of at most `size` items."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """Return one hash per item, of its inputs alone: two items with the same hash are the same
        example.
        """
        columns = [self.inputs[name].cpu().contiguous() for name in sorted(self.inputs)]
        return tuple(
            hashlib.sha256(b"".join(column[i].numpy().tobytes() for column in columns)).hexdigest()[:16]
            for i in range(len(self))
        )

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all items and labels, in order: 16 hexadecimal digits."""
        digest = hashlib.sha256("".join(self.fingerprints).encode())
        digest.update(self.labels.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class Losses(Protocol):
    """What a model is trained by."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the task's loss of the outputs, a scalar to be made small."""

    def soft_loss(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return how far a student's outputs are from its teacher's, a scalar to be made small."""


class Kind(Losses, Protocol):
    """A kind of task; each file of this package has one instance of it."""

    @property
    def name(self) -> str:
        """Return the kind as shown to users, such as "image classification"."""

    @property
    def auto_class(self) -> str:
        """Return the transformers class that loads the model, such as "AutoModelForImageClassification"."""

    @property
    def primary(self) -> str:
        """Return the metric that quality means, one of `workbench.metrics.metrics`, such as "accuracy"."""

    @property
    def latency_items(self) -> int:
        """Return how many items a timed batch holds unless the user says otherwise."""

    def logits(self, model: nn.Module, items: Items) -> Tensor:
        """Return the model's outputs, first dimension = item: logits aligned with the labels, or embeddings.

        They are what training, distillation and gradients look at, and one call is one forward pass.
        """

    def score(self, model: nn.Module, items: Items) -> Scores:
        """Return what `model` does on items that lie on its device."""

    def run(self, model: nn.Module, items: Items) -> object:
        """Do what a user waits for, to be timed."""

    def audio_seconds(self, items: Items) -> float:
        """Return how long the items' sound lasts, 0 where they are none."""

    def examples(self, model: nn.Module, items: Items) -> list[tuple[str, str]]:
        """Return (what was asked, what the model answers) for each item, in words.

        None where a kind has no such words.
        """


@dataclass(frozen=True)
class Task:
    """A model and its data, ready to be measured. Build it with `workbench.zoo.load_task`.

    `evaluation` is in random order, so that any prefix is a fair sample. Calibration and training data share
    no item with evaluation data: the constructor checks it and raises `DataError`.
    """

    kind: Kind
    model: nn.Module
    model_name: str
    model_fingerprint: str
    data_name: str
    evaluation: Items
    calibration: Items
    training: Items
    labels: tuple[str, ...] = ()  # class names, if the task has classes
    batch_size: int = 64
    files: dict[str, bytes] = field(
        default_factory=dict
    )  # tokenizer and preprocessor files that an export takes along
    notes: tuple[str, ...] = ()  # what a user must know about model or data, shown with every measurement
    processor: Any = None  # tokenizer or image processor, where there is one

    def __post_init__(self) -> None:
        """Refuse empty data and data that overlap."""
        for role in ("evaluation", "calibration", "training"):
            if not len(getattr(self, role)):
                raise DataError(f"no {role} items in {self.data_name!r}: give at least one")
        held_out = set(self.evaluation.fingerprints)
        for role in ("calibration", "training"):
            shared = [i for i, name in enumerate(getattr(self, role).fingerprints) if name in held_out]
            if shared:
                raise DataError(
                    f"{role} and evaluation data of {self.data_name!r} overlap: {len(shared)} items, the"
                    f" first is {role} item {shared[0]}"
                )

    @property
    def data_fingerprint(self) -> str:
        """Return one hash of evaluation, calibration and training data."""
        return hashlib.sha256(
            (self.evaluation.fingerprint + self.calibration.fingerprint + self.training.fingerprint).encode()
        ).hexdigest()[:16]
