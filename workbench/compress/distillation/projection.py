"""Hidden states of a student and its teacher compared: projections in closed form, and distances between
directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the mean square of the student's states: keeps the normal equations regular where these do not fill their
# space
RIDGE = 1e-6


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the angle in radians, 0 to pi, between each pair of vectors.

    Both [points, width], of any lengths.

    With a and b of length 1 it is 2 atan2(|a - b|, |a + b|): the same as 2 asin(|a - b| / 2) and as arccos
    <a, b>, but exact near 0 and near pi, and with a finite gradient everywhere (0 where both vectors are the
    same).
    """
    own, aim = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return 2 * torch.atan2((own - aim).norm(dim=-1), (own + aim).norm(dim=-1))


def geodesic(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean angle in radians, a scalar, between states and their targets [points, width]: the
    distance along the sphere.
    """
    return angles(student, teacher).mean()


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cosine over states [points, width], a scalar: half the squared straight distance
    on the sphere, flat where the angle is small.
    """
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of states [points, width] over that of always answering 0: a scalar that
    does not depend on the states' scale.
    """
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(
        torch.finfo(teacher.dtype).tiny
    )


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": squared,
    "cosine": cosine,
    "geodesic": geodesic,
}


def layer_map(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return (student's block, teacher's block), counted from 0: block l of L_S, counted from 1, has block
    round(l L_T / L_S) as its aim.
    """
    return [
        (block - 1, max(1, (2 * block * teacher + student) // (2 * student)) - 1)
        for block in range(1, student + 1)
    ]


class Fit:
    """Least squares from a student's states to its teacher's, from sums over batches.

    Mutable while `add` is called.
    """

    def __init__(self) -> None:
        """Start with no states."""
        self.own: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Count states [points, width of the student] and what they should become [points, width of the
        teacher].
        """
        own, cross = student.double().mT @ student.double(), student.double().mT @ teacher.double()
        self.own = own if self.own is None else self.own + own
        self.cross = cross if self.cross is None else self.cross + cross

    def solve(self) -> Tensor:
        """Return P, float32 [width of the student, width of the teacher], that minimises |S P - T|^2 plus a
        tiny ridge.

        The ridge pulls to the identity where both widths are equal, else to zero: directions that no state
        was seen in stay.
        """
        assert self.own is not None  # noqa: S101  for the type checker: `add` came first
        assert self.cross is not None  # noqa: S101
        ridge = RIDGE * self.own.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        regular = self.own + ridge * torch.eye(len(self.own), dtype=torch.float64, device=self.own.device)
        middle = torch.eye(*self.cross.shape, dtype=torch.float64, device=self.own.device) * (
            self.own.shape == self.cross.shape
        )
        solved: Tensor = middle + torch.linalg.solve(regular, self.cross - self.own @ middle)
        return solved.float()
