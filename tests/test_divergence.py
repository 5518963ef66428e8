"""KL to the dense model, against float64 computed with all logits at once.

What is kept for it, and how it is said.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import structure_models
import torch
from scipy import stats
from tiny_tasks import VOCABULARY, tiny_task
from torch import nn

import workbench as wb
from workbench.bench import Bench
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.errors import DataError
from workbench.ledger.table import points_frame
from workbench.measure import kl as module
from workbench.measure.card import card, divergence_words
from workbench.measure.evaluation import outputs as outputs_module
from workbench.measure.evaluation.cuda_graphs import CapturedPass, Graphs
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.measure.evaluation.outputs import Outputs, Sampler, spread
from workbench.measure.kl import Each, Reference, divergence, kl_of_logits
from workbench.measure.measurement import Measurement
from workbench.measure.summary import summary
from workbench.tasks.base import Items, Task
from workbench.tasks.text_classification import TEXT_CLASSIFICATION

RECIPE = wb.Recipe(wb.Prune(sparsity=0.5))
NAMES = ("vit", "bert", "resnet", "llama", "gpt2", "untied")


def evaluator_of(task: Task, **settings) -> Evaluator:
    return Evaluator(task, task.evaluation.to(next(task.model.parameters()).device), **settings)


def measured(
    task: Task,
    model: nn.Module,
    evaluator: Evaluator,
    *,
    counts: tuple[int, ...] = (48,),
    dense_counts: tuple[int, ...] = (48,),
    level: float = 0.9,
):
    """Return the divergence of a model, its items read in steps."""
    reference, mine = Reference(evaluator, Statistics(task)), evaluator.outputs()
    scores, dense = [], []
    for count in dense_counts:
        evaluator.scores(task.model, dense, count, outputs=reference.reading())
    for count in counts:
        evaluator.scores(model, scores, count, outputs=mine)
    return divergence(evaluator, reference, model, mine, counts[-1], level=level)


def logits_of(task: Task, model: nn.Module) -> torch.Tensor:
    exact = copy.deepcopy(model).double()
    inputs = {
        name: tensor.to(next(model.parameters()).device) for name, tensor in task.evaluation.inputs.items()
    }
    with torch.no_grad():
        logits = exact(
            **{
                name: tensor.double() if tensor.is_floating_point() else tensor
                for name, tensor in inputs.items()
            }
        ).logits.cpu()
    return logits[:, :-1] if logits.ndim == 3 else logits


def items_kl(task: Task, model: nn.Module) -> torch.Tensor:
    """Return the KL divergence of each answer of each item [N, answers]."""
    dense, compressed = logits_of(task, task.model), logits_of(task, model)
    p, q = dense.softmax(-1), compressed.softmax(-1)
    return (p * (p / q).log()).sum(-1).reshape(len(dense), -1)


def interval(values: torch.Tensor, level: float) -> tuple[float, float, float]:
    middle, error = values.mean().item(), values.std().item() / math.sqrt(len(values))
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    return middle, max(0.0, middle - half), middle + half


def near(measured_kl: module.Divergence, values: torch.Tensor, level: float = 0.9, rel: float = 2e-4) -> None:
    assert (measured_kl.kl.value, measured_kl.kl.low, measured_kl.kl.high) == pytest.approx(
        interval(values, level), rel=rel, abs=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 6])
def test_it_is_the_divergence_of_whole_logits_in_float64(name, bits, device):
    task = structure_models.task_of(name, device)
    model = compress(task, wb.Recipe(wb.Quantize(weight_bits=bits)), shared=True).model
    diverged, expected = measured(task, model, evaluator_of(task)), items_kl(task, model)
    assert (diverged.items, diverged.answers) == (48, expected.numel())
    assert diverged.kl.value > 1e-5
    near(diverged, expected.mean(1), rel=2e-4 if device == "cpu" else 2e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fused", [(True, False), (False, True), (False, False)])
def test_heads_that_stay_on_give_the_same(name, fused):
    task = structure_models.task_of(name)
    model = compress(task, RECIPE).model
    evaluator = evaluator_of(task)
    plain = measured(task, model, evaluator)
    reader = evaluator_of(task)
    headless = reader.headless
    reader.headless = lambda model_read: (
        headless(model_read) if fused[0 if model_read is task.model else 1] else model_read
    )
    reader.head(type(task.model))
    diverged = measured(task, model, reader)
    assert diverged.answers == plain.answers
    assert diverged.kl.value == pytest.approx(plain.kl.value, rel=1e-5)


def test_looks_in_steps_and_a_dense_model_read_at_once_agree(sort):
    task = tiny_task(sort)
    model = compress(task, RECIPE, shared=True).model
    near(
        measured(task, model, evaluator_of(task), counts=(16, 17, 48), dense_counts=(20, 48)),
        items_kl(task, model).mean(1),
    )
    near(
        measured(task, model, evaluator_of(task), counts=(16, 30), dense_counts=(48,)),
        items_kl(task, model)[:30].mean(1),
    )
    near(
        measured(task, model, evaluator_of(task), counts=(30,), dense_counts=(16,)),
        items_kl(task, model)[:30].mean(1),
    )  # the rest is read


def test_texts_read_in_the_order_of_their_length_are_told_apart(device):
    task = tiny_task("bert", device)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 9, (48,), generator=generator)
    task.evaluation.inputs["attention_mask"][:] = (torch.arange(8) < lengths[:, None]).long()
    ids = torch.nn.functional.pad(
        task.evaluation.inputs["input_ids"], (0, 8)
    )  # 16 columns, of which half are never read
    mask = torch.nn.functional.pad(task.evaluation.inputs["attention_mask"], (0, 8))
    task = dataclasses.replace(
        task,
        kind=TEXT_CLASSIFICATION,
        evaluation=Items({"input_ids": ids, "attention_mask": mask}, task.evaluation.labels),
        batch_size=5,
    )
    model = compress(task, wb.Recipe(wb.Prune(sparsity=0.5)), shared=True).model
    evaluator = evaluator_of(task)
    assert evaluator.text_spans() is not None
    assert not torch.equal(torch.argsort(lengths, descending=True, stable=True), torch.arange(48))
    near(measured(task, model, evaluator, counts=(16, 48)), items_kl(task, model).mean(1), rel=1e-3)


def test_the_dense_model_is_exactly_0(sort, device, ledger):
    bench = Bench(tiny_task(sort, device), device=device, ledger=ledger, progress=False)
    point = bench.measure(wb.Recipe())
    assert (point.kl.value, point.kl.low, point.kl.high) == (0.0, 0.0, 0.0)
    assert point.kl_items == 48


def test_equal_logits_give_0_and_broken_ones_infinity():
    logits = 30 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kl_of_logits(logits, logits.clone()), torch.zeros(6, dtype=torch.float64))
    broken = logits.clone()
    broken[0, 3], broken[1, 3], broken[2, :] = torch.nan, torch.inf, -torch.inf
    broken[3, int(logits[3].argmax())] = -torch.inf  # an answer that became impossible
    divergences = kl_of_logits(logits, broken)
    assert torch.equal(divergences[:4], torch.full((4,), torch.inf, dtype=torch.float64))
    assert torch.equal(divergences[4:], torch.zeros(2, dtype=torch.float64))
    masked, shifted = logits.clone(), logits.clone() + 0.1 * torch.arange(50)
    masked[:, 7], shifted[:, 7] = -torch.inf, -torch.inf  # impossible for both
    kept = [i for i in range(50) if i != 7]
    assert torch.equal(kl_of_logits(masked, shifted), kl_of_logits(masked[:, kept], shifted[:, kept]))


@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0, 30.0])
def test_small_and_large_changes_agree_with_float64(size):
    generator = torch.Generator().manual_seed(1)
    dense = 5 * torch.randn(20, 5_000, generator=generator)
    compressed = dense + size * torch.randn(20, 5_000, generator=generator)
    p, q = dense.double().log_softmax(-1), compressed.double().log_softmax(-1)
    assert torch.allclose(kl_of_logits(dense, compressed), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-7)


def test_a_destroyed_model_is_infinitely_far(ledger):
    task = tiny_task("llama")
    bench = Bench(task, device="cpu", ledger=ledger, progress=False)
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    diverged = measured(task, model, bench.setting.evaluator)
    assert diverged.kl.value == diverged.kl.low == diverged.kl.high == math.inf
    point = dataclasses.replace(bench.measure(RECIPE), kl=diverged.kl)
    assert Measurement.from_json(point.to_json()).kl == diverged.kl
    assert "inf [inf, inf] nats a token" in divergence_words(point)


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_kept_stays_within_its_budget(fused, monkeypatch):
    task = structure_models.task_of("llama")
    model = compress(task, RECIPE).model
    evaluator = evaluator_of(task)
    width = 16 if fused else VOCABULARY
    monkeypatch.setattr(
        outputs_module, "HOST_BYTES", 48 * 3 * width * 4 + 10
    )  # 3 of 7 tokens of each of 48 windows
    if not fused:
        evaluator.heads[type(task.model)] = None
    diverged = measured(task, model, evaluator)
    assert (diverged.items, diverged.answers) == (48, 48 * 3)
    assert evaluator.sampler.places.tolist() == [1, 3, 5]
    near(diverged, items_kl(task, model)[:, [1, 3, 5]].mean(1))


def test_beyond_the_budget_the_first_items_are_used(monkeypatch):
    task = tiny_task("vit")
    model = compress(task, RECIPE).model
    monkeypatch.setattr(outputs_module, "HOST_BYTES", 20 * 4 * 4)  # 4 classes
    diverged = measured(task, model, evaluator_of(task))
    assert (diverged.items, diverged.answers) == (20, 20)
    near(diverged, items_kl(task, model)[:20].mean(1))


def test_few_logits_take_some_tokens_of_every_window(monkeypatch):
    task = structure_models.task_of("gpt2")
    model = compress(task, RECIPE).model
    monkeypatch.setattr(outputs_module, "LOGITS", 48 * 2 * VOCABULARY)
    monkeypatch.setattr(module, "CHUNK", 3 * VOCABULARY)
    diverged = measured(task, model, evaluator_of(task))
    assert (diverged.items, diverged.answers) == (48, 96)
    near(diverged, items_kl(task, model)[:, spread(7, 2).tolist()].mean(1))
    monkeypatch.setattr(outputs_module, "LOGITS", 10 * VOCABULARY)
    few = measured(task, model, evaluator_of(task))
    assert (few.items, few.answers) == (10, 10)
    near(few, items_kl(task, model)[:10, 3])


def test_no_room_is_said(monkeypatch, ledger):
    monkeypatch.setattr(outputs_module, "HOST_BYTES", 20)
    point = Bench(tiny_task("vit"), device="cpu", ledger=ledger, progress=False).measure(RECIPE)
    assert point.kl is None
    assert (
        point.missing["KL to the dense model"]
        == "outputs of 1 of 48 items are kept within 20 bytes: an interval needs at least 2"
    )
    assert any(what == "not measured: KL to the dense model" for what, _, _ in summary(point))


@pytest.mark.parametrize(("length", "count"), [(7, 1), (7, 3), (7, 7), (511, 64)])
def test_positions_are_spread_evenly(length, count):
    positions = spread(length, count)
    assert positions.unique().numel() == count
    assert positions.max() < length
    ends = torch.cat([torch.tensor([-1]), positions, torch.tensor([length])])
    assert int(ends.diff().max()) <= length / count + 1


def test_models_run_once_and_no_item_twice(sort, ledger, monkeypatch):
    task, batches = tiny_task(sort), []
    bench = Bench(task, device="cpu", ledger=ledger, progress=False)
    plain = type(task.kind).logits
    evaluating = []
    scores = Evaluator.scores
    monkeypatch.setattr(
        Evaluator,
        "scores",
        lambda self, model, *rest, **named: (
            evaluating.append(1),
            scores(self, model, *rest, **named),
            evaluating.pop(),
        )[1],
    )

    def logits(self, model, items):
        if evaluating and len(items) > 1:  # one item is tried where shortcuts are looked for
            batches.append(len(items))
        return plain(self, model, items)

    monkeypatch.setattr(type(task.kind), "logits", logits)
    for sparsity in (0.3, 0.6):
        *_, last = bench.stream(wb.Recipe(wb.Prune(sparsity=sparsity)))
        assert last.kl is not None
    assert sum(batches) == 3 * 48  # the dense model and two others


def test_points_carry_it_and_early_looks_do_not(ledger):
    task = tiny_task("llama")
    bench = Bench(task, device="cpu", ledger=ledger, progress=False)
    *early, last = bench.stream(RECIPE)
    assert [point.kl for point in early] == [None] * len(early)
    model = bench.compress(RECIPE).model
    assert last.kl.value == pytest.approx(items_kl(task, model).mean().item(), rel=1e-4)
    assert last.kl.low < last.kl.value < last.kl.high
    assert (last.kl_items, last.kl_answers) == (48, 48 * 7)
    assert Measurement.from_json(last.to_json()) == last
    text = (
        f"{last.kl.value:.3g} [{last.kl.low:.3g}, {last.kl.high:.3g}] nats a token, of 336 tokens in 48"
        " windows"
    )
    assert ("KL to dense", "", text) in summary(last)
    assert f"| KL to dense | {text} |" in card(last)
    row = points_frame([last]).iloc[0]
    assert (row["kl_to_dense_nats"], row["kl_to_dense_nats_low"], row["kl_answers"]) == (
        last.kl.value,
        last.kl.low,
        336,
    )


def test_old_points_without_it_load(ledger):
    point = Bench(tiny_task("vit"), device="cpu", ledger=ledger, progress=False).measure(RECIPE)
    stored = json.loads(point.to_json())
    for name in ("kl", "kl_items", "kl_answers"):
        del stored[name]
    old = Measurement.from_json(json.dumps(stored))
    assert (old.kl, old.kl_items, old.kl_answers) == (None, 0, 0)
    assert not any(what == "KL to dense" for what, _, _ in summary(old))
    assert dataclasses.replace(old, kl=point.kl, kl_items=48, kl_answers=48) == point
    assert divergence_words(point).endswith("nats an item, of 48 items")


def test_a_point_that_goes_on_is_of_all_items_it_has_read(tmp_path, sort):
    task = tiny_task(sort, evaluation=300)
    bench = Bench(task, device="cpu", ledger=tmp_path / "points.journal", progress=False)
    stopped = bench.measure(RECIPE, margin=1e9)
    expected = items_kl(task, bench.compress(RECIPE).model).mean(1)
    assert (stopped.items, stopped.kl_items) == (16, 16)
    assert stopped.kl.value == pytest.approx(expected[:16].mean().item(), rel=1e-4)
    whole = bench.measure(RECIPE, margin=0)
    assert (whole.items, whole.kl_items, whole.kl_answers) == (300, 300, 300 * stopped.kl_answers // 16)
    assert (whole.kl.value, whole.kl.low, whole.kl.high) == pytest.approx(interval(expected, 0.95), rel=1e-3)


def test_a_point_that_stops_twice_keeps_what_it_knew(tmp_path):
    task = tiny_task("vit", evaluation=300)
    bench = Bench(task, device="cpu", ledger=tmp_path / "points.journal", progress=False)
    widths = [
        point.primary.change.half_width
        for point in Bench(task, device="cpu", ledger=tmp_path / "other.journal", progress=False).stream(
            RECIPE
        )
    ]
    points = [bench.measure(RECIPE, margin=margin) for margin in (1.0, (widths[0] + widths[1]) / 2, 0)]
    assert [point.kl_items for point in points] == [16, 64, 300] == [point.items for point in points]


def test_items_known_before_fill_what_is_missing():
    new = Each(torch.tensor([2, 3, 5]), torch.tensor([0.2, 0.3, 0.5]), torch.ones(3))
    old = Each(torch.tensor([0, 3, 4]), torch.tensor([1.0, 9.0, 1.4]), torch.ones(3))
    joined = new.joined(old)
    assert joined.index.tolist() == [0, 2, 3, 4, 5]
    assert joined.kl.tolist() == pytest.approx([1.0, 0.2, 0.3, 1.4, 0.5])
    assert new.joined(None) is new


def test_a_model_whose_outputs_are_gone_is_known_by_what_was_kept_of_each_item():
    task = tiny_task("vit")
    model, evaluator = compress(task, RECIPE).model, evaluator_of(task)
    reference, mine = Reference(evaluator, Statistics(task)), evaluator.outputs()
    evaluator.scores(model, [], 48, outputs=mine)
    whole = divergence(evaluator, reference, model, mine, 48, level=0.9)
    assert (
        divergence(evaluator, reference, model, evaluator.outputs(), 48, level=0.9, earlier=whole.each)
        == whole
    )
    with pytest.raises(DataError, match="outputs of 0 of 48 items"):
        divergence(evaluator, reference, model, evaluator.outputs(), 48, level=0.9)


def test_dense_outputs_that_were_thrown_out_are_read_again():
    task = tiny_task("llama")
    evaluator, statistics = evaluator_of(task), Statistics(task)
    reference, model = Reference(evaluator, statistics), compress(task, RECIPE).model
    readings = []
    for _ in range(2):
        mine = evaluator.outputs()
        evaluator.scores(model, [], 48, outputs=mine)
        readings.append(divergence(evaluator, reference, model, mine, 48, level=0.95))
        assert "dense outputs" in statistics.kept
        assert reference.reading() is None  # nothing is held beside the cache
        statistics.kept.pop("dense outputs")
    assert readings[0] == readings[1]


class Stepwise:
    """What a graph does, step by step: overwrites its own outputs."""

    def __init__(self, graphs: Graphs, inputs: Items) -> None:
        self.graphs, self.inputs = graphs, inputs
        self.loss, self.answers = graphs.evaluate(inputs)
        self.sampled = graphs.sampled.clone()

    def replay(self) -> None:
        loss, answers = self.graphs.evaluate(self.inputs)
        self.loss.copy_(loss)
        self.answers.copy_(answers)
        self.sampled.copy_(self.graphs.sampled)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_graphs_give_what_is_kept_of_each_batch(name, monkeypatch):
    def capture(self: Graphs, items: Items) -> CapturedPass:
        stepwise = Stepwise(
            self, Items({key: tensor.clone() for key, tensor in items.inputs.items()}, items.labels.clone())
        )
        return CapturedPass(stepwise, stepwise.inputs, stepwise.loss, stepwise.answers, stepwise.sampled)

    monkeypatch.setattr(Graphs, "capture", capture)
    monkeypatch.setattr(Graphs, "why_not", lambda self: "")
    task = structure_models.task_of(name)
    model, evaluator = compress(task, RECIPE, shared=True).model, evaluator_of(task)
    evaluator.head(type(task.model))
    graphs = Graphs(task.kind, task.model, task.batch_size, evaluator.prepared, sampler=evaluator.sampler)
    evaluator.graphs, reference, mine = graphs, Reference(evaluator, Statistics(task)), evaluator.outputs()
    for model_read, outputs in ((task.model, reference.reading()), (model, mine)):
        with graphs.loaded(model_read) as replay:
            evaluator.replay(replay, 0, 48, lambda *_: None, outputs)
    assert graphs.captured
    near(divergence(evaluator, reference, model, mine, 48, level=0.9), items_kl(task, model).mean(1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_on_a_gpu_graphs_and_single_steps_agree(name):
    task = structure_models.task_of(name, "cuda")
    model = compress(task, RECIPE, shared=True).model
    diverged = [measured(task, model, evaluator_of(task, graphs=graphs)) for graphs in (True, False)]
    assert diverged[0] == diverged[1]
    near(diverged[0], items_kl(task, model).mean(1), rel=2e-3)


def test_outputs_beside_the_room_are_left_out():
    outputs = Outputs(Sampler(10, 3 * 4 * 2, 10**9))
    outputs.keep(torch.tensor([4, 1, 7]), torch.tensor([[4.0, 4.0], [1.0, 1.0], [7.0, 7.0]]))
    assert (outputs.rows.shape, outputs.read.tolist()) == ((3, 2), [False, True, False])
    assert outputs.rows[1].tolist() == [1.0, 1.0]
    assert not outputs.covers(3)
    outputs.keep(torch.tensor([2, 0, 3]), torch.tensor([[2.0, 2.0], [0.0, 0.0], [3.0, 3.0]]))
    assert outputs.rows.tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert outputs.covers(10)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_streamed_models_give_the_same(name, device, tmp_path):
    benches = [
        wb.Bench(
            tiny_task(name),
            device=device,
            placement=where,
            ledger=tmp_path / f"{where}.journal",
            progress=False,
        )
        for where in ("device", "streamed")
    ]
    for bench in benches:
        bench.setting.evaluator.fused = False  # as a streamed model is run
    points = [bench.measure(RECIPE) for bench in benches]
    assert points[0].kl.value > 0
    assert [(point.kl, point.kl_items, point.kl_answers) for point in points] == 2 * [
        (points[0].kl, points[0].kl_items, points[0].kl_answers)
    ]
