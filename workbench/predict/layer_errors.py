"""How far each layer's outputs move under a step, at every place of its slider, without running the step.

A table is made once for each set of choices that matters (a criterion, a grid, a factorisation) from a few
rows of every weight, and then read within microseconds. An error is relative: t^2 = sum_o f_o (D M D^T)_oo /
sum_o f_o (W M W^T)_oo, with W the weight [outputs, inputs], D what the step changes in it, M = E[x x^T] of
the layer's inputs and f_o how much the loss feels output o (diagonal Fisher information). Zeros: what the
criterion would remove from the sampled rows. Bits: those rows rounded. Rank: the energy of the directions
that are cut off, all outputs alike.

What it does not see: a budget shared out over layers (each is taken to get the same), what training or a
repair wins back beyond a rough share, and structure that is taken out, for which there is no table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.calibration.statistics import full_precision
from workbench.compress.quantization.scales import Spec, fit, form_of
from workbench.formats.stored_forms import HALVES
from workbench.kernels.selection import keep_of_groups
from workbench.modules.layer import Layer
from workbench.util.progress import Progress, no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from workbench.calibration.statistics import Gradients
    from workbench.recipe import Step

WEIGHTS = 8192  # of one layer that are looked at, in whole rows
FEWEST_ROWS = 8
SPARSITIES = tuple(index / 32 for index in range(33))
RATIOS = tuple(index / 32 for index in range(33))
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
DAMPING = 0.01  # of second moments that are inverted, of their mean diagonal: the default of GPTQ
AWQ = 0.8  # of the error of rounding to nearest, as a rule
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Sample:
    """What is looked at of one layer: `weight` and gradients [r, inputs] of some rows, `felt` [r], `moment`
    [inputs, inputs].
    """

    layer: Layer
    weight: Tensor
    mean: Tensor
    square: Tensor
    felt: Tensor
    moment: Tensor

    @property
    def energy(self) -> Tensor:
        """Return what the sampled outputs carry, as the loss feels it: a scalar."""
        return weighed(self.weight, self)


@dataclass(frozen=True)
class Curve:
    """Relative errors of all layers [layers, knots] at some places of a slider [knots], rising."""

    knots: NDArray[np.float64]
    errors: NDArray[np.float64]

    def at(self, value: float) -> NDArray[np.float64]:
        """Return the errors [layers] at a value, between knots by a straight line."""
        if len(self.knots) == 1:
            return self.errors[:, 0]
        place = float(
            np.clip(np.interp(value, self.knots, np.arange(len(self.knots))), 0, len(self.knots) - 1)
        )
        low = min(int(place), len(self.knots) - 2)
        share = place - low
        found: NDArray[np.float64] = (1 - share) * self.errors[:, low] + share * self.errors[:, low + 1]
        return found


def sample(layer: Layer, gradients: Gradients, moment: Tensor) -> Sample:
    """Return what is kept of a layer: rows spread evenly over its outputs."""
    matrix = layer.matrix()
    rows, columns = matrix.shape
    taken = min(rows, max(FEWEST_ROWS, WEIGHTS // columns))
    index = torch.linspace(0, rows - 1, taken, device=matrix.device).round().long()
    felt = gradients.square[index].sum(1) / moment.diagonal().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return Sample(layer, matrix[index], gradients.mean[index], gradients.square[index], felt, moment)


def weighed(errors: Tensor, about: Sample) -> Tensor:
    """Return sum_o f_o (D M D^T)_oo of errors D [..., r, inputs], as [...]."""
    return ((((errors @ about.moment) * errors).sum(-1)) * about.felt).sum(-1)


def relative(errors: Tensor, about: Sample) -> Tensor:
    """Return errors as shares of what the layer carries, at most 1 beyond rounding.

    0 where it carries nothing.
    """
    return torch.where(
        about.energy > 0,
        errors / about.energy.clamp_min(torch.finfo(torch.float32).tiny),
        torch.zeros_like(errors),
    )


# --- zeros


def prune_errors(step: Any, about: Sample) -> Tensor:
    """Return the errors of zeros at `SPARSITIES` (of n:m: at its own), [knots]."""
    scores, costs = saliences(step, about)
    if step.group is not None:
        if about.weight.shape[1] % step.group[1]:
            return torch.zeros(1, device=scores.device)
        gone = ~keep_of_groups(scores, *step.group).unsqueeze(0)
    else:
        by_row = step.criterion == "wanda"
        flat = scores if by_row else scores.flatten().unsqueeze(0)
        places = flat.argsort(dim=1, stable=True).argsort(dim=1).view_as(scores)
        limits = torch.tensor(SPARSITIES, device=scores.device) * flat.shape[1]
        gone = places < limits[:, None, None]
    if costs is not None:
        return relative((costs * gone).sum((-2, -1)), about)
    return relative(weighed(about.weight * gone, about), about)


def saliences(step: Any, about: Sample) -> tuple[Tensor, Tensor | None]:
    """Return the importance of each sampled weight, and what removing it costs where the others make up for
    it (None: they do not).
    """
    weight = about.weight
    if step.criterion == "random":
        return (
            torch.rand(
                weight.shape,
                generator=torch.Generator(weight.device).manual_seed(step.seed),
                device=weight.device,
            ),
            None,
        )
    if step.criterion == "wanda":
        return weight.abs() * about.moment.diagonal().clamp_min(0).sqrt(), None
    if step.criterion == "taylor":
        return (weight * about.mean).abs(), None
    if step.criterion == "fisher":
        return weight.square() * about.square, None
    if step.criterion == "sparsegpt":
        scores = weight.square() * conditional(about.moment)
        return scores, scores * about.felt.unsqueeze(1)
    return weight.abs(), None


def conditional(moment: Tensor, columns: Tensor | None = None) -> Tensor:
    """Return what is left of each input's energy once those after it have made up for it, [inputs]: 1 / d^2
    of the Cholesky factor.
    """
    size = len(moment)
    order = torch.arange(size, device=moment.device) if columns is None else columns
    damped = moment[order][:, order].double()
    damped = damped + (DAMPING * damped.diagonal().mean() + torch.finfo(torch.float32).tiny) * torch.eye(
        size, dtype=torch.float64, device=moment.device
    )
    lower = torch.linalg.cholesky_ex(damped.flip(0, 1)).L.flip(
        0, 1
    )  # M = U U^T with U upper: input j once those after it are known
    found = torch.empty(size, dtype=torch.float64, device=moment.device)
    found[order] = lower.diagonal().square()
    return found.float()


# --- bits


def bits_errors(step: Any, about: Sample) -> Tensor:
    """Return the errors of rounded weights at `WIDTHS` (of a format with one width: there), [knots]."""
    columns = about.weight.shape[1]
    widths = WIDTHS if step.number_format == "integer" else (int(step.weight_bits),)
    if step.group_size and columns % step.group_size:
        return torch.zeros(len(widths), device=about.weight.device)
    stack = about.weight.unsqueeze(0)
    found = []
    for bits in widths:
        spec: Spec = step.spec(bits)
        rounded = form_of(
            stack, None if step.number_format in HALVES else fit(stack, spec), spec
        ).dequantize()
        found.append(weighed((rounded - stack)[0].float(), about))
    return relative(torch.stack(found), about) * rounding_share(step, about)


def rounding_share(step: Any, about: Sample) -> Tensor | float:
    """Return the share of the error of rounding to nearest that is left: for GPTQ tr(D) / tr(M) with M = U D
    U^T (Chee et al. 2023).
    """
    if step.rounding == "awq":
        return AWQ
    if step.rounding != "gptq":
        return 1.0
    order = about.moment.diagonal().argsort(descending=True) if step.activation_order else None
    total = about.moment.diagonal().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (conditional(about.moment, order).sum() / total).clamp(max=1.0)


# --- rank


def rank_errors(step: Any, about: Sample) -> Tensor:
    """Return the errors of the truncated weight at `RATIOS` of its full rank, [knots].

    Factors of a convolution as if they were of a matrix.
    """
    weight, moment = about.layer.matrix().double(), about.moment.double()
    seen = weight @ moment @ weight.mT
    if step.factorization == "whitened" and not about.layer.table:
        carried = torch.linalg.eigvalsh(seen).flip(0).clamp_min(0)[: min(weight.shape)]
    else:
        _, values, right = torch.linalg.svd(weight, full_matrices=False)
        carried = values.square() * ((right @ moment) * right).sum(1)
    left = torch.cat(
        [carried.flip(0).cumsum(0).flip(0), carried.new_zeros(1)]
    )  # [full rank + 1]: what is lost with that many directions
    kept = (
        (torch.tensor(RATIOS, dtype=torch.float64, device=weight.device) * len(carried))
        .round()
        .clamp(1, len(carried))
        .long()
    )
    return (left[kept] / left[0].clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1).float()


MAKERS: dict[
    str, tuple[Callable[[Any, Sample], Tensor], tuple[str, ...]]
] = {  # by kind of step: how, and which choices matter
    "prune": (prune_errors, ("criterion",)),
    "quantize": (
        bits_errors,
        (
            "group_size",
            "grid",
            "scale_search",
            "rounding",
            "number_format",
            "granularity",
            "activation_order",
        ),
    ),
    "lowrank": (rank_errors, ("factorization",)),
}


def key_of(step: Step) -> Key | None:
    """Return what a step's table goes by, None for a step that has none."""
    if step.kind() not in MAKERS or getattr(step, "structured", False):
        return None
    names = MAKERS[step.kind()][1]
    key = (step.kind(), *(getattr(step, name) for name in names))
    if step.kind() == "prune" and getattr(step, "group", None) is not None:
        return (*key, step.pattern)  # type: ignore[attr-defined]
    return key


def knots_of(step: Any) -> NDArray[np.float64]:
    """Return the places of a step's slider at which its table has entries."""
    if step.kind() == "prune":
        return np.array([step.sparsity] if step.group is not None else SPARSITIES)
    if step.kind() == "quantize":
        return np.array(WIDTHS if step.number_format == "integer" else [step.weight_bits], dtype=float)
    return np.array(RATIOS)


def errors_of(step: Step, samples: list[Sample], progress: Progress = no_progress) -> Tensor:
    """Return the errors of a step's choices over all layers, float64 [layers, knots] on the CPU.

    `progress` may raise to stop.
    """
    maker, _ = MAKERS[step.kind()]
    rows = []
    with torch.no_grad(), full_precision():
        for index, about in enumerate(samples):
            progress("predicted errors", index, len(samples))
            rows.append(maker(step, about))
        return torch.stack(rows).double().cpu()
