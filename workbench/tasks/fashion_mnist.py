"""The slice of Fashion-MNIST inside the package (Xiao, Rasul, Vollgraf 2017, MIT), and what it means."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workbench.errors import DataError

SLICE = "fashion-mnist-slice"
FILE = Path(__file__).parent / "pictures" / f"{SLICE}.npz"
MEAN, STD = 0.2860, 0.3530  # of the training images, grey levels in [0, 1]
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def slice_arrays() -> dict[str, np.ndarray]:
    """Return the embedded slice: evaluation_images [2000, 28, 28] and training_images [5000, 28, 28] uint8,
    and *_labels [N].

    Raises:
        DataError: the file is not in the package.
    """
    if not FILE.is_file():
        raise DataError(
            f"the embedded data {FILE} are missing: install the package again, or make them with"
            " workbench.zoo.train"
        )
    with np.load(FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
