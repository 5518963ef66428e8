"""The kernel of `workbench.kernels.losses`. Import this module only where Triton is there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def losses(logits_ptr, label_ptr, loss_ptr, answer_ptr, classes, row_stride, BLOCK: tl.constexpr):
    """Write the cross entropy of one row of logits (float32; 0 where the label is negative) and its largest
    class, the first of equal ones (int64).

    The row is read once: its largest logit and the sum of exponentials relative to it grow together (Milakov
    & Gimelshein 2018).
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * row_stride
    most, total, answer = (
        tl.full((BLOCK,), float("-inf"), dtype=tl.float32),
        tl.zeros((BLOCK,), dtype=tl.float32),
        tl.zeros((BLOCK,), dtype=tl.int32),
    )
    for first in range(0, classes, BLOCK):
        place = first + tl.arange(0, BLOCK)
        logit = tl.load(start + place, mask=place < classes, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, logit)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - base) + tl.exp(logit - base)
        answer = tl.where(logit > most, place, answer)
        most = higher
    top = tl.max(most, axis=0)
    tl.store(answer_ptr + row, tl.min(tl.where(most == top, answer, classes), axis=0).to(tl.int64))
    whole = tl.sum(total * tl.exp(tl.where(most == float("-inf"), 0.0, most) - top), axis=0)
    label = tl.load(label_ptr + row)
    wanted = tl.load(start + tl.maximum(label, 0)).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(label < 0, 0.0, top - wanted + tl.log(whole)))
