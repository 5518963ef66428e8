"""Which layers two or three modules can stand for."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.calibration.outside_use import used_from_outside
from workbench.compress.core.context import Work
from workbench.errors import MISFITS, RecipeError
from workbench.modules.factored import Factors
from workbench.modules.input_quantizer import QuantizesInputs
from workbench.modules.layer import Layer

CONVOLUTION = {"kernel_size", "stride", "dilation", "in_channels", "out_channels"}
LINEAR = {"in_features", "out_features"}
KNOWN = frozenset(dir(Factors)) - CONVOLUTION - LINEAR | {
    "training"
}  # what any layers in the place of one have


def can_split(layer: Layer, work: Work) -> bool:
    """Return whether two modules could take the place of a layer; if not, the report says why."""
    if layer.rank is not None:
        raise RecipeError(f"layer {layer.origin!r} is already of rank {layer.rank}")
    reason = ""
    if layer.others:
        reason = (
            f"{', '.join((layer.name, *layer.others))} share one weight, and no ordinary layers could share"
            " its factors"
        )
    elif isinstance(layer.module, nn.Embedding) and (
        type(layer.module) is not nn.Embedding or layer.module.max_norm is not None
    ):
        reason = f"a {type(layer.module).__name__} does more than look up rows"
    elif does_more(layer.module):
        reason = f"a {type(layer.module).__name__} does more than one product"
    elif outside := sorted(
        used_from_outside(work.statistics).get(layer.origin, frozenset()) - known_of(layer.module)
    ):
        reason = f"the model uses {', '.join(outside)} of it, which two layers in its place do not have"
    if reason:
        work.say(layer, f"lowrank skipped: {reason}")
    return not reason


def known_of(module: nn.Module) -> frozenset[str]:
    """Return the attributes that the layers in the place of a module have as it has."""
    if isinstance(module, nn.Conv2d):
        return KNOWN | CONVOLUTION
    return KNOWN | LINEAR if isinstance(module, nn.Linear) else KNOWN


def does_more(module: nn.Module) -> bool:
    """Return whether a layer's own class makes something else than the product with its weight (such as one
    with standardised weights), found by trying it.
    """
    if not isinstance(module, nn.Linear | nn.Conv2d) or isinstance(module, QuantizesInputs):
        return False
    plain = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    if type(module).forward is plain.forward:
        return False
    weight, size = module.weight, [2, module.weight.shape[1]]
    if isinstance(module, nn.Conv2d):
        kernels = zip(module.kernel_size, module.dilation, strict=True)
        size += [dilation * (kernel - 1) + 3 for kernel, dilation in kernels]
    given = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            wanted = cast("Tensor", cast("Any", plain).forward(module, given))
            made = module(given)
    except MISFITS:  # it wants more than its inputs
        return True
    if not isinstance(made, Tensor) or made.shape != wanted.shape:  # a router gives more than its product
        return True
    rounding = 64 * torch.finfo(weight.dtype).eps * float(wanted.abs().max())
    return float((made - wanted).abs().max()) > rounding
