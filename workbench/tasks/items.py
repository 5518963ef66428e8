"""Examples as tensors: what a model is given and what is wanted of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workbench.errors import DataError

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
