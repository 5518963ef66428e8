"""Sound files as mono float32 at 16 kHz; what cannot be heard is said."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import DataError
from workbench.tasks.transcripts import EXTRA

RATE = 16_000
LOWEST = 2_000  # Hz: below, no consonant is left, and the header is wrong rather than the recording slow
SILENCE = 1e-3  # of the largest amplitude, -60 dB: nothing that a person would hear
SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au"}


@dataclass(frozen=True)
class Sound:
    """Samples [N] between -1 and 1 at 16 kHz, and the rate in the file."""

    samples: NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        """Return how long it lasts."""
        return len(self.samples) / RATE

    @property
    def silent(self) -> bool:
        """Return whether nothing can be heard."""
        return not len(self.samples) or float(np.abs(self.samples).max()) < SILENCE


def opened(audio: Any, what: str) -> Sound:
    """Return sound from a path, or a dict with `bytes` or `path`, or with `array` and `sampling_rate`.

    Channels are averaged.

    Raises:
        DataError: soundfile is missing, or the file cannot be read, with `what` it is.
    """
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the C library is missing
        raise DataError(f"reading sound needs soundfile, which is not installed; {EXTRA}") from None
    if isinstance(audio, dict) and audio.get("array") is not None:
        values, rate = np.atleast_2d(np.asarray(audio["array"], np.float32)), int(audio["sampling_rate"])
    else:
        place = (
            audio
            if isinstance(audio, str | Path)
            else BytesIO(audio["bytes"])
            if audio.get("bytes")
            else audio["path"]
        )
        try:
            read, rate = soundfile.read(place, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError, TypeError, RuntimeError) as error:
            raise DataError(f"{what} cannot be read as sound: {' '.join(str(error).split())[:200]}") from None
        values = read.T
    if rate < LOWEST:
        raise DataError(
            f"{what} has {rate:,} samples a second, in which no speech can be heard: is its header right?"
            f" {LOWEST:,} Hz are the least, {RATE:,} what models are given"
        )
    mono = values.mean(0)
    if not np.isfinite(mono).all():
        raise DataError(f"{what} holds samples that are no numbers")
    return Sound(resampled(mono, rate), rate)


def resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Return sound at 16 kHz, through scipy's polyphase filter."""
    if rate == RATE:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(RATE, rate)
    filtered: NDArray[np.float32] = resample_poly(samples, RATE // common, rate // common).astype(np.float32)
    return filtered
