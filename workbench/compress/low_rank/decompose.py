"""Decompositions of stacks of matrices: the directions that carry most, in the weights' metric or in that of
the outputs.

All work is float64: squared singular values of a Gram matrix keep 16 digits there. Stacks are [layers,
outputs, inputs].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import CompressionError

# Of a second moment's mean diagonal, added to it: directions without data are then ordered by the weights
RIDGE = 1e-8
SILENT = 1e-13  # squared singular values below this fraction of the largest are rounding


@dataclass(frozen=True)
class Stack:
    """Factors of layers of one shape, in the model's dtype: the first r columns of `left` [layers,
    outputs, k] and rows of `right` [layers, k, inputs] are the solution of rank r, for every r up to k.
    """

    left: Tensor
    right: Tensor


def one_by_one(count: int) -> list[slice]:
    """Return which layers to work on together: one, since no device decomposes a batch quicker than its
    members, and bits then never depend on the batch.
    """
    return [slice(index, index + 1) for index in range(count)]


def decompose(weights: Tensor, moments: list[Tensor] | None, most: int, dtype: torch.dtype) -> Stack:
    """Return the factors of rank up to `most`. weights: float32 [layers, o, i].

    Moments: E[x x^T] [i, i] of each layer, or None.

    With moments W' = Q Q^T W, Q the eigenvectors of the outputs' second moment W E[x x^T] W^T; without, the
    truncated singular value decomposition, its singular values shared evenly between both factors.
    """
    stacks = []
    for part in one_by_one(len(weights)):
        weight = weights[part].double()
        basis = leading(weight, None if moments is None else torch.stack(moments[part]).double(), most)
        stacks.append(factors(weight, basis, even=moments is None, dtype=dtype))
    return (
        stacks[0]
        if len(stacks) == 1
        else Stack(torch.cat([part.left for part in stacks]), torch.cat([part.right for part in stacks]))
    )


def factors(weight: Tensor, basis: Tensor, *, even: bool, dtype: torch.dtype) -> Stack:
    """Return Q [layers, outputs, k] and Q^T W [layers, k, inputs]; with `even`, the norms of the rows of Q^T
    W shared between both.
    """
    right = basis.mT @ weight
    if not even:
        return Stack(basis.to(dtype), right.to(dtype))
    root = right.norm(dim=2).sqrt()  # [layers, k]
    return Stack(
        (basis * root.unsqueeze(1)).to(dtype),
        (right / root.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(2)).to(dtype),
    )


def leading(weight: Tensor, moment: Tensor | None, most: int) -> Tensor:
    """Return the `most` directions of the outputs that carry most, float64 [layers, o, most], orthonormal,
    strongest first.

    weight: [layers, o, i], moment: [layers, i, i] or None, both float64. The smaller of both sides is
    decomposed.
    """
    if weight.shape[1] <= weight.shape[2]:
        return eigenvectors(weight @ weight.mT if moment is None else weight @ regular(moment) @ weight.mT)[
            1
        ][..., :most]
    seen = weight if moment is None else weight @ root(regular(moment))  # [layers, o, i]
    values, vectors = (part[..., :most] for part in eigenvectors(seen.mT @ seen))
    heard = values > SILENT * values[..., :1]
    scale = torch.where(
        heard, values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), torch.zeros_like(values)
    )
    return seen @ vectors * scale.unsqueeze(1)


def regular(moment: Tensor) -> Tensor:
    """Return second moments [..., inputs, inputs] with a ridge, so that none is singular; a new tensor."""
    ridged = moment.clone()
    diagonal = ridged.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return ridged


def root(moment: Tensor) -> Tensor:
    """Return K with K K^T = moment, [..., inputs, inputs]: Cholesky, or from eigenvectors where rounding has
    made one indefinite.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(moment)
    if not bool(failed.any()):
        return lower
    values, vectors = eigenvectors(moment)
    return vectors * values.clamp_min(RIDGE * values[..., :1].abs()).sqrt().unsqueeze(-2)


def eigenvectors(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values [..., n], vectors [..., n, n]), largest first.

    Raises:
        CompressionError: the matrices have no decomposition, such as when they are not finite.

    """
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except RuntimeError as error:
        raise CompressionError(
            f"weights or activations have no singular value decomposition: {error}"
        ) from None
    return values.flip(-1), vectors.flip(-1)


def pseudo_inverse(symmetric: Tensor) -> Tensor:
    """Return the inverse of symmetric positive matrices [..., n, n] on what they reach, zero elsewhere."""
    values, vectors = eigenvectors(symmetric)
    inverse = torch.where(
        values > 1e-10 * values[..., :1],
        values.clamp_min(torch.finfo(torch.float64).tiny).reciprocal(),
        torch.zeros_like(values),
    )
    return vectors * inverse.unsqueeze(-2) @ vectors.mT
