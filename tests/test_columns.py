"""The column loop of GPTQ and SparseGPT by one kernel: against float64, column by column.

Interpreted by Triton where there is no GPU.
"""

import pytest
import tiny_tasks
import torch
from interpreted import INTERPRETED, outside, passed

import workbench as wb
from workbench.compress import compress
from workbench.compress.pruning import sparsegpt
from workbench.compress.quantization import gptq
from workbench.compress.quantization.scales import Spec, fit, form_of
from workbench.kernels import column_solver
from workbench.kernels.column_loops import Factor
from workbench.modules.layer import Layer
from workbench.util.device import NEEDS_GPU

SHAPES = [(2, 5, 7), (1, 33, 128), (2, 40, 200)]  # the last takes two programs and two blocks


@pytest.fixture
def untried():
    """Forget whether the kernel is right, before and after."""
    column_solver.refused.cache_clear()
    yield
    column_solver.refused.cache_clear()


@outside
def test_the_kernel_interpreted():
    assert passed(__file__) > 20


def problem(shape, place, seed=0):
    """Return weights and factors as GPTQ has them: float32 [layers, outputs, inputs] and [layers, inputs,
    inputs], each row over its diagonal."""
    layers, _, inputs = shape
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=draw)
    upper = (torch.randn(layers, inputs, inputs, generator=draw) / inputs**0.5).triu(1) + torch.eye(inputs)
    return weights.to(place), upper.to(place)


def rounded_one_by_one(weights, upper, grid, kept, bits):
    """Return (values, errors) of the first block's columns, in float64, written from the definition.

    `grid`: scales and zero points.
    """
    (scale, zero), until = grid, min(column_solver.BLOCK, weights.shape[2])
    weights, rounded, errors = (
        weights.double().clone(),
        torch.zeros_like(weights, dtype=torch.float64),
        torch.zeros_like(weights, dtype=torch.float64),
    )
    middle = torch.full_like(scale, 1 << (bits - 1)).double() if zero is None else zero.double()
    for column in range(until):
        steps = (weights[:, :, column] / scale[:, :, column].double()).round()
        code = (steps + middle[:, :, column]).clamp(0, (1 << bits) - 1)
        rounded[:, :, column] = (
            (code - middle[:, :, column])
            * scale[:, :, column].double()
            * (1 if kept is None else kept[:, :, column])
        )
        errors[:, :, column] = weights[:, :, column] - rounded[:, :, column]
        weights -= errors[:, :, column, None] * upper.double()[:, column : column + 1]
    return rounded, errors


def agree(values, expected, most=1e-4):
    """Return whether almost all numbers agree: a weight between two codes may go either way, and takes what
    follows with it."""
    return (
        float(torch.isclose(values.double(), expected.double(), rtol=1e-4, atol=most).double().mean()) > 0.995
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("one", ["each", "row", "layer"])
def test_columns_are_rounded_as_they_stand(shape, zeros, masked, one, place):
    assert column_solver.refused(place) == ""
    weights, upper = problem(shape, place)
    draw = torch.Generator().manual_seed(1)
    small = {"each": shape, "row": (*shape[:2], 1), "layer": (shape[0], 1, 1)}[one]
    scale = (0.3 + torch.rand(small, generator=draw)).to(place)
    zero = torch.randint(8, small, dtype=torch.uint8, generator=draw).to(place) if zeros else None
    kept = (torch.rand(shape, generator=draw) < 0.6).to(place) if masked else None
    scale, zero = (None if part is None else part.expand(*part.shape[:2], shape[2]) for part in (scale, zero))
    out, width = torch.full_like(weights, torch.nan), min(column_solver.BLOCK, shape[2])
    errors = column_solver.work_through(weights, upper, out, 0, column_solver.Target(kept, scale, zero, 3))
    whole = scale.expand(shape), None if zero is None else zero.expand(shape)
    expected, lost = rounded_one_by_one(weights, upper, whole, kept, 3)
    assert errors.shape == (*shape[:2], width)
    assert agree(out[:, :, :width], expected[:, :, :width])
    assert agree(errors, lost[:, :, :width])
    assert bool(out[:, :, width:].isnan().all())  # of the next block nothing is written
    assert kept is None or bool((out[:, :, :width][~kept[:, :, :width]] == 0).all())
    codes = out[:, :, :width].double() / whole[0][:, :, :width].double()
    assert torch.allclose(codes, codes.round(), atol=1e-5)  # on the grid, each and every one


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_removed_weights_are_made_up_for_by_the_columns_that_follow(shape, place):
    weights, upper = problem(shape, place)
    upper = upper * (
        0.5 + torch.rand(*upper.shape[:2], 1, generator=torch.Generator().manual_seed(3)).to(place)
    )  # a diagonal that is not 1
    kept = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5).to(place)
    last = (
        shape[2] // column_solver.BLOCK * column_solver.BLOCK % shape[2]
    )  # of the last shape the second block
    expected, lost = weights.double().clone(), torch.zeros_like(weights, dtype=torch.float64)
    for column in range(last, shape[2]):
        lost[:, :, column] = (
            torch.where(kept[:, :, column], 0.0, expected[:, :, column])
            / upper.double()[:, column, column, None]
        )
        expected[:, :, last:] -= lost[:, :, column, None] * upper.double()[:, column : column + 1, last:]
    expected[:, :, last:] *= kept[:, :, last:]
    out = weights.clone()
    errors = column_solver.work_through(out, upper, out, last, column_solver.Target(kept))
    assert torch.allclose(out.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(errors.double(), lost[:, :, last:], rtol=1e-4, atol=1e-4)


def test_whole_layers_are_rounded_and_pruned_as_without_it(place, monkeypatch):
    draw = torch.Generator().manual_seed(5)
    stack, inputs = (
        torch.randn(2, 24, 160, generator=draw).to(place),
        torch.randn(2, 400, 160, generator=draw),
    )
    moments = (inputs.transpose(1, 2) @ inputs / 400).to(place)
    layers = [Layer(name, name, torch.nn.Linear(1, 1)) for name in "ab"]
    upper, places, _ = gptq.factorise(moments, layers, damping=0.01, by_activation=True)
    spec, factor = Spec(3, 32), Factor(*sparsegpt.factorise(moments, layers)[:2])
    scales, solved_both, launched = fit(stack, spec), [], []
    run = column_solver.work_through
    monkeypatch.setattr(column_solver, "work_through", lambda *given: launched.append(1) or run(*given))
    for kernel in (True, False):
        monkeypatch.setattr(column_solver, "suited", lambda _weights, kernel=kernel: kernel)
        rounded = gptq.solve(stack, scales, gptq.Order(upper, places), spec)
        pruned, masks = sparsegpt.solve(
            stack.clone(), factor, [1700, 1900], None, torch.ones_like(stack, dtype=torch.bool)
        )
        assert (masks.flatten(1).sum(1) == stack[0].numel() - torch.tensor([1700, 1900], device=place)).all()
        assert bool((pruned[~masks] == 0).all())
        solved_both.append((rounded, pruned))
    assert len(launched) == 4  # two blocks of each
    assert torch.equal(form_of(solved_both[0][0], scales, spec).dequantize(), solved_both[0][0])
    for mine, plain in zip(*solved_both, strict=True):
        lost = [
            float(
                ((values - stack) @ moments @ (values - stack).transpose(1, 2)).diagonal(dim1=1, dim2=2).sum()
            )
            for values in (mine, plain)
        ]
        assert lost[0] == pytest.approx(lost[1], rel=0.01)
        assert float((mine == plain).float().mean()) > 0.9 or torch.allclose(mine, plain, atol=1e-3)


@pytest.mark.parametrize(
    "recipe",
    [
        wb.Recipe(wb.Quantize(weight_bits=3, rounding="gptq", group_size=8)),
        wb.Recipe(wb.Prune(sparsity=0.5, criterion="sparsegpt")),
        wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3, rounding="gptq")),
    ],
    ids=["gptq", "sparsegpt", "sparse gptq"],
)
def test_recipes_keep_their_promises(recipe, place, untried, monkeypatch):
    task = tiny_tasks.tiny_task("llama", str(place))
    compressed = compress(task, recipe)
    for layer in compressed.layers:
        layer.check()
    monkeypatch.setenv("WORKBENCH_TRITON", "off")
    column_solver.refused.cache_clear()
    plain = compress(task, recipe)
    assert "WORKBENCH_TRITON" in column_solver.refused(place)
    for row, plain_row in zip(compressed.report, plain.report, strict=True):
        for mine, plain_value in (
            (row.relative_error, plain_row.relative_error),
            (row.sparsity, plain_row.sparsity),
        ):
            assert (mine is None and plain_value is None) or mine == pytest.approx(
                plain_value, rel=0.02, abs=0.02
            ), row.name


def test_a_kernel_that_is_wrong_is_not_used(place, untried, monkeypatch):
    run = column_solver.work_through

    def wrong(weights, upper, out, start, to):
        errors = run(weights, upper, out, start, to)
        out[:, :, 1] += 0.3
        return errors

    monkeypatch.setattr(column_solver, "work_through", wrong)
    assert column_solver.refused(place) == "rounding columns gives other weights than the plain loop"
    assert not column_solver.suited(torch.zeros(1, 2, 4, device=place))


@pytest.mark.skipif(INTERPRETED, reason="Triton runs on the CPU here")
def test_without_a_gpu_the_plain_loops_run():
    assert column_solver.refused(torch.device("cpu")) == NEEDS_GPU
