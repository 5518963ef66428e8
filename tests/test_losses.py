"""The kernel of losses: against float64 and the plain operations."""

import pytest
import torch
from interpreted import INTERPRETED, outside, passed
from torch import nn

from workbench.kernels.losses import losses, losses_refused
from workbench.tasks.likelihood import token_loss


@outside
def test_the_kernel_interpreted():
    assert passed(__file__) == 16


@pytest.fixture(params=[torch.float16, torch.float32, torch.bfloat16], ids=str)
def dtype(request, place):
    return request.param


def numbers(place, dtype, *shape, seed=0, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(place, dtype)


@pytest.mark.parametrize("classes", [3, 64, 5000])
def test_losses_agree_with_float64_and_answers_with_the_first_largest(classes, dtype, place):
    logits = numbers(place, dtype, 9, classes, scale=4.0)
    labels = torch.randint(classes, (9,), generator=torch.Generator().manual_seed(1)).to(place)
    labels[3] = -100
    logits[5, -1] = logits[5, 1] = 50.0
    logits[6, 0] = -torch.inf
    labels[6] = 1
    assert losses_refused(place, dtype) == ""
    loss, answers = losses(logits, labels)
    assert torch.allclose(
        loss.double(),
        nn.functional.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="none"),
        rtol=1e-5,
        atol=1e-6,
    )
    assert torch.equal(answers.cpu(), logits.cpu().argmax(-1))
    assert answers[5] == 1


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # of NumPy, which interprets: that is what is wanted here
def test_a_destroyed_row_counts_as_lost(dtype, place):
    logits = numbers(place, dtype, 4, 64)
    logits[0, 5], logits[1], logits[2, 7] = torch.nan, -torch.inf, torch.inf
    labels = torch.zeros(4, dtype=torch.int64, device=place)
    loss, _ = token_loss(logits, labels)
    assert torch.isposinf(loss).tolist() == [True, True, True, False]


def test_slices_of_logits_are_reduced_where_they_lie(dtype, place):
    logits, labels = numbers(place, dtype, 6, 40), torch.arange(6, device=place)
    loss, answers = losses(logits[:, :20], labels)
    expected = losses(logits[:, :20].contiguous(), labels)
    assert torch.equal(loss, expected[0])
    assert torch.equal(answers, expected[1])


def test_the_interpreter_notices_what_a_gpu_would_not_forgive(place):
    if not INTERPRETED:
        pytest.skip("a GPU does not say")
    from triton.runtime.interpreter import InterpreterError

    from workbench.kernels import triton_losses as kernels

    logits, loss = torch.zeros(2, 64), torch.zeros(2)
    labels, answers = torch.zeros(2, 2, dtype=torch.int64).unbind()
    kernels.losses[(2,)](logits, labels, loss, answers, 64, 64, 128)
    with pytest.raises(InterpreterError, match="2 of 66 elements of 4 bytes lie outside of every tensor"):
        kernels.losses[(2,)](logits, labels, loss, answers, 66, 64, 128)
