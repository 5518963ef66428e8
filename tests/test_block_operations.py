"""The kernels between the products of a Llama-like block, and those of losses: against float64 and
transformers' own modules."""

import pytest
import torch
from interpreted import INTERPRETED, outside, passed
from tiny_tasks import tiny_task
from torch import nn
from transformers.models.llama import modeling_llama

from workbench.kernels import block_ops
from workbench.measure.evaluation.fused_blocks import NEAR, FusedBlocks, Operations, near
from workbench.tasks.likelihood import token_loss


@outside
def test_the_kernels_interpreted():
    assert passed(__file__) > 30


@pytest.fixture(params=[torch.float16, torch.float32, torch.bfloat16], ids=str)
def dtype(request, place):
    return request.param


def numbers(place, dtype, *shape, seed=0, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(place, dtype)


@pytest.mark.parametrize("width", [16, 100, 576, 4096])
@pytest.mark.parametrize("rows", [(1,), (3, 7)], ids=str)
def test_norms_agree_with_float64_and_with_the_model(width, rows, dtype, place):
    norm = modeling_llama.LlamaRMSNorm(width, eps=1e-5).to(place, dtype).requires_grad_(False)
    norm.weight.copy_(numbers(place, dtype, width, seed=1))
    x = numbers(place, dtype, *rows, width)
    x[0] = 0
    found, wide = block_ops.rms_norm(x, norm.weight, 1e-5), x.double()
    exact = norm.weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (found.double() - exact).abs().amax() <= NEAR[dtype] * exact.abs().amax()
    assert (found == norm(x)).float().mean() > (
        0.98 if dtype.itemsize == 2 else 0.5
    )  # another order of summing moves few of them


@pytest.mark.parametrize("shape", [(1,), (3, 777), (2, 5, 1024)], ids=str)
def test_gated_products_agree_with_float64_and_with_the_model(shape, dtype, place):
    gate, up = numbers(place, dtype, *shape, scale=5.0), numbers(place, dtype, *shape, seed=1)
    gate.view(-1)[0] = -80.0  # whose exponential is large
    found, wide = block_ops.gated(gate, up), gate.double()
    assert torch.isfinite(found).all()
    assert near((wide / (1 + (-wide).exp()) * up.double()).to(dtype), found)
    same = (found == nn.functional.silu(gate) * up).float().mean()
    assert (
        same == 1 if place.type == "cuda" else same > (0.99 if dtype.itemsize == 2 else 0.5)
    )  # the interpreter has no CUDA library


@pytest.mark.parametrize("width", [2, 24, 64, 128])
@pytest.mark.parametrize("items", [1, 2])
@pytest.mark.parametrize("heads", [(2, 1), (9, 3)], ids=str)
def test_rotations_give_the_bits_of_the_model(heads, items, width, dtype, place):
    q, k = (numbers(place, dtype, 2, 7, count, width, seed=count).transpose(1, 2) for count in heads)
    cos, sin = numbers(place, dtype, items, 7, width, seed=5), numbers(place, dtype, items, 7, width, seed=6)
    for given in ((q, k), (q.contiguous(), k.contiguous())):
        expected = modeling_llama.apply_rotary_pos_emb(*given, cos, sin)
        assert all(
            torch.equal(one, two)
            for one, two in zip(expected, block_ops.rotary(*given, cos, sin), strict=True)
        )


def test_queries_and_keys_that_are_parts_of_one_product_are_turned_where_they_lie(dtype, place):
    both, angles = numbers(place, dtype, 2, 33, 5 * 16 + 3), numbers(place, dtype, 2, 1, 33, 16, seed=1)
    q, k = (part.view(2, 33, -1, 16).transpose(1, 2) for part in (both[..., 3:67], both[..., 67:]))
    for one, two in zip(
        modeling_llama.apply_rotary_pos_emb(q, k, *angles), block_ops.rotary(q, k, *angles), strict=True
    ):
        assert torch.equal(one, two)
        assert [step for step, size in zip(one.stride(), one.shape, strict=True) if size > 1] == [
            step for step, size in zip(two.stride(), two.shape, strict=True) if size > 1
        ]


def test_what_is_no_number_stays_where_it_is(dtype, place):
    x, weight = numbers(place, dtype, 4, 40), numbers(place, dtype, 40, seed=1)
    x[1, 3], x[2] = torch.nan, 0
    norm = modeling_llama.LlamaRMSNorm(40).to(place, dtype).requires_grad_(False)
    norm.weight.copy_(weight)
    assert near(norm(x), block_ops.rms_norm(x, weight, 1e-6))
    assert near(nn.functional.silu(x) * weight, block_ops.gated(x, weight.expand(4, 40)))
    q, angles = x.view(1, 4, 1, 40).transpose(1, 2), numbers(place, dtype, 2, 1, 4, 40, seed=2)
    for one, two in zip(
        modeling_llama.apply_rotary_pos_emb(q, q, *angles), block_ops.rotary(q, q, *angles), strict=True
    ):
        assert torch.equal(one.nan_to_num(777), two.nan_to_num(777))


def test_a_model_agrees_with_itself_run_as_it_is(dtype, place):
    task = tiny_task("llama", str(place))
    model = task.model.to(dtype)
    blocks = FusedBlocks(Operations(block_ops.rms_norm, block_ops.gated, block_ops.rotary), place)
    ids = torch.arange(24, device=place).view(2, 12)
    with torch.inference_mode():
        expected, found = model(input_ids=ids).logits, blocks.of(model)(input_ids=ids).logits
    assert set(blocks.refused.values()) == {""}
    assert (expected.float() - found.float()).abs().amax() <= 4 * NEAR[dtype] * expected.float().abs().amax()


# --- losses


@pytest.mark.parametrize("classes", [3, 64, 5000])
def test_losses_agree_with_float64_and_answers_with_the_first_largest(classes, dtype, place):
    logits = numbers(place, dtype, 9, classes, scale=4.0)
    labels = torch.randint(classes, (9,), generator=torch.Generator().manual_seed(1)).to(place)
    labels[3] = -100
    logits[5, -1] = logits[5, 1] = 50.0
    logits[6, 0] = -torch.inf
    labels[6] = 1
    assert block_ops.losses_refused(place, dtype) == ""
    loss, answers = block_ops.losses(logits, labels)
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
    loss, answers = block_ops.losses(logits[:, :20], labels)
    expected = block_ops.losses(logits[:, :20].contiguous(), labels)
    assert torch.equal(loss, expected[0])
    assert torch.equal(answers, expected[1])


def test_the_interpreter_notices_what_a_gpu_would_not_forgive(place):
    if not INTERPRETED:
        pytest.skip("a GPU does not say")
    from triton.runtime.interpreter import InterpreterError

    from workbench.kernels import triton_blocks as kernels

    gate, up, out = torch.zeros(3, 64).unbind()
    kernels.gated[(1,)](gate, up, out, 64, 128)
    with pytest.raises(InterpreterError, match="2 of 66 elements of 4 bytes lie outside of every tensor"):
        kernels.gated[(1,)](up, out, out, 66, 128)
    rounded = block_ops.gated(torch.tensor([40.0]).bfloat16(), torch.tensor([1.0234375]).bfloat16())
    assert rounded.item() == 41.0  # 40.9375, which cut off is 40.75
