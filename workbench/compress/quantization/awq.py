"""AWQ-style scales: inputs that carry much are given finer steps, by how much is found by trying.

Lin et al. 2023 multiply each input channel of a weight by s = (size of its activations)^alpha before rounding
and divide the inputs by s. Here 1/s stays with the weight (`InputScaled`) instead of being folded into the
layer in front: every layer has its own, also where several read the same input or a nonlinearity is in
between, at two bytes an input.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from workbench.calibration.passes import full_precision
from workbench.compress.quantization.scales import Scales, Spec, fit, form_of
from workbench.formats.affine import Grid
from workbench.formats.stored_forms import FloatGrid, InputScaled

ALPHAS = 20  # exponents tried: 0, .05, ... .95
LEAST, MOST = 2.0**-10, 2.0**10  # of a multiplier: well inside float16


@torch.no_grad()
def search(stack: Tensor, moments: Tensor, spec: Spec) -> tuple[InputScaled, tuple[bool, ...]]:
    """Return the stacked form of least output error among 20 exponents, and in which layers its scales are
    float16 numbers.

    stack: float32 [layers, outputs, inputs]; moments: E[x x^T] [layers, inputs, inputs]. The error is E|(W' -
    W) x|^2. Exponents are compared at the full range, as in the paper; the best is then fitted as `spec` says
    and kept where it is no worse than no multiplier at all.
    """
    quick = Spec(
        spec.bits, spec.group_size, spec.number_format, spec.symmetric, search=False, whole=spec.whole
    )
    size = moments.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    plain = torch.ones_like(size)
    best, least = plain, None
    for step in range(ALPHAS):
        finer = multipliers(size, step / ALPHAS)
        error = output_error(rounded(stack, finer, quick) - stack, moments)
        if least is None:
            least = error
            continue
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better[:, None], finer, best)
    fitted = [fit(stack / finer.unsqueeze(1), spec) for finer in (best, plain)]
    errors = [
        output_error(rounded(stack, finer, spec, scales) - stack, moments)
        for finer, scales in zip((best, plain), fitted, strict=True)
    ]
    wider = torch.tensor(
        [small and not large for large, small in zip(*(scales.half for scales in fitted), strict=True)],
        device=stack.device,
    )  # scales would take twice the bytes
    chosen = torch.where(((errors[0] < errors[1]) & ~wider)[:, None], best, plain)
    scaled = stack / chosen.unsqueeze(1)
    scales = fit(scaled, spec)
    return (
        InputScaled(cast("Grid | FloatGrid", form_of(scaled, scales, spec)), chosen.half()),
        scales.half,
    )  # 16-bit numbers do not come here


def multipliers(size: Tensor, alpha: float) -> Tensor:
    """Return 1/s, float32 [layers, inputs], a number that float16 holds: s = size^alpha, centred between its
    extremes.
    """
    mean = size.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    relative = torch.where(
        size > 0, (size / mean).clamp_min(1e-4), torch.ones_like(size)
    )  # what calibration never reads may be read later
    finer = relative.pow(alpha)
    middle = (finer.amax(1, keepdim=True) * finer.amin(1, keepdim=True)).sqrt()
    return (middle / finer).clamp_(LEAST, MOST).half().float()


def rounded(stack: Tensor, finer: Tensor, spec: Spec, scales: Scales | None = None) -> Tensor:
    """Return the weights that come out with these multipliers, [layers, outputs, inputs].

    `scales` if they are fitted already.
    """
    scaled = stack / finer.unsqueeze(1)
    return form_of(scaled, scales or fit(scaled, spec), spec).dequantize() * finer.unsqueeze(1)


def output_error(error: Tensor, moments: Tensor) -> Tensor:
    """Return E|error x|^2 of each layer, [layers]."""
    with full_precision():
        return ((error @ moments) * error).flatten(1).sum(1)
