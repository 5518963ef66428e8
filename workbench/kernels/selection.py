"""Which weights stay, exactly: selections by importance, never by a threshold that ties could blur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # places counted together
WIDE = 32  # neighbours in a group up to which each is compared with each


def spread(count: int, parts: int) -> list[int]:
    """Return `count` divided over `parts` as evenly as whole numbers go: the first ones have one more.

    A larger count gives no part less.
    """
    each, more = divmod(count, parts)
    return [each + 1] * more + [each] * (parts - more)


def keep_largest(importance: Tensor, count: int) -> Tensor:
    """Return a mask (bool, same shape) with exactly `count` True along the last dimension.

    Ties go to the first.
    """
    total = importance.shape[-1]
    if count in {0, total}:
        return torch.full_like(importance, count == total, dtype=torch.bool)
    threshold = largest(importance, count)
    above, ties = importance > threshold, importance == threshold
    return above | first_true(ties, count - above.sum(-1, keepdim=True))


def first_true(flags: Tensor, count: Tensor) -> Tensor:
    """Return the first `count` (integers [..., 1]) True of `flags` (bool [..., columns]) along the last
    dimension.

    Long rows are counted in blocks, and one by one only in the block where the last of them lies.
    """
    columns = flags.shape[-1]
    if columns % BLOCK or columns == BLOCK:
        return flags & (flags.cumsum(-1, dtype=torch.int32) <= count)
    blocks, wanted = flags.reshape(-1, columns // BLOCK, BLOCK), count.reshape(-1, 1)
    ends = blocks.sum(-1, dtype=torch.int32).cumsum(-1, dtype=torch.int32)
    whole = ends <= wanted
    mask = blocks & whole.unsqueeze(-1)
    rows, last = (
        torch.arange(len(blocks), device=flags.device),
        whole.sum(-1).clamp_(max=columns // BLOCK - 1),
    )
    block = blocks[rows, last]
    before = ends[rows, last] - block.sum(-1, dtype=torch.int32)
    mask[rows, last] = block & (block.cumsum(-1, dtype=torch.int32) + before.unsqueeze(-1) <= wanted)
    return mask.view(flags.shape)


def largest(importance: Tensor, count: int) -> Tensor:
    """Return the `count`-th largest value along the last dimension, [..., 1]: a selection, several times
    faster than sorting.

    On a CPU by numpy, whose `partition` compares many numbers an instruction: with AVX2 a tenth of the time
    that torch's `kthvalue` takes.
    """
    total = importance.shape[-1]
    if importance.device.type == "cpu" and importance.dtype in {torch.float32, torch.float64}:
        place = total - count
        return torch.from_numpy(
            np.partition(importance.detach().numpy(), place, axis=-1)[..., place : place + 1].copy()
        )
    if importance.device.type != "cuda":
        return importance.kthvalue(total - count + 1, dim=-1, keepdim=True).values
    if (
        count <= total // 2
    ):  # on a GPU `kthvalue` gives a row to one block, `topk` spreads it over all of them
        return importance.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return importance.topk(total - count + 1, dim=-1, largest=False, sorted=False).values.amax(
        -1, keepdim=True
    )


def keep_fewer(importance: Tensor, removed: Sequence[int]) -> Tensor:
    """Return a mask (bool, [rows, columns]) that keeps the largest of each row but for `removed[row]`.

    Ties go to the first.
    """
    columns = importance.shape[1]
    different = sorted(set(removed))
    if len(different) == 1:
        return keep_largest(importance, columns - different[0])
    mask = torch.empty_like(importance, dtype=torch.bool)
    for count in different:
        rows = torch.tensor(
            [row for row, wanted in enumerate(removed) if wanted == count], device=importance.device
        )
        mask[rows] = keep_largest(importance[rows], columns - count)
    return mask


def keep_of_groups(importance: Tensor, kept: int, of: int) -> Tensor:
    """Return a mask (bool, [..., columns]) with exactly `kept` True of every `of` neighbours.

    Ties go to the first.
    """
    groups = importance.unflatten(-1, (-1, of))
    if of > WIDE:
        return keep_largest(groups, kept).flatten(-2)
    place = torch.arange(of, device=importance.device)
    better = torch.zeros_like(groups, dtype=torch.uint8)  # how many of its group come before each weight
    for index in range(of):
        rival = groups[..., index : index + 1]
        better += torch.where(place > index, rival >= groups, rival > groups)
    return (better < kept).flatten(-2)
