"""What Triton's interpreter lacks as a stand-in for a GPU: it says nothing of reads and writes beside the
tensors, and does not round bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.kernels import weight_passes


class Watch:
    """Where the running kernel may read and write."""

    def __init__(self) -> None:
        """Allow nothing yet."""
        self.tables: dict[int, int] = {}  # bytes at every address that a table holds
        self.starts, self.ends = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def begin(self, tensors: list[torch.Tensor]) -> None:
        """Allow these tensors and what the tables among them point to."""
        ranges = [reach(tensor) for tensor in tensors if tensor.numel()]
        for tensor in tensors:
            if tensor.dtype == torch.int64:
                ranges += [
                    (place, place + self.tables[place])
                    for place in tensor.flatten().tolist()
                    if place in self.tables
                ]
        self.starts = np.array(sorted(start for start, _ in ranges), np.int64)
        self.ends = np.maximum.accumulate(np.array([end for _, end in sorted(ranges)], np.int64))

    def check(self, pointers, mask) -> None:
        """Refuse elements outside of what is allowed."""
        places = np.asarray(pointers.data)[np.asarray(mask.data)].astype(np.int64).reshape(-1)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        owner = np.searchsorted(self.starts, places, side="right") - 1
        outside = (owner < 0) | (places + size > self.ends[owner.clip(0)])
        assert not outside.any(), (
            f"{int(outside.sum())} of {len(places)} elements of {size} bytes lie outside of every tensor"
        )


def reach(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor, and the one behind its last."""
    last = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch all kernels until the monkeypatch ends."""
    from triton.runtime import interpreter

    seen, plain_table, call = Watch(), weight_passes.table, interpreter.GridExecutor.__call__
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def table(tensors):
        seen.tables |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        return plain_table(tensors)

    def launch(self, *given, **named):
        seen.begin([value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)])
        return call(self, *given, **named)

    def checked_load(self, pointers, mask, *rest):
        seen.check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        seen.check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(weight_passes, "table", table)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


def round_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels calculate with bfloat16 as a GPU does, to nearest and ties to even.

    The interpreter calculates with its bits and cuts off what is too long.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    binary, cast = builder.binary_op, builder.cast_impl

    def wide(value):
        return (
            (np.asarray(value.data).astype(np.uint32) << 16).view(np.float32)
            if value.dtype.scalar == tl.bfloat16
            else value.data
        )

    def narrow(numbers):
        return (
            torch.from_numpy(np.array(numbers, np.float32))
            .bfloat16()
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
        )

    def binary_op(self, left, right, operation):
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, operation)
        result = operation(wide(left), wide(right))
        return handle(result if result.dtype == bool else narrow(result), left.dtype.scalar)

    def cast_impl(self, value, to):
        if tl.bfloat16 not in (value.dtype.scalar, to.scalar) or value.dtype.scalar == to.scalar:
            return cast(self, value, to)
        return (
            handle(narrow(wide(value)), to.scalar)
            if to.scalar == tl.bfloat16
            else cast(self, handle(wide(value), tl.float32), to)
        )

    monkeypatch.setattr(builder, "binary_op", binary_op)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(
        builder, "create_fp_to_fp", lambda self, value, to, _rounding: cast_impl(self, value, to)
    )
