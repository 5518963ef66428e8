"""A trial of a criterion on two made-up layers: what its scores really are, and what they really look at."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.compress.pruning.criterion.seen import Seen, Statistic

LAYERS, OUTPUTS, INPUTS = 2, 6, 8
SAME = 1e-5  # relative difference of two scores that rounding may make
SEED = 5  # of the trial's draws
DRAWN = "scores are drawn by the seed, which units='draw' would say"
FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class UndeclaredError(Exception):
    """A criterion looks at a statistic that it does not state."""


@dataclass(frozen=True)
class TrialSeen(Seen):
    """Layers as calibration might leave them, one of whose outputs and inputs is dead: weights, gradients and
    the input's second moment are 0 there. Raises `UndeclaredError` for a statistic not in `reads`.
    """

    weights: Tensor
    norms: Tensor  # [layers, inputs]
    mean: Tensor  # and what follows: as the weights
    square: Tensor
    removal: Tensor
    draws: Tensor
    reads: Collection[Statistic]

    def input_norms(self) -> Tensor:
        """Return the norms of inputs."""
        self.look("moments")
        return self.norms

    def mean_gradients(self) -> Tensor:
        """Return E[g]."""
        self.look("gradients")
        return self.mean

    def squared_gradients(self) -> Tensor:
        """Return E[g^2]."""
        self.look("gradients")
        return self.square

    def removal_errors(self) -> Tensor:
        """Return w^2 / d^2, a new tensor."""
        self.look("moments")
        return self.removal.clone()

    def random(self, seed: int) -> Tensor:
        """Return draws that depend on the seed, a new tensor."""
        return (self.draws + 0.1 * seed) % 1.0

    def look(self, statistic: Statistic) -> None:
        """Refuse a statistic that is not stated."""
        if statistic not in self.reads:
            raise UndeclaredError(statistic)

    def given(self) -> list[Tensor]:
        """Return the tensors that are not to be changed."""
        return [self.weights, self.norms, self.mean, self.square]

    def copy(self, layers: slice = slice(None)) -> TrialSeen:
        """Return copies of some of the layers."""
        fields = (self.weights, self.norms, self.mean, self.square, self.removal, self.draws)
        weights, norms, mean, square, removal, draws = (tensor[layers].clone() for tensor in fields)
        return TrialSeen(weights, norms, mean, square, removal, draws, self.reads)


def trial_layers(reads: Collection[Statistic]) -> TrialSeen:
    """Return the two layers, the same ones every time."""
    generator = torch.Generator("cpu").manual_seed(SEED)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    whole = (LAYERS, OUTPUTS, INPUTS)
    alive = torch.ones(whole, device="cpu")
    alive[:, 2], alive[:, :, 3] = 0.0, 0.0
    weights, mean = drawn(*whole) * alive, 0.1 * drawn(*whole) * alive
    norms = drawn(LAYERS, INPUTS).abs() * alive[:, 0]
    square = mean.square() + 0.01 * drawn(*whole).square() * alive
    removal = weights.square() * (0.5 * norms.square()).unsqueeze(-2)
    draws = torch.rand(whole, generator=generator, device="cpu")
    return TrialSeen(weights, norms, mean, square, removal, draws, reads)


def wrong_scores(
    scores: Callable[[Seen, int], Tensor],
    reads: Collection[Statistic],
    kernel: str,
    *,
    makes_up: bool,
    draws: bool,
) -> str:
    """Return the first thing wrong with a criterion's scores, in words, "" if nothing is.

    Arguments as the facts of `workbench.compress.pruning.criterion.Criterion`; draws: whether the importance
    of units is drawn.
    """
    layers = trial_layers(reads)
    seen = layers.copy()
    try:
        once = scores(seen, 0)
        again, reseeded = scores(layers.copy(), 0), scores(layers.copy(), 1)
        alone = [scores(layers.copy(slice(place, place + 1)), 0) for place in range(LAYERS)]
    except UndeclaredError as error:
        return f"scores looks at {error}, which reads={sorted(reads)} does not state"
    except FAILURES as error:
        return f"scores fails on a trial layer ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return (
        wrong_form(once, seen)
        or wrong_values(once, again, alone)
        or ("" if unchanged(seen, layers) else "scores changes what it is given")
        or ("" if draws or torch.equal(once, reseeded) else DRAWN)
        or wrong_claims(once, layers, kernel, makes_up=makes_up)
    )


def wrong_form(result: object, seen: TrialSeen) -> str:
    """Return how scores are no tensor of their own shaped as the weights, in words, "" if they are."""
    if not isinstance(result, Tensor):
        return f"scores returns a {type(result).__name__}, no tensor"
    if result.shape != seen.weights.shape:
        return (
            f"scores of weights {list(seen.weights.shape)} are {list(result.shape)}: they should be as those"
        )
    if result.dtype != torch.float32:
        return f"scores are {result.dtype}, not torch.float32"
    own = result.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in seen.given()}
    spread = any(step == 0 for step, size in zip(result.stride(), result.shape, strict=True) if size > 1)
    return "" if own and not spread else "scores is no new tensor: it shares memory with what it is made from"


def wrong_values(once: Tensor, again: Tensor, alone: list[Tensor]) -> str:
    """Return the first thing wrong with the values of scores, [layers, outputs, inputs], "" if nothing is.

    again: those of a second call. alone: those of each layer without the other.
    """
    if not bool(torch.isfinite(once).all()):
        return "scores are not finite where weights, inputs or gradients are 0"
    if float(once.min()) < 0:
        return f"scores go down to {float(once.min()):.3g}: they should be 0 or more"
    if not torch.equal(once, again):
        return "scores of the same layers and seed differ from call to call"
    return "" if same(once, torch.cat(alone)) else "scores of a layer depend on the layers beside it"


def wrong_claims(values: Tensor, layers: TrialSeen, kernel: str, *, makes_up: bool) -> str:
    """Return which faster or other way of choosing does not choose by these scores."""
    size = layers.weights.abs()
    if kernel == "magnitudes" and not same(values, size):
        return "kernel='magnitudes' chooses by |w|, which its scores are not"
    if kernel == "rows" and not same(values, size * layers.norms.unsqueeze(-2)):
        return "kernel='rows' chooses by |w| times the inputs' norms, which its scores are not"
    if makes_up and not same(values, layers.removal):
        return "makes_up=True chooses by w^2 / d^2 (Seen.removal_errors), which its scores are not"
    return ""


def unchanged(seen: TrialSeen, before: TrialSeen) -> bool:
    """Return whether what was given is as it was."""
    return all(torch.equal(*pair) for pair in zip(seen.given(), before.given(), strict=True))


def same(left: Tensor, right: Tensor) -> bool:
    """Return whether scores are equal up to rounding."""
    return left.shape == right.shape and torch.allclose(left, right, rtol=SAME, atol=0.0)
