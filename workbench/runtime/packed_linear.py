"""A linear layer that keeps its weight packed, and the choice of the kernel that multiplies by it on a GPU.

One vector: a kernel that reads each packed word once. A few: one that unpacks into the matrix units. Many:
the weight is unpacked once, then an ordinary dense product. Which is decided by the number of vectors and a
small table, never by timing on the spot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.formats.affine import Grid
from workbench.kernels.matmul_layout import UNIT, pack_units, unpack_units
from workbench.util.device import launching, processors

MANY = 64  # vectors beyond which unpacking once and a dense product is quicker
LONG = 1024  # vectors from which on parts of a weight keep the whole GPU busy
CHUNK = 2**24  # bytes of such a part: a third of the second-level cache of a large GPU
# Weights below which it is quicker from two vectors on: there is too little to read for the kernel that
# unpacks as it goes
LARGE = 2**22
LEAST_ROWS = 32  # the smallest block of rows of any kernel: so many locks are enough


@dataclass(frozen=True)
class PackedWeight:
    """Words int32 [units, bits, rows], scales [groups, rows], zero points uint8 [groups, rows] or None (then
    2^(bits - 1)).

    `inputs` is the number of columns of the matrix. All three tensors may be views of the same rows of wider
    ones: `stride` apart.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    inputs: int
    processors: int  # of the device where the words lie

    @property
    def rows(self) -> int:
        """Return the number of outputs."""
        return self.words.shape[2]

    @property
    def stride(self) -> int:
        """Return how far neighbouring words of a row lie apart."""
        return self.words.stride(1)

    @property
    def zeros(self) -> Tensor:
        """Return the zero points.

        Without any, another tensor in their place, which the kernels never read.
        """
        return self.scale if self.zero_point is None else self.zero_point

    @property
    def units_a_group(self) -> int:
        """Return how many units share a scale."""
        groups = self.scale.shape[0]
        return self.words.shape[0] if groups == 1 else self.inputs // groups // UNIT

    @property
    def kind(self) -> tuple[object, ...]:
        """Return a key that is equal for weights that can lie side by side in one."""
        return (
            self.bits,
            self.inputs,
            self.scale.shape[0],
            self.scale.dtype,
            self.zero_point is None,
            self.words.device,
        )

    def part(self, start: int, end: int) -> PackedWeight:
        """Return some of the rows, as views."""
        zeros = None if self.zero_point is None else self.zero_point[:, start:end]
        return PackedWeight(
            self.words[:, :, start:end],
            self.scale[:, start:end],
            zeros,
            self.bits,
            self.inputs,
            self.processors,
        )


def why_not(grid: Grid) -> str:
    """Return why a grid cannot be packed into units, "" if it can."""
    if not 2 <= grid.bits <= 8:
        return f"{grid.bits} bits: from 2 to 8 are packed"
    if grid.scale.shape[1] > 1 and grid.group_size % UNIT:
        return f"group_size {grid.group_size} is no multiple of {UNIT}"
    if grid.zero_point is not None and grid.zero_point.dtype != torch.uint8:
        return f"zero points of {grid.zero_point.dtype}"
    return ""


def packed_weight(grid: Grid) -> PackedWeight:
    """Return the packed form of a grid [outputs, inputs]."""
    rows, inputs = grid.codes.shape
    scale = grid.scale.expand(rows, -1).t().contiguous()
    zeros = None if grid.zero_point is None else grid.zero_point.expand(rows, -1).t().contiguous()
    return PackedWeight(
        pack_units(grid.codes, grid.bits), scale, zeros, grid.bits, inputs, processors(grid.codes.device)
    )


def plain(weight: PackedWeight) -> Tensor:
    """Return the weights, float32 [rows, inputs], without any kernel of ours."""
    codes = unpack_units(weight.words, weight.bits, weight.inputs)
    zeros = None if weight.zero_point is None else weight.zero_point.t()
    return Grid(codes, weight.scale.t(), zeros, weight.bits).dequantize()


def side_by_side(weights: list[PackedWeight]) -> PackedWeight:
    """Return weights of one kind as one with the rows of all."""
    zeros = [weight.zero_point for weight in weights if weight.zero_point is not None]
    first = weights[0]
    return PackedWeight(
        torch.cat([weight.words for weight in weights], 2),
        torch.cat([weight.scale for weight in weights], 1),
        torch.cat(zeros, 1) if zeros else None,
        first.bits,
        first.inputs,
        first.processors,
    )


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed.

    Takes x [..., inputs] in float32, float16 or bfloat16 on a GPU and returns y in the same dtype.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    lock: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Keep the packed weight; `bias` [outputs] or None.

        Some models ask for the `dtype` of a layer's weight: an empty one answers.
        """
        super().__init__()
        self.weight = torch.empty(0, dtype=dtype)
        self.in_features, self.out_features, self.bits, self.processors = (
            weight.inputs,
            weight.rows,
            weight.bits,
            weight.processors,
        )
        self.place = 0
        self.shared: SharedProduct | None = None
        self.register_buffer("bias", bias)
        self.register_buffer(
            "lock",
            torch.zeros(4 * -(-weight.rows // LEAST_ROWS), dtype=torch.int32, device=weight.words.device),
            persistent=False,
        )
        self.hold(weight)

    def hold(self, weight: PackedWeight) -> None:
        """Take another place where the same weight is kept."""
        for name in ("words", "scale", "zero_point"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight_packed(self) -> PackedWeight:
        """Return the weight."""
        return PackedWeight(
            self.words, self.scale, self.zero_point, self.bits, self.in_features, self.processors
        )

    def extra_repr(self) -> str:
        """Say shape and width."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, [..., outputs]."""
        y = (
            multiply(x.reshape(-1, self.in_features), self.weight_packed, self.lock)
            if self.shared is None
            else self.shared.take(self, x)
        )
        y = y.view(*x.shape[:-1], self.out_features) if y.is_contiguous() else y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class SharedProduct:
    """Layers that read the same tensor, such as queries, keys and values: one product for all of them.

    The first that is called multiplies for all; the others find their part waiting if they are given the very
    same tensor. A layer that comes with another one shows that they do not belong together: from then on each
    multiplies for itself.
    """

    def __init__(self, members: list[PackedLinear]) -> None:
        """Put the members' weights side by side; they keep views."""
        self.weight = side_by_side([member.weight_packed for member in members])
        self.lock = torch.zeros(
            4 * -(-self.weight.rows // LEAST_ROWS), dtype=torch.int32, device=self.weight.words.device
        )
        self.ends = [0]
        for place, member in enumerate(members):
            self.ends.append(self.ends[-1] + member.out_features)
            member.place, member.shared = place, self
            member.hold(self.weight.part(*self.ends[-2:]))
        self.apart = False
        self.seen: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def take(self, member: PackedLinear, x: Tensor) -> Tensor:
        """Return the member's product with x, [vectors, outputs]."""
        if self.seen is x and member.place in self.waiting:
            waited_for = self.waiting.pop(member.place)
            if not self.waiting:
                self.seen = None
            return waited_for
        if self.waiting:
            self.apart, self.waiting, self.seen = True, {}, None
        flat = x.reshape(-1, member.in_features)
        if self.apart:
            return multiply(flat, member.weight_packed, member.lock)
        products = multiply(flat, self.weight, self.lock).split(
            [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)], dim=1
        )
        self.seen, self.waiting = (
            x,
            {place: part for place, part in enumerate(products) if place != member.place},
        )
        mine: Tensor = products[member.place]
        return mine


def join_siblings(model: nn.Module) -> None:
    """Let packed layers of one parent with as many inputs and the same kind of grid share their product."""
    for parent in model.modules():
        kinds: dict[tuple[object, ...], list[PackedLinear]] = {}
        for child in parent.children():
            if isinstance(child, PackedLinear) and child.shared is None:
                kinds.setdefault(child.weight_packed.kind, []).append(child)
        for members in kinds.values():
            if len(members) > 1:
                SharedProduct(members)


def multiply(x: Tensor, weight: PackedWeight, lock: Tensor) -> Tensor:
    """Return x W^T, [vectors, rows]. x [vectors, inputs]; `lock` int32 zeros, and zeros again afterwards.

    Off a GPU, by unpacking.
    """
    if x.device.type != "cuda":
        return torch.mm(x, plain(weight).to(x.dtype).t())
    if len(x) == 1:
        return multiply_one(x, weight, lock)
    if (
        len(x) <= MANY and weight.rows * weight.inputs >= LARGE and x.dtype != torch.float32
    ):  # whose exact products have no matrix units to run on
        return multiply_some(x, weight, lock)
    return multiply_many(x, weight)


def multiply_many(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return the product with many vectors, [vectors, rows]: the weight is unpacked, so much at a time that
    it is multiplied while it lies in the GPU's cache.
    """
    step = (
        weight.rows
        if len(x) < LONG
        else max(UNIT, CHUNK // (weight.inputs * x.element_size()) // UNIT * UNIT)
    )
    if step >= weight.rows:
        return torch.mm(x, unpacked(weight, x.dtype))
    out = x.new_empty(len(x), weight.rows)
    for start in range(0, weight.rows, step):
        end = min(start + step, weight.rows)
        torch.mm(x, unpacked(weight.part(start, end), x.dtype), out=out[:, start:end])
    return out


def power_of_two(count: int, most: int) -> int:
    """Return the smallest power of two that is at least `count`, at most `most`."""
    return min(most, 1 << max(0, count - 1).bit_length())


def multiply_one(x: Tensor, weight: PackedWeight, lock: Tensor) -> Tensor:
    """Return the product with one vector, [1, rows]."""
    from workbench.kernels import triton_matmul as kernels

    block, most, programs = (
        (128, 8, 4) if weight.bits < 4 else (64, 16, 8)
    )  # rows and units at a time, programs a processor: measured on one H100 at the shapes of a 6.7B Llama
    units, rows = weight.words.shape[0], weight.rows
    together, blocks = power_of_two(units, most), -(-rows // block)
    split = max(1, min(-(-units // together), programs * weight.processors // blocks))
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    part = torch.empty(split * rows if split > 1 else 1, dtype=torch.float32, device=x.device)
    with launching(x.device):
        kernels.one_row[(blocks, split)](
            x.contiguous(),
            weight.words,
            weight.scale,
            weight.zeros,
            out,
            part,
            lock,
            rows,
            weight.inputs,
            units,
            weight.units_a_group,
            weight.stride,
            split,
            weight.bits,
            weight.zero_point is not None,
            weight.inputs % UNIT == 0,
            block,
            together,
            num_warps=4,
        )
    return out


def multiply_some(x: Tensor, weight: PackedWeight, lock: Tensor) -> Tensor:
    """Return the product with up to MANY vectors, [vectors, rows]."""
    from workbench.kernels import triton_matmul as kernels

    count, units, rows, block_rows, together = len(x), weight.words.shape[0], weight.rows, 64, 32
    block, blocks = max(16, power_of_two(count, MANY)), -(-rows // block_rows)
    turned = (
        nn.functional.pad(x, (0, units * UNIT - weight.inputs))
        .view(count, units, UNIT)
        .transpose(1, 2)
        .contiguous()
    )
    split = max(1, min(-(-units // together), 2 * weight.processors // blocks))
    out = torch.empty(count, rows, dtype=x.dtype, device=x.device)
    part = torch.empty(split * count * rows if split > 1 else 1, dtype=torch.float32, device=x.device)
    with launching(x.device):
        kernels.some_rows[(blocks, 1, split)](
            turned,
            weight.words,
            weight.scale,
            weight.zeros,
            out,
            part,
            lock,
            count,
            rows,
            units,
            weight.units_a_group,
            weight.stride,
            split,
            weight.bits,
            weight.zero_point is not None,
            block,
            block_rows,
            together,
            num_warps=4,
        )
    return out


def unpacked(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return W^T, [inputs, rows], in this dtype: the same numbers as the grid's own `dequantize`, rounded
    once.
    """
    from workbench.kernels import triton_matmul as kernels

    rows, block = weight.rows, 256
    out = torch.empty(weight.inputs, rows, dtype=dtype, device=weight.words.device)
    with launching(out.device):
        kernels.unpack[(weight.words.shape[0], -(-rows // block))](
            weight.words,
            weight.scale,
            weight.zeros,
            out,
            rows,
            weight.inputs,
            weight.units_a_group,
            weight.stride,
            weight.bits,
            weight.zero_point is not None,
            block,
            num_warps=4,
        )
    return out
