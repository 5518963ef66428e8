"""The models that can be picked by a short name, and where each comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from workbench.hub.wheel_archive import MINILM, SMOLLM2, WHISPER_BASE, WHISPER_TINY_EN, Archive
from workbench.tasks.fashion_mnist import SLICE
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.tasks.sentence_similarity import SENTENCE_SIMILARITY
from workbench.tasks.speech_recognition import SPEECH_RECOGNITION
from workbench.tasks.utterances import PROMPTS

EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class CatalogueEntry:
    """A line of `workbench models`. `parameters` is a count; `here` says that it loads without a network."""

    name: str
    task: str
    parameters: int
    licence: str
    source: str
    here: bool
    notes: str = ""


@dataclass(frozen=True)
class Listed:
    """A model of the catalogue: in the package (`embedded`), or a hub id with an archive for where no hub is
    reached.
    """

    name: str
    task: str
    parameters: int
    licence: str
    notes: str
    data: str | None = None  # the data to use when none are named
    embedded: bool = False
    hub: str | None = None
    archive: Archive | None = None

    @property
    def directory(self) -> Path:
        """Return the folder inside the package (of an embedded model)."""
        return EMBEDDED / self.name

    def entry(self) -> CatalogueEntry:
        """Return this model as a line for users, with a look at what is on this disk."""
        from workbench.hub import hub

        if self.embedded:
            here = (self.directory / "model.safetensors").is_file()
            return CatalogueEntry(
                self.name,
                self.task,
                self.parameters,
                self.licence,
                "in the package",
                here,
                self.notes + self._measured(),
            )
        here = (self.hub is not None and hub.cached(self.hub)) or (
            self.archive is not None and self.archive.ready()
        )
        source = f"hub {self.hub}" + (
            f", else archive {self.archive.package} {self.archive.version}" if self.archive else ""
        )
        return CatalogueEntry(self.name, self.task, self.parameters, self.licence, source, here, self.notes)

    def _measured(self) -> str:
        """Return the accuracy that training measured, on all 10,000 test images."""
        path = self.directory / "training.json"
        if not path.is_file():
            return ""
        return f"; {json.loads(path.read_text())['accuracy_test_10000']:.2%} on 10,000 test images"


CATALOGUE: tuple[Listed, ...] = (
    Listed(
        name="fashion-vit",
        task=IMAGE_CLASSIFICATION.name,
        parameters=1_002_506,
        licence="Apache-2.0 (data: Fashion-MNIST, MIT)",
        notes="vision transformer: 6 layers, 4 heads; trained here",
        data=SLICE,
        embedded=True,
    ),
    Listed(
        name="fashion-cnn",
        task=IMAGE_CLASSIFICATION.name,
        parameters=697_322,
        licence="Apache-2.0 (data: Fashion-MNIST, MIT)",
        notes="residual network: 3 stages; trained here, teacher of fashion-vit",
        data=SLICE,
        embedded=True,
    ),
    Listed(
        name="smollm2-135m",
        task=LANGUAGE_MODELLING.name,
        parameters=134_515_008,
        licence="Apache-2.0",
        notes="SmolLM2-135M-Instruct, a Llama of 30 layers",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        archive=SMOLLM2,
    ),
    Listed(
        name="all-MiniLM-L6-v2",
        task=SENTENCE_SIMILARITY.name,
        parameters=22_713_216,
        licence="Apache-2.0 (archive: MIT)",
        notes="sentence encoder, a BERT of 6 layers",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        archive=MINILM,
    ),
    Listed(
        name="whisper-tiny.en",
        task=SPEECH_RECOGNITION.name,
        parameters=37_760_256,
        licence="Apache-2.0 (archive: MIT)",
        notes="Whisper, English only: 4 + 4 layers",
        data=PROMPTS,
        hub="openai/whisper-tiny.en",
        archive=WHISPER_TINY_EN,
    ),
    Listed(
        name="whisper-base",
        task=SPEECH_RECOGNITION.name,
        parameters=72_593_920,
        licence="Apache-2.0 (archive: MIT)",
        notes="Whisper, many languages (measured in English): 6 + 6 layers",
        data=PROMPTS,
        hub="openai/whisper-base",
        archive=WHISPER_BASE,
    ),
)


def find(name: str) -> Listed | None:
    """Return the catalogue's model of this name, capitals or not, or None."""
    return next((listed for listed in CATALOGUE if listed.name.casefold() == name.casefold()), None)
