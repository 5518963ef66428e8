"""The kernels between the products of a Llama-like block: against float64 and transformers' own modules."""

import pytest
import torch
from interpreted import INTERPRETED, outside, passed
from tiny_tasks import tiny_task
from torch import nn
from transformers.models.llama import modeling_llama

from workbench.kernels import block_ops
from workbench.measure.evaluation.fused_blocks import NEAR, FusedBlocks, Operations, near


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
    fused, wide = block_ops.rms_norm(x, norm.weight, 1e-5), x.double()
    exact = norm.weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (fused.double() - exact).abs().amax() <= NEAR[dtype] * exact.abs().amax()
    assert (fused == norm(x)).float().mean() > (
        0.98 if dtype.itemsize == 2 else 0.5
    )  # another order of summing moves few of them


@pytest.mark.parametrize("shape", [(1,), (3, 777), (2, 5, 1024)], ids=str)
def test_gated_products_agree_with_float64_and_with_the_model(shape, dtype, place):
    gate, up = numbers(place, dtype, *shape, scale=5.0), numbers(place, dtype, *shape, seed=1)
    gate.view(-1)[0] = -80.0  # whose exponential is large
    fused, wide = block_ops.gated(gate, up), gate.double()
    assert torch.isfinite(fused).all()
    assert near((wide / (1 + (-wide).exp()) * up.double()).to(dtype), fused)
    same = (fused == nn.functional.silu(gate) * up).float().mean()
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
            torch.equal(first, second)
            for first, second in zip(expected, block_ops.rotary(*given, cos, sin), strict=True)
        )


def test_queries_and_keys_that_are_parts_of_one_product_are_turned_where_they_lie(dtype, place):
    both, angles = numbers(place, dtype, 2, 33, 5 * 16 + 3), numbers(place, dtype, 2, 1, 33, 16, seed=1)
    q, k = (part.view(2, 33, -1, 16).transpose(1, 2) for part in (both[..., 3:67], both[..., 67:]))
    for first, second in zip(
        modeling_llama.apply_rotary_pos_emb(q, k, *angles), block_ops.rotary(q, k, *angles), strict=True
    ):
        assert torch.equal(first, second)
        assert [step for step, size in zip(first.stride(), first.shape, strict=True) if size > 1] == [
            step for step, size in zip(second.stride(), second.shape, strict=True) if size > 1
        ]


def test_what_is_no_number_stays_where_it_is(dtype, place):
    x, weight = numbers(place, dtype, 4, 40), numbers(place, dtype, 40, seed=1)
    x[1, 3], x[2] = torch.nan, 0
    norm = modeling_llama.LlamaRMSNorm(40).to(place, dtype).requires_grad_(False)
    norm.weight.copy_(weight)
    assert near(norm(x), block_ops.rms_norm(x, weight, 1e-6))
    assert near(nn.functional.silu(x) * weight, block_ops.gated(x, weight.expand(4, 40)))
    q, angles = x.view(1, 4, 1, 40).transpose(1, 2), numbers(place, dtype, 2, 1, 4, 40, seed=2)
    for first, second in zip(
        modeling_llama.apply_rotary_pos_emb(q, q, *angles), block_ops.rotary(q, q, *angles), strict=True
    ):
        assert torch.equal(first.nan_to_num(777), second.nan_to_num(777))


def test_a_model_agrees_with_itself_run_as_it_is(dtype, place):
    task = tiny_task("llama", str(place))
    model = task.model.to(dtype)
    blocks = FusedBlocks(Operations(block_ops.rms_norm, block_ops.gated, block_ops.rotary), place)
    ids = torch.arange(24, device=place).view(2, 12)
    with torch.inference_mode():
        expected, fused = model(input_ids=ids).logits, blocks.of(model)(input_ids=ids).logits
    assert set(blocks.refused.values()) == {""}
    assert (expected.float() - fused.float()).abs().amax() <= 4 * NEAR[dtype] * expected.float().abs().amax()


def test_what_is_interpreted_rounds_as_a_gpu(place):
    if not INTERPRETED:
        pytest.skip("a GPU rounds as it is")
    rounded = block_ops.gated(torch.tensor([40.0]).bfloat16(), torch.tensor([1.0234375]).bfloat16())
    assert rounded.item() == 41.0  # 40.9375, which cut off is 40.75
