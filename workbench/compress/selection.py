"""Which weights stay, exactly: selections by importance, never by a threshold that ties could blur."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spread(count: int, parts: int) -> list[int]:
    """Return `count` divided over `parts` as evenly as whole numbers go: the first ones have one more. A larger count gives no part less."""
    each, more = divmod(count, parts)
    return [each + 1] * more + [each] * (parts - more)


def keep_largest(importance: Tensor, count: int) -> Tensor:
    """Return a mask (bool, same shape) with exactly `count` True along the last dimension; ties go to the first."""
    total = importance.shape[-1]
    if count in {0, total}:
        return torch.full_like(importance, count == total, dtype=torch.bool)
    threshold = importance.kthvalue(total - count + 1, dim=-1, keepdim=True).values  # a selection: several times faster than sorting
    above, ties = importance > threshold, importance == threshold
    room = count - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


def keep_fewer(importance: Tensor, removed: Sequence[int]) -> Tensor:
    """Return a mask (bool, [rows, columns]) that keeps the largest of each row but for `removed[row]`; ties go to the first."""
    columns = importance.shape[1]
    different = sorted(set(removed))
    if len(different) == 1:
        return keep_largest(importance, columns - different[0])
    mask = torch.empty_like(importance, dtype=torch.bool)
    for count in different:
        rows = torch.tensor([row for row, wanted in enumerate(removed) if wanted == count], device=importance.device)
        mask[rows] = keep_largest(importance[rows], columns - count)
    return mask


def keep_of_groups(importance: Tensor, kept: int, of: int) -> Tensor:
    """Return a mask (bool, [..., columns]) with exactly `kept` True of every `of` neighbours; ties go to the first."""
    return keep_largest(importance.unflatten(-1, (-1, of)), kept).flatten(-2)
