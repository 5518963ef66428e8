"""What transformers has to be told while a model is captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from workbench.util.library_internals import MASKS


@contextmanager
def one_sequence_each() -> Iterator[None]:
    """Within, transformers does not look for several sequences packed into one window, and makes no mask that
    nobody gave it.

    That asks the GPU, which a capture cannot; told that a graph is captured, transformers takes for granted
    that there are some and gives attention a mask, which makes it choose another kernel and repeat shared
    keys and values in memory (up to 5.17 it did so even where there is no padding to look at). The windows
    that are timed and evaluated hold one sequence each.
    """
    from transformers import masking_utils

    own = {name: getattr(masking_utils, name) for name in MASKS}
    instead = {
        "find_packed_sequence_indices": lambda position_ids: None,  # noqa: ARG005
        "is_tracing": lambda tensor=None: tensor is not None and own["is_tracing"](tensor),
    }
    for name in own:
        setattr(masking_utils, name, instead[name])
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(masking_utils, name, function)


@contextmanager
def as_if_captured() -> Iterator[None]:
    """Answer yes to models that ask whether they are being captured: the runs before the capture then take
    the path that is captured, and compile it.

    Transformers asks before it looks into a mask, which cannot be done while capturing.
    """
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked
