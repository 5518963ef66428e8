"""When a training has diverged: its loss or a gradient is no number, or the loss has grown far above where it
began and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

TIMES = 10.0  # the first loss and one more nat, which a loss that begins near 0 may well reach
PATIENCE = 10  # steps in a row, so that single batches do not count


def trouble(loss: float, gradient: float, losses: Sequence[float]) -> str:
    """Return in words why a training must end before this optimizer step, "" if it may go on.

    Args:
        loss: of this step's batch.
        gradient: the largest absolute value in its gradients.
        losses: of the steps before.

    """
    if not math.isfinite(loss):
        return f"loss {loss}"
    if not math.isfinite(gradient):
        return f"a gradient is {gradient} at loss {loss:.3g}"
    late = [*losses[-PATIENCE + 1 :], loss]
    if len(losses) >= PATIENCE and min(late) > TIMES * (losses[0] + 1):
        return (
            f"loss {loss:.3g}, for {PATIENCE} steps above {TIMES:g} times what it was at first"
            f" ({losses[0]:.3g}) and 1 more"
        )
    return ""


def worse(losses: Sequence[float]) -> str:
    """Return in words that every one of the last steps had a larger loss than the first, "" if not, or of too
    few steps.
    """
    least = min(losses[-PATIENCE:], default=0.0)
    if len(losses) < 2 * PATIENCE or least <= losses[0]:
        return ""
    return (
        f"ended with a larger loss than it began with: {losses[0]:.3g} at the first step, at least"
        f" {least:.3g} in each of the last {PATIENCE}"
    )
