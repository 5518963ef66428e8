"""Bench: looks that grow, work that can be stopped, and one value however one asks for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.bench import Bench
from workbench.compress import compress
from workbench.errors import Cancelled, DataError, DeviceError, RecipeError
from workbench.ledger.ledger import Ledger
from workbench.measure.evaluation.outputs import scored as keeping
from workbench.measure.size import sizes
from workbench.measure.summary import summary
from workbench.metrics.quality import flips, quality
from workbench.metrics.sequential_looks import joint_level
from workbench.recipe import Recipe
from workbench.tasks import score
from workbench.tasks.language_modelling import window_items

RECIPE = Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3))


@pytest.fixture
def bench(tmp_path, device, monkeypatch) -> Bench:
    monkeypatch.setenv(
        "WORKBENCH_CACHE", "off"
    )  # what another test has left there would not be computed here
    return Bench(
        tiny_task("vit", device, evaluation=300),
        device=device,
        ledger=tmp_path / "points.journal",
        progress=False,
    )


def test_a_stream_looks_after_16_64_256_and_all_items_before_it_is_complete(bench):
    looks = list(bench.stream(RECIPE))
    assert [point.items for point in looks] == [16, 64, 256, 300, 300]
    assert [point.complete for point in looks] == [False, False, False, False, True]
    assert (looks[-1].quality, looks[-1].flips, looks[-1].layers) == (
        looks[-2].quality,
        looks[-2].flips,
        looks[-2].layers,
    )
    assert {point.items_total for point in looks} == {300}
    assert len({point.key for point in looks}) == 1
    assert all(
        q.looks == 4 and q.confidence == 0.95 and q.items == point.items
        for point in looks
        for q in point.quality
    )
    widths = [point.primary.change.high - point.primary.change.low for point in looks]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 2
    assert all(point.latency is None and point.peak_memory_bytes is None for point in looks[:-1])
    assert bench.ledger.rows() == [looks[-1]]


def test_on_a_cpu_the_first_look_at_long_windows_is_after_four(tmp_path, device):
    short = tiny_task("llama", device, evaluation=40)
    ids = torch.randint(64, (40, 48), generator=torch.Generator().manual_seed(7))
    for task, first in (
        (short, (16,)),
        (dataclasses.replace(short, evaluation=window_items(ids)), (4, 16) if device == "cpu" else (16,)),
    ):
        bench = Bench(task, device=device, ledger=tmp_path / f"{len(first)}.journal", progress=False)
        looks = list(bench.stream(RECIPE))
        counts = (*first, 40)
        assert [point.items for point in looks] == [*counts, 40]
        level = joint_level(counts, 0.95)
        some = task.evaluation.to(device)[: counts[0]]
        dense, mine = score(task.kind, task.model, some), score(task.kind, compress(task, RECIPE).model, some)
        expected = quality("perplexity", dense, mine, looks=len(counts), level=level)[0].change
        assert looks[0].primary.change.value == pytest.approx(expected.value, rel=1e-4)
        assert looks[0].primary.change.high == pytest.approx(expected.high, rel=1e-3)
        widths = [point.primary.change.high - point.primary.change.low for point in looks]
        assert widths == sorted(widths, reverse=True)


def test_every_look_is_of_the_first_items_scored_directly(bench):
    task = bench.task
    compressed = compress(task, RECIPE)
    evaluation = task.evaluation.to(bench.device)
    for point in bench.stream(RECIPE):
        some = evaluation[: point.items]
        dense, mine = score(task.kind, task.model, some), score(task.kind, compressed.model, some)
        level = joint_level((16, 64, 256, 300), 0.95)
        expected = quality("accuracy", dense, mine, looks=4, level=level)
        assert (point.primary.change, point.primary.dense, point.primary.compressed) == (
            expected[0].change,
            expected[0].dense,
            expected[0].compressed,
        )
        assert point.quality[1].change.value == pytest.approx(expected[1].change.value, rel=1e-5, abs=1e-7)
        assert point.flips == flips(dense, mine, level=level)


def test_measure_gives_the_values_of_the_last_look(bench, tmp_path):
    *_, last = bench.stream(RECIPE)
    point = Bench(
        bench.task, device=bench.device.type, ledger=tmp_path / "other.journal", progress=False
    ).measure(RECIPE)
    assert point.primary.change.value == last.primary.change.value
    assert point.primary.looks == 1
    assert last.primary.change.low < point.primary.change.low  # one look need not share its error
    assert (point.sizes, point.dense_sizes, point.layers, point.flips.value) == (
        last.sizes,
        last.dense_sizes,
        last.layers,
        last.flips.value,
    )
    assert point.quality[1].compressed.value == last.quality[1].compressed.value


@pytest.mark.parametrize(
    ("items", "looks"), [(10, [10]), (16, [16]), (17, [16, 17]), (64, [16, 64]), (100, [16, 64, 100])]
)  # and the complete point
def test_few_items_have_fewer_looks(tmp_path, items, looks):
    bench = Bench(
        tiny_task("vit", evaluation=items), device="cpu", ledger=tmp_path / "points.journal", progress=False
    )
    assert [point.items for point in bench.stream(RECIPE)] == [*looks, items]
    assert bench.ledger.rows()[0].primary.looks == len(looks)


def test_the_dense_model_compared_with_itself_has_not_changed(sort, device, tmp_path):
    bench = Bench(tiny_task(sort, device), device=device, ledger=tmp_path / "points.journal", progress=False)
    point = bench.measure(Recipe())
    assert point.flips.value == 0
    for q in point.quality:
        assert q.change.value == 0
        assert q.change.low <= 0 <= q.change.high
        assert q.dense == q.compressed
    assert point.sizes == point.dense_sizes
    assert point.shrink == 1
    assert point.peak_memory_bytes == point.dense_peak_memory_bytes
    assert {row.outcome for row in point.layers} & {"left dense"}
    assert point.no_kernel == ()


def test_a_point_says_everything_that_was_asked_for(sort, device, tmp_path):
    bench = Bench(tiny_task(sort, device), device=device, ledger=tmp_path / "points.journal", progress=False)
    point = bench.measure(Recipe(wb.LowRank(rank_ratio=0.3), wb.Quantize(weight_bits=4)))
    compressed = bench.compress(point.recipe)
    assert point.sizes == sizes(compressed.model, compressed.layers)
    assert point.sizes.file_bytes < point.dense_sizes.file_bytes
    assert point.layers == compressed.report
    assert point.complete
    assert point.missing == {}
    assert point.latency.batch == point.context.latency_batch == len(bench.setting.latency_items)
    assert min(point.peak_memory_bytes, point.dense_peak_memory_bytes) > 0
    assert (point.provenance.calibration_items, point.provenance.training_items) == (24, 40)
    assert {"compression-workbench", "torch", "transformers", "python"} <= set(point.provenance.versions)
    assert point.context.device == device
    assert (point.context.model_name, point.context.data_name) == (f"tiny-{sort}", "noise")
    assert point.provenance.time.endswith("+00:00")


@pytest.mark.parametrize("what", ["prune", "distill", "evaluate", "latency"])
def test_cancelling_leaves_nothing_behind_and_the_bench_usable(bench, monkeypatch, what):
    recipe = Recipe(*RECIPE, wb.Distill(temperature=2, steps=3, distill_batch=8))
    before = weights(bench.task.model)
    reached: list[str] = []
    plain = bench.setting.statistics_with
    now = {"what": ""}

    class Watching:
        def __init__(self, *_, **__) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *_) -> None: ...
        def __call__(self, what: str, *_: int) -> None:
            now["what"] = what

    monkeypatch.setattr("workbench.bench.Bar", Watching)
    with pytest.raises(Cancelled, match=f"cancelled during {what}"):
        bench.measure(recipe, cancelled=lambda: now["what"] == what and (reached.append(what) or True))
    assert reached
    assert len(bench.ledger) == len(Ledger(bench.ledger.where)) == 0
    assert same(weights(bench.task.model), before)
    assert not any(module._forward_pre_hooks for module in bench.task.model.modules())
    assert plain == bench.setting.statistics_with
    assert bench.measure(recipe).complete
    assert len(Ledger(bench.ledger.where)) == 1


def test_a_stream_can_be_stopped_between_looks(bench):
    stop: list[bool] = []
    stream = bench.stream(RECIPE, cancelled=lambda: bool(stop))
    assert next(stream).items == 16
    stop.append(True)
    with pytest.raises(Cancelled):
        next(stream)
    stopped = bench.stream(RECIPE)
    next(stopped)
    stopped.close()
    assert len(bench.ledger) == 0
    assert [point.items for point in bench.stream(RECIPE)] == [16, 64, 256, 300, 300]


def test_again_measures_anew_and_keeps_one_point(bench):
    first = bench.measure(RECIPE)
    assert bench.measure(RECIPE) is first
    second = bench.measure(RECIPE, again=True)
    assert second is not first
    assert second.key == first.key
    assert second.primary == first.primary
    assert bench.ledger.rows() == [second]
    assert Ledger(bench.ledger.where).rows() == [second]
    assert [point.items for point in bench.stream(RECIPE, again=True)] == [16, 64, 256, 300, 300]


def test_what_does_not_depend_on_the_recipe_is_done_once(bench, monkeypatch):
    scored: list[bool] = []
    monkeypatch.setattr(
        "workbench.measure.evaluation.evaluator.score",
        lambda kind, model, items: (scored.append(model is bench.task.model), score(kind, model, items))[1],
    )
    monkeypatch.setattr(
        "workbench.measure.evaluation.evaluator.scored",
        lambda kind, model, items, *kept: (
            scored.append(model is bench.task.model),
            keeping(kind, model, items, *kept),
        )[1],
    )
    monkeypatch.setattr("workbench.measuring.measure_latency", lambda *_, **__: None)
    passes: list[int] = []
    bench.task.model.register_forward_pre_hook(
        lambda module, _: passes.append(1) if module is bench.task.model else None
    )
    bench.measure(Recipe(wb.LowRank(rank_ratio=0.3)))
    batches = -(-300 // 16)
    assert sorted(scored) == [False] * batches + [True] * batches
    once = len(passes)
    assert once == batches + 2 + (
        2 if bench.device.type == "cuda" else 1
    )  # evaluation, calibration, memory: on a GPU a first pass goes before the one that counts
    bench.measure(Recipe(wb.LowRank(rank_ratio=0.4)))
    assert len(scored) == 3 * batches
    assert len(passes) == once


def test_language_models_are_measured_in_perplexity(tmp_path):
    bench = Bench(tiny_task("gpt2"), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    point = bench.measure(Recipe(wb.Quantize(weight_bits=2)))
    assert [q.metric for q in point.quality] == ["perplexity", "next-token accuracy"]
    assert point.primary.drop == point.primary.change
    assert 0 < point.flips.value <= 1
    assert point.latency.input_shape == (8,)


@pytest.mark.parametrize("device_name", ["tpu", "meta", "cuda:99", ""])
def test_a_device_that_is_not_here_is_refused(tmp_path, device_name):
    with pytest.raises(DeviceError, match=repr(device_name)):
        Bench(tiny_task("vit"), device=device_name, ledger=tmp_path / "points.journal", progress=False)


def test_one_evaluation_item_is_too_few(tmp_path):
    bench = Bench(
        tiny_task("vit", evaluation=1), device="cpu", ledger=tmp_path / "points.journal", progress=False
    )
    with pytest.raises(DataError, match="1 evaluation item: an interval needs at least 2"):
        bench.measure(RECIPE)
    assert len(bench.ledger) == 0


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_kept(bench):
    with pytest.raises(RecipeError, match="names no layer"):
        bench.measure(Recipe(wb.Prune(sparsity=0.5, targets=("nothing",))))
    assert len(bench.ledger) == 0


@pytest.mark.gpu
def test_a_task_made_on_the_cpu_can_be_measured_on_the_gpu(tmp_path):
    task = tiny_task("vit", "cpu")
    point = Bench(task, device="cuda", ledger=tmp_path / "points.journal", progress=False).measure(
        Recipe(*RECIPE, wb.Distill(temperature=2, steps=2))
    )
    assert point.context.device == "cuda"


def test_notes_of_the_task_stand_with_every_point(tmp_path):
    task = dataclasses.replace(tiny_task("vit"), notes=("weights from the archive",))
    assert Bench(task, device="cpu", ledger=tmp_path / "points.journal", progress=False).measure(
        Recipe()
    ).warnings == ("weights from the archive",)


def test_random_state_is_the_users(bench):
    torch.manual_seed(9)
    state = torch.get_rng_state()
    bench.measure(RECIPE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("function", "what"), [("measure_latency", "latency"), ("peak_memory_bytes", "peak memory")]
)
def test_a_timer_that_fails_costs_its_own_figure_and_nothing_else(
    function: str, what: str, tmp_path, monkeypatch
) -> None:
    def broken(*_args, **_options):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    bench = Bench(tiny_task("vit", "cpu"), ledger=tmp_path / "points.journal", progress=False)
    whole = bench.measure(wb.Recipe(wb.Quantize(weight_bits=4)))
    assert whole.missing == {}
    monkeypatch.setattr(f"workbench.measuring.{function}", broken)
    point = bench.measure(wb.Recipe(wb.Quantize(weight_bits=3)))
    assert point.complete
    assert point.missing == {what: "OutOfMemoryError: tried to allocate 2 GiB"}
    assert (point.latency is None) == (what == "latency")
    assert (point.peak_memory_bytes is None) == (what == "peak memory")
    assert point.primary.items == len(bench.evaluation)
    assert wb.Ledger(tmp_path / "points.journal").find(point.key) == point
    assert (f"not measured: {what}", "", point.missing[what]) in summary(point)
    timed = {whole.key} if what == "latency" else {whole.key, point.key}
    assert {shown.key for shown in wb.tradeoff([whole, point], "latency").points} == timed
    assert "OutOfMemoryError" in wb.verdict(point) or what != "latency"
