"""Loading with transformers, without its report and bars."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

ONE_AT_A_TIME = threading.RLock()  # for the process, as what it guards


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers load something: one thread at a time, and without its report and bars (the checks here
    say the same).

    While it loads, transformers replaces functions of torch and of its own for the whole process
    (`tie_weights` by nothing). Two threads at it would put the replacement back instead of the original, and
    weights would stay untied from then on.
    """
    from transformers.utils import logging

    with ONE_AT_A_TIME:
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity(50)  # critical
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
