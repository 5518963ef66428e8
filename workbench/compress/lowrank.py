"""LowRank: replace one large product by two small ones."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from workbench.compress.layers import Layer, replace_module
from workbench.compress.work import Work
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import METHODS, Step, configuration


@configuration
class LowRank(Step):
    """Replace each layer by two of rank r = round(rank_ratio * min(outputs, inputs)), at least 1.

    `svd` truncates the singular value decomposition of the weight (Eckart & Young 1936). `whitened` minimises the error of
    the layer's outputs on the calibration data instead: W' = Q Q^T W with Q the first r eigenvectors of the outputs' second
    moment W E[x x^T] W^T (as in SVD-LLM, Wang et al. 2024, and its eigenvector form). A convolution becomes one of r
    filters and a 1x1.

    What it does not do: train, choose ranks per layer, or touch a layer where two factors would have no fewer weights than
    one (a square layer above rank_ratio 0.5); such a layer is left whole and the report says so.
    """

    slider: ClassVar[str] = "rank_ratio"
    position: ClassVar[int] = 10
    stops: ClassVar[tuple[float, ...]] = (0.2, 0.3, 0.45)

    rank_ratio: Annotated[float, Field(gt=0, le=1, description="fraction of the full rank that is kept")] = 0.5
    factorization: Annotated[Literal["svd", "whitened"], Field(description="what the truncation keeps best: weights or outputs")] = "whitened"

    def check_order(self, earlier: tuple[Step, ...]) -> None:
        """Refuse low rank after a step whose promise a factorisation would break."""
        broken = {"prune": "factors of a pruned weight are dense, so its zeros would be lost", "quantize": "the factors would leave the grid"}
        for step in earlier:
            if step.kind() in broken:
                raise RecipeError(f"LowRank cannot follow {type(step).__name__}: {broken[step.kind()]}; put LowRank first")

    def label(self) -> str:
        """Return such as `rank 40%`."""
        return f"rank {self.rank_ratio:.0%}"


@METHODS.register(LowRank)
def lowrank(step: LowRank, work: Work) -> None:
    """Factorise layers, replacing each module by two of the same kind."""
    for layer in work.select(step):
        rows, columns = layer.as_matrix(layer.parameter).shape
        if not torch.isfinite(layer.parameter).all():
            raise CompressionError(f"layer {layer.name!r} has infinite or NaN weights")
        rank = max(1, round(step.rank_ratio * min(rows, columns)))
        if layer.rank is not None:
            raise RecipeError(f"layer {layer.origin!r} is already of rank {layer.rank}")
        if rank * (rows + columns) >= rows * columns:
            most = (rows * columns - 1) // (rows + columns)
            work.say(layer, f"lowrank skipped: rank {rank} of {rows}x{columns} saves no weights (below rank_ratio {(most + 0.5) / min(rows, columns):.2f} it would)")
            continue
        left, right = factors(layer, step, work)
        install(layer, left[:, :rank], right[:rank], work)
        work.took(step, layer, f"rank {rank} of {min(rows, columns)} by {step.factorization}")


def factors(layer: Layer, step: LowRank, work: Work) -> tuple[Tensor, Tensor]:
    """Return (left [outputs, k], right [k, inputs]) whose first r columns and rows are the rank-r solution, for every r."""
    def decompose() -> tuple[Tensor, Tensor]:
        return whitened(layer, work) if step.factorization == "whitened" else plain(layer)

    if layer.pristine:  # the same for every value of the slider
        return work.statistics.once((step.factorization, layer.origin), decompose)
    return decompose()


def plain(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the factors of the plain SVD, singular values shared evenly between them."""
    try:
        left, values, right = torch.linalg.svd(layer.matrix(), full_matrices=False)
    except RuntimeError as error:
        raise CompressionError(f"layer {layer.name!r}: its weights have no singular value decomposition ({error})") from None
    root = values.sqrt()
    return left * root, root.unsqueeze(1) * right


def whitened(layer: Layer, work: Work) -> tuple[Tensor, Tensor]:
    """Return Q and Q^T W, columns of Q ordered by the output variance that they carry."""
    weight = layer.matrix().double()
    moment = work.statistics.second_moment(layer.origin).double()
    _, vectors = torch.linalg.eigh(weight @ moment @ weight.t())
    basis = vectors.flip(1)[:, : min(weight.shape)]
    return basis.float(), (basis.t() @ weight).float()


def install(layer: Layer, left: Tensor, right: Tensor, work: Work) -> None:
    """Replace the layer's module by a Sequential of two, and its entry by one for each. left: [o, r], right: [r, i]."""
    pair = pair_like(layer.module, len(right))
    replace_module(work.model, layer.origin, pair)
    entries = {}
    for index, matrix in enumerate((right, left)):
        factor = Layer(f"{layer.origin}.{index}", layer.origin, pair[index], rank=len(right))
        factor.write(matrix)
        entries[factor.name] = factor
    work.layers = {key: value for name, old in work.layers.items() for key, value in (entries if name == layer.name else {name: old}).items()}


class Pair(nn.Sequential):
    """Two layers in the place of one. `weight` and `bias` are for models that read a layer's weight instead of calling it."""

    @property
    def weight(self) -> Tensor:
        """Return the product of the two weights, shaped as the dense layer's (Linear [o, i], Conv2d [o, i, h, w])."""
        first, second = cast("Tensor", self[0].weight), cast("Tensor", self[1].weight)
        return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """Return the second layer's bias."""
        return cast("Tensor | None", self[1].bias)


def pair_like(module: nn.Module, rank: int) -> Pair:
    """Return two modules of the given rank that together take the place of `module`, its bias in the second."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)  # noqa: S101  for the type checker: find_layers has seen it
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Conv2d):
        kernel: tuple[int, int] = (module.kernel_size[0], module.kernel_size[1])
        first = nn.Conv2d(module.in_channels, rank, kernel, module.stride, module.padding, module.dilation, bias=False, padding_mode=module.padding_mode, **like)  # type: ignore[arg-type]
        second = nn.Conv2d(rank, module.out_channels, 1, bias=bias is not None, **like)
    else:
        outputs, inputs = reversed(weight.shape) if type(module).__name__ == "Conv1D" else weight.shape
        first = nn.Linear(inputs, rank, bias=False, **like)
        second = nn.Linear(rank, outputs, bias=bias is not None, **like)
    if isinstance(bias, Tensor) and isinstance(second.bias, Tensor):
        with torch.no_grad():
            second.bias.copy_(bias)
    return Pair(first, second).train(module.training)
