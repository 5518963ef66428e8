"""What is computed by running calibration data through a model: second moments of inputs, gradients of the
loss.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.calibration.routing import GRADIENT, SQUARE, neutral_moments, without_tokens
from workbench.errors import CompressionError
from workbench.modules.layer import Layer, find_layers, patches
from workbench.modules.offload import HOST, device_of, streams_to
from workbench.modules.sharing import sharing_copy
from workbench.util.fast_path import FastPath
from workbench.util.hooks import of_this_thread
from workbench.util.library_internals import VERSION, changes_in_place, lacks
from workbench.util.progress import Progress
from workbench.util.text import kind_and_words

if TYPE_CHECKING:
    from workbench.tasks.base import Items, Task

T = TypeVar("T")

# Of a streamed model's layers, held to see which layers read the same tensor: those of one block, and one
# that all blocks read
LAST_INPUTS = 8
GROUPS = 64  # groups of calibration items whose gradients are squared one by one


@dataclass(frozen=True)
class Gradients:
    """Of the task's loss by one weight, over the calibration data: both float32 [outputs, inputs].

    `mean` is E[g]. `square` is the mean over at most 64 groups of consecutive items of (items in the group) *
    g^2, with g the gradient of the group's mean loss: with one item a group it is E[g^2] of single items, the
    diagonal of the empirical Fisher information; with more, an estimate of it that adds (items - 1) * E[g]^2,
    small for a trained model.
    """

    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Moments:
    """E[x x^T] of each layer's inputs, float32 [inputs, inputs], and how many rows x it was averaged over: 0
    where no token was routed to an expert (see `workbench.calibration.routing`).
    """

    matrices: dict[str, Tensor]
    rows: dict[str, int]
    failed: dict[str, str] = field(default_factory=dict)  # why the inputs of a layer could not be taken

    @cached_property
    def readers(self) -> dict[str, str]:
        """Return, for each layer, the first one that reads the same inputs: what follows from their second
        moment is the same for both.
        """
        first: dict[int, str] = {}
        return {name: first.setdefault(id(matrix), name) for name, matrix in self.matrices.items()}


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 off while products are formed that are inverted later.

    What the caller had set comes back.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


ONE_PRODUCT = FastPath(
    "one product for layers with the same inputs",
    "second moments of calibration data: queries, keys and values share theirs",
    lambda _device: lacks(VERSION),
)


@dataclass
class Products:
    """X^T X of what layers are given in one batch, once for all that read the same tensor. Mutable.

    Tensors are held so that their ids are not used again: `most` of them (None: all), the newest ones.
    `home`: products go to the host.
    """

    most: int | None
    home: bool
    products: OrderedDict[tuple[int, int], tuple[Tensor, Tensor, int, Tensor]] = field(
        default_factory=OrderedDict
    )

    def of(self, module: nn.Module, given: Tensor) -> tuple[Tensor, int, Tensor]:
        """Return (product [inputs, inputs], rows that it is of, whether all are finite)."""
        key = id(given), changes_in_place(given)
        if key not in self.products or isinstance(module, nn.Conv2d):
            rows = patches(module, given)
            product = rows.t() @ rows
            self.products[key] = (
                given,
                product.to(HOST) if self.home else product,
                len(rows),
                torch.isfinite(rows).all(),
            )
        _, product, count, good = self.products[key]
        self.products.move_to_end(key)
        if isinstance(module, nn.Conv2d):
            del self.products[key]
        while self.most is not None and len(self.products) > self.most:
            self.products.popitem(last=False)
        return product, count, good


def second_moments(task: Task, progress: Progress) -> Moments:
    """Return E[x x^T] of every layer's inputs over the calibration data, with the model in eval mode.

    Layers that always read the same tensor (queries, keys and values) share one matrix: the same object,
    computed once.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    finite: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    products: dict[str, Tensor] = {}  # of the batch that is being read
    streamed = (
        streams_to(task.model) is not None
    )  # all second moments, or all inputs, are then too much for the device as well
    read = Products(LAST_INPUTS if streamed else None, home=streamed)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            if name in failed:
                return
            try:
                product, count, good = read.of(module, inputs[0] if inputs else next(iter(named.values())))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001  whatever it is: one layer never sinks the pass
                failed[name] = kind_and_words(error)
                return
            products[name] = products[name] + product if name in products else product
            counts[name] = counts.get(name, 0) + count
            finite[name] = finite[name] & good if name in finite else good

        return hook

    layers, _ = find_layers(task.model)
    device = device_of(task.model)
    with ExitStack() as hooks, torch.no_grad(), full_precision():
        for name, layer in layers.items():
            if layer.table:
                continue  # rows are looked up: there is nothing that it multiplies
            hooks.callback(
                layer.module.register_forward_pre_hook(of_this_thread(watch(name)), with_kwargs=True).remove
            )
        for start in range(0, len(task.calibration), task.batch_size):
            progress("calibration", start, len(task.calibration))
            task.kind.logits(task.model, task.calibration[start : start + task.batch_size].to(device))
            refuse_infinite(finite)
            sums = alike(sums, products)
            read.products.clear()
            products.clear()
    progress("calibration", len(task.calibration), len(task.calibration))
    for total, count in {id(total): (total, counts[name]) for name, total in sums.items()}.values():
        total.mul_(
            reciprocal(count)
            # In place, and where it lies: of a large model they need not fit twice, nor go to a device and
            # back
        )
    good = {name: total for name, total in sums.items() if name not in failed}
    neutral = neutral_moments(
        task.model, {n: layer for n, layer in layers.items() if not layer.table}, good.keys() | failed.keys()
    )
    return Moments(good | neutral, {n: counts[n] for n in good} | dict.fromkeys(neutral, 0), failed)


def reciprocal(count: int) -> float:
    """Return 1 / count as float32 has it: a product with it has the same bits on every device, a division has
    not.
    """
    return (1 / torch.tensor(count, dtype=torch.float32)).item()


def alike(sums: dict[str, Tensor], products: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums with the products added; names for which both are the same objects share one result.

    A sum is added to in place where all its names add the same: of a large model all second moments fit
    twice, not three times.
    """
    totals: dict[tuple[int, int], Tensor] = {}
    added_up = dict(sums)
    added: dict[int, set[int]] = {}  # what is added to a sum
    for name, total in sums.items():
        added.setdefault(id(total), set()).add(id(products.get(name)))
    for name, product in products.items():
        key = id(sums.get(name)), id(product)
        if key not in totals:
            totals[key] = (
                product
                if name not in sums
                else sums[name].add_(product)
                if len(added[key[0]]) == 1
                else sums[name] + product
            )
        added_up[name] = totals[key]
    return added_up


def gathered(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors on the device of the first: those of a spread model lie on several."""
    listed = list(tensors)
    return [tensor.to(listed[0].device) for tensor in listed]


def refuse_infinite(finite: dict[str, Tensor], complaint: str = "receives infinite or NaN inputs") -> None:
    """Name the first layer, in the order of calling, for which something is not finite.

    Waits for the device once.
    """
    if finite and not all(torch.stack(gathered(finite.values())).tolist()):
        bad = next(name for name, good in finite.items() if not good)
        raise CompressionError(f"layer {bad!r} {complaint} during calibration")


def gradients(task: Task, progress: Progress, *, tables: bool = False) -> dict[str, Gradients]:
    """Return the gradients of every layer's weight that takes part in the loss, from one backward pass a
    group of items.

    Embeddings are left out, or with `tables` everything else is: they are large, and few recipes name them.
    """
    model = sharing_copy(task.model)
    layers = {name: layer for name, layer in find_layers(model)[0].items() if layer.table == tables}
    for layer in layers.values():
        layer.put(nn.Parameter(layer.parameter.detach()))  # the same values, with a gradient of their own
    size = max(1, -(-len(task.calibration) // GROUPS))
    groups = list(task.calibration.batches(size))
    means = {
        name: torch.zeros_like(layer.parameter, dtype=torch.float32, requires_grad=False)
        for name, layer in layers.items()
    }
    squares = {name: torch.zeros_like(mean) for name, mean in means.items()}
    used: set[str] = set()
    for index, items in enumerate(groups):
        progress("gradients", index, len(groups))
        for name, gradient in group_gradients(task, model, layers, items).items():
            used.add(name)
            means[name] += gradient * (len(items) / len(task.calibration))
            squares[name] += gradient.square() * (len(items) / len(groups))
    progress("gradients", len(groups), len(groups))
    refuse_infinite(
        {name: torch.isfinite(squares[name]).all() for name in layers if name in used},
        "has an infinite or NaN gradient",
    )
    for name in without_tokens(model, layers, used):
        means[name].fill_(GRADIENT)
        squares[name].fill_(SQUARE)
        used.add(name)
    return {
        name: Gradients(
            layer.as_matrix(means[name]).contiguous(), layer.as_matrix(squares[name]).contiguous()
        )
        for name, layer in layers.items()
        if name in used
    }


def group_gradients(
    task: Task, model: nn.Module, layers: dict[str, Layer], items: Items
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss of some items by each layer's weight, float32, shaped as
    stored.
    """
    items = items.to(next(task.model.parameters()).device)
    weights = [layer.parameter for layer in layers.values()]
    with (
        torch.enable_grad(),
        sdpa_kernel([SDPBackend.MATH]),
    ):  # the other kernels' backward passes do not give the same bits twice
        loss = task.kind.loss(task.kind.logits(model, items), items.labels)
        if not weights or not loss.requires_grad:
            return {}
        taken = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        name: gradient.float() for name, gradient in zip(layers, taken, strict=True) if gradient is not None
    }
