"""What a task is: a model, data to calibrate, train and evaluate on, and the kind of task that says how both
are read and scored.

One file a kind of task, registered in `workbench.tasks.registry`: `image_classification`,
`text_classification`, `language_modelling`, `sentence_similarity`, `speech_recognition`, `ctc`. Everything
above these pages sees only `Task`, `Items`, `Scores` and the facts of a `Kind`, so that nothing in the engine
is special to one model or data set.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor, nn

from workbench.errors import DataError
from workbench.metrics.scores import Scores
from workbench.modules.experts import with_separate_experts
from workbench.tasks.columns import Raw
from workbench.tasks.items import Batch, ItemCounts, Items, Pools, Reading

__all__ = ["Batch", "Items", "Kind", "Losses", "Task", "View"]

View = Literal["classes", "continuations", "told apart"]


class Losses(Protocol):
    """What a model is trained by."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the task's loss of the outputs, a scalar to be made small."""

    def soft_loss(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return how far a student's outputs are from its teacher's, a scalar to be made small."""


class Kind:
    """A kind of task: its facts, how its data become items, and what is done with a model of it.

    A subclass is a frozen dataclass in a file of its own; one instance of it is registered
    (`workbench.tasks.registry.KINDS`). Facts without a value here have to be stated, and registration refuses
    a kind that leaves one out: None where a thing does not exist, or is not known. Fields of the dataclass
    hold what a single model adds (how it pools, how it writes), see `prepared`.
    """

    name: ClassVar[str]  # as shown to users, such as "image classification"; no two kinds share one
    auto_class: ClassVar[str]  # the transformers class that loads a model: "AutoModelForImageClassification"
    architectures: ClassVar[tuple[str, ...]]  # how the names of its classes in config.json end
    # transformers' table of model types that have such a class ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"); None: a
    # config.json that names no class is never taken for this kind
    type_mapping: ClassVar[str | None]

    primary: ClassVar[str]  # the metric that quality means, one of `workbench.metrics.metrics`
    # What a changed answer is: "answers" (of `Scores`), or the one of their details by which items are put in
    # order; None where answers cannot be told apart
    flips_by: ClassVar[str | None]
    # What one answer is, if it is a probability for each class or token, scored by likelihood in one forward
    # pass; None: there is no KL divergence, and no graph
    distribution: ClassVar[str | None]
    # What `logits` returns: "distributions" before their softmax, or what else, in a word: "vectors"
    outputs: ClassVar[str]

    sizes: ClassVar[ItemCounts]  # items evaluated, calibrated and trained on unless the user says otherwise
    latency_items: ClassVar[int]  # in the batch that is timed
    sensitivity_items: ClassVar[int]  # evaluated for each layer alone
    data_names: ClassVar[tuple[str, ...]]  # named data that fit, of `workbench.tasks.sources`
    default_data: ClassVar[tuple[str, ...]]  # tried in this order when none are named; empty: to be named
    files: ClassVar[tuple[str, ...]]  # of a model's folder, which an export takes along where they are there

    kv_cache: ClassVar[bool]  # whether a model keeps keys and values from token to token
    behaviour: ClassVar[View | None]  # how what changed is shown (`workbench.measure.behaviour`)

    # Faster ways that hold for some kinds; without them everything is right, and slower
    masked_texts: ClassVar[bool] = False  # what the mask leaves out changes no answer
    chunked_head: ClassVar[bool] = False  # logits of a large vocabulary may be made piece by piece
    fused_blocks: ClassVar[bool] = False  # blocks of decoders, fused on a GPU

    def why_not(self, config: Mapping[str, Any]) -> str:  # noqa: ARG002  for kinds that take only some
        """Return why a model whose class is named like this kind's is none of it, "" where it is; `config` is
        config.json.
        """
        return ""

    @abstractmethod
    def processor(self, directory: Path, config: Mapping[str, Any]) -> Any:
        """Return the processor that makes a model's inputs from raw data: the tokenizer or image processor of
        a folder.

        Raises:
            ModelError: missing files, or ones that cannot be read.
        """

    # For kinds that read more from a model's folder
    def prepared(
        self,
        model: nn.Module,  # noqa: ARG002
        directory: Path,  # noqa: ARG002
        processor: Any,  # noqa: ARG002
    ) -> tuple[Self, tuple[str, ...]]:
        """Return the kind with what this model's own files add, and notes; the model may be marked.

        Raises:
            ModelError: files that ask for what is not built.
        """
        return self, ()

    @abstractmethod
    def pools(self, reading: Reading, raw: Raw, sizes: ItemCounts) -> Pools:
        """Return the items to train on, those to evaluate on if they are held out (else None), and notes.

        Raises:
            DataError: rows that do not fit the kind.
        """

    @abstractmethod
    def labels(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the classes that a model chooses from, in the order of its outputs; none where
        it does not.
        """

    @abstractmethod
    def batch_size(self, evaluation: Items, *, on_cpu: bool) -> int:
        """Return how many items are run at once: few where an item is large, more on a GPU."""

    @abstractmethod
    def logits(self, model: nn.Module, items: Items) -> Tensor:
        """Return the model's outputs, [items, ...]: logits aligned with the labels, or embeddings.

        They are what training, distillation and gradients look at, and one call is one forward pass.
        """

    @abstractmethod
    def score(self, model: nn.Module, items: Items) -> Scores:
        """Return the scores of `model` on items that lie on its device."""

    def run(self, model: nn.Module, items: Items) -> object:
        """Do what a user waits for, to be timed: one forward pass."""
        return self.logits(model, items)

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the task's loss of the outputs, a scalar to be made small: what training and gradients are
        of.
        """

    @abstractmethod
    def soft_loss(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return how far a student's outputs are from its teacher's, a scalar to be made small."""

    @abstractmethod
    def together(self, answers: Tensor, temperature: float) -> Tensor:
        """Return the outputs that stand for those of several teachers, `answers` [teachers, ...], at a
        temperature.
        """

    def cpu_looks(self, items: Items) -> tuple[int, ...]:  # noqa: ARG002  for kinds of large items
        """Return numbers of items to look at on a CPU before the looks that are taken everywhere."""
        return ()

    def audio_seconds(self, items: Items) -> float | None:  # noqa: ARG002  for kinds of sound
        """Return how long the items' sound lasts, None where they are none: there is no real-time factor."""
        return None

    def examples(self, model: nn.Module, items: Items) -> list[tuple[str, str]]:  # noqa: ARG002
        """Return (what was asked, what the model answers) for each item, in words.

        Kinds whose behaviour is "told apart" have them.
        """
        raise DataError(f"{self.name} has no answers in words")


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
        """Refuse empty data and data that overlap; give experts layers of their own."""
        object.__setattr__(self, "model", with_separate_experts(self.model))
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
