"""Measurements against formulas written here, and against simulated truth: does a 95% interval hold 95% of
the time?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import safetensors.torch
import statistical
import tiny_tasks
import torch
from scipy import stats
from tiny_tasks import EVALUATION, tiny_task

import workbench as wb
from workbench.compress import compress
from workbench.errors import DataError
from workbench.measure.latency import measure_latency
from workbench.measure.memory import peak_memory_bytes
from workbench.measure.size import file_content, sizes
from workbench.metrics.quality import Estimate, flips, mean, paired_proportions, proportion, quality
from workbench.metrics.scores import Scores
from workbench.modules.packing import pack_model
from workbench.recipe import Recipe
from workbench.runtime.plan import realise
from workbench.tasks import score


def answers(correct: list[int], loss: list[float] | None = None) -> Scores:
    right = torch.tensor(correct, dtype=torch.float64)
    return Scores(
        torch.tensor(loss or [0.5] * len(correct), dtype=torch.float64),
        right,
        torch.ones(len(correct), dtype=torch.float64),
        right.long(),
    )


def pairs(gained: int, lost: int, both: int, neither: int) -> tuple[Scores, Scores]:
    """Return dense and compressed scores with these counts."""
    before = [0] * gained + [1] * lost + [1] * both + [0] * neither
    after = [1] * gained + [0] * lost + [1] * both + [0] * neither
    return answers(before), answers(after)


# --- intervals of single answers


@pytest.mark.parametrize(("successes", "total"), [(0, 16), (1, 16), (8, 16), (16, 16), (1857, 2000), (3, 7)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.9875])
def test_wilsons_interval_solves_wilsons_equation(successes, total, level):
    estimate = proportion(torch.tensor([1.0] * successes + [0.0] * (total - successes)), level)
    z = stats.norm.ppf((1 + level) / 2)
    # the two p with |p_hat - p| = z sqrt(p (1 - p) / n): roots of (1 + z^2/n) p^2 - (2 p_hat + z^2/n) p +
    # p_hat^2
    roots = np.sort(
        np.roots([1 + z**2 / total, -(2 * successes / total + z**2 / total), (successes / total) ** 2])
    )
    assert estimate.value == successes / total
    assert (estimate.low, estimate.high) == pytest.approx(tuple(roots), abs=1e-9)


# Worked by hand for Bonett and Price (2012): n = 16, gained 1, lost 4, z = 1.959964. p+ = 2/18, p- = 5/18, d
# = -3/18, d +- z sqrt((7/18 - (3/18)^2) / 18) = -.1667 +- 1.959964 * .141634.
def test_the_paired_interval_equals_numbers_worked_by_hand():
    dense, compressed = pairs(gained=1, lost=4, both=8, neither=3)
    estimate = paired_proportions(dense.correct, compressed.correct, 0.95)
    assert estimate.value == -3 / 16
    assert estimate.low == pytest.approx(-0.44426, abs=1e-4)
    assert estimate.high == pytest.approx(0.11093, abs=1e-4)


@pytest.mark.parametrize(("gained", "lost", "rest"), [(0, 0, 16), (5, 2, 57), (0, 9, 247), (30, 90, 1880)])
def test_the_paired_interval_is_waldss_after_one_more_of_each_kind(gained, lost, rest):
    """The same interval another way: Wald's, from the sample variance of -1, 0, 1 after adding one gain and
    one loss."""
    dense, compressed = pairs(gained, lost, rest // 2, rest - rest // 2)
    estimate = paired_proportions(dense.correct, compressed.correct, 0.95)
    adjusted = np.array([1] * (gained + 1) + [-1] * (lost + 1) + [0] * rest)
    half = stats.norm.ppf(0.975) * adjusted.std() / math.sqrt(len(adjusted))
    assert (estimate.low, estimate.high) == pytest.approx(
        (adjusted.mean() - half, adjusted.mean() + half), abs=1e-12
    )
    assert estimate.value == (gained - lost) / (gained + lost + rest)


def test_no_flips_in_few_items_prove_little():
    dense, compressed = pairs(0, 0, 12, 4)
    estimate = paired_proportions(dense.correct, compressed.correct, 0.95)
    assert estimate.value == 0
    assert estimate.low < -0.1
    assert estimate.high > 0.1
    everything = paired_proportions(torch.zeros(3), torch.ones(3), 0.999)
    assert -1 <= everything.low <= everything.value <= everything.high == 1


@pytest.mark.parametrize("items", [16, 64, 256])
@pytest.mark.parametrize(("up", "down"), [(0.02, 0.05), (0.005, 0.01), (0.1, 0.2), (0.01, 0.4)])
def test_the_paired_interval_covers_the_truth_as_often_as_it_says(items, up, down):
    """Exactly: over all outcomes but those that together come once in 10,000 times at most."""
    outcomes = np.array([(gained, lost) for gained in range(items + 1) for lost in range(items + 1 - gained)])
    rest = items - outcomes.sum(1)
    chance = stats.multinomial.pmf(np.c_[outcomes, rest], items, [up, down, 1 - up - down])
    likely = chance > 1e-7
    assert chance[likely].sum() > 1 - 1e-4
    covered = 0.0
    for (gained, lost), unchanged, share in zip(
        outcomes[likely].tolist(), rest[likely].tolist(), chance[likely].tolist(), strict=True
    ):
        dense, compressed = pairs(gained, lost, unchanged, 0)
        estimate = paired_proportions(dense.correct, compressed.correct, 0.95)
        covered += share * (estimate.low <= up - down <= estimate.high)
    assert covered >= 0.95


@pytest.mark.parametrize("items", [16, 64, 256])
def test_wilsons_interval_covers_the_truth_on_average(items):
    """On average over accuracies: at single ones it swings around 95% (Brown, Cai and DasGupta 2001)."""
    truths = np.linspace(0.5, 0.99, 99)
    estimates = [proportion(torch.tensor([1.0] * k + [0.0] * (items - k)), 0.95) for k in range(items + 1)]
    coverage = [
        sum(stats.binom.pmf(k, items, p) for k, e in enumerate(estimates) if e.low <= p <= e.high)
        for p in truths
    ]
    assert np.mean(coverage) >= 0.94


# --- averages over tokens


def test_with_equal_weights_the_mean_has_students_interval():
    values = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    for weight in (1.0, 511.0):
        estimate = mean(values, torch.full((40,), weight, dtype=torch.float64), 0.95)
        assert estimate.value == pytest.approx(float(values.mean()))
        assert (estimate.low, estimate.high) == pytest.approx((theirs.low, theirs.high))


def test_with_unequal_weights_it_is_the_ratio_estimator():
    values, weight = np.array([1.0, 2.0, 4.0, 3.0]), np.array([10.0, 30.0, 20.0, 5.0])
    estimate = mean(torch.tensor(values), torch.tensor(weight), 0.95)
    ratio = (values * weight).sum() / weight.sum()
    residual = weight * (values - ratio)
    error = math.sqrt((residual**2).sum() / 3 / 4) / weight.mean()  # Cochran (1977), section 6.4
    assert estimate.value == pytest.approx(ratio)
    assert estimate.high - estimate.value == pytest.approx(stats.t.ppf(0.975, 3) * error)


@pytest.mark.parametrize("items", [16, 64, 256])
def test_the_weighted_interval_covers_the_truth(items):
    """A ratio of few unequal windows is a little short of 95%; half the width would be found out."""
    generator, reaches = np.random.default_rng(11), []
    for _ in range(1500):
        weight = generator.integers(100, 512, items)
        values = 0.3 + generator.normal(size=items) * 20 / weight**0.5
        estimate = mean(torch.tensor(values), torch.tensor(weight, dtype=torch.float64), 0.95)
        reaches.append(statistical.reach(0.3, estimate.value, estimate.low, estimate.high))
    statistical.assert_covers(reaches, 0.935 if items == 16 else 0.95)


def test_infinite_losses_stay_infinite():
    estimate = mean(torch.tensor([1.0, math.inf]), torch.ones(2), 0.95)
    assert estimate == Estimate(math.inf, math.inf, math.inf)


# --- the whole quality


def test_perplexity_is_the_exponential_of_all_nats_over_all_tokens():
    task = tiny_task("gpt2")
    scores = score(task.kind, task.model, task.evaluation)
    logits = task.kind.logits(task.model, task.evaluation).double().log_softmax(-1)
    nats = -logits.gather(-1, task.evaluation.labels.unsqueeze(-1)).sum()
    compressed = compress(task, Recipe(wb.Quantize(weight_bits=2)))
    qualities = quality("perplexity", scores, score(task.kind, compressed.model, task.evaluation))
    assert [q.metric for q in qualities] == ["perplexity", "next-token accuracy"]
    assert qualities[1].drop.value == -qualities[1].change.value  # positive is worse, for every metric
    assert qualities[0].drop.value == qualities[0].change.value
    assert qualities[0].dense.value == pytest.approx(
        math.exp(float(nats) / task.evaluation.labels.numel()), rel=1e-5
    )
    assert qualities[0].change.value == pytest.approx(
        qualities[0].compressed.value / qualities[0].dense.value - 1, rel=1e-9
    )
    assert qualities[0].dense.low < qualities[0].dense.value < qualities[0].dense.high
    assert qualities[1].dense.value == pytest.approx(
        float((logits.argmax(-1) == task.evaluation.labels).double().mean())
    )


def test_quality_of_classes_says_everything_on_the_same_items():
    dense, compressed = pairs(gained=2, lost=5, both=40, neither=3)
    accuracy, loss = quality("accuracy", dense, compressed, confidence=0.9)
    assert (accuracy.metric, loss.metric) == ("accuracy", "loss")
    assert (accuracy.dense.value, accuracy.compressed.value) == (0.9, 0.84)
    assert accuracy.change.value == pytest.approx(-0.06)
    assert accuracy.drop == Estimate(-accuracy.change.value, -accuracy.change.high, -accuracy.change.low)
    assert accuracy.drop.low < accuracy.drop.value < accuracy.drop.high
    assert loss.drop == loss.change
    assert (accuracy.items, accuracy.confidence, accuracy.looks) == (50, 0.9, 1)


@pytest.mark.parametrize("looks", [1, 3, 4])
def test_several_looks_share_the_error_by_bonferroni(looks):
    dense, compressed = pairs(2, 5, 40, 3)
    level = 1 - 0.05 / looks
    accuracy, loss = quality("accuracy", dense, compressed, looks=looks)
    assert accuracy.change == paired_proportions(dense.correct, compressed.correct, level)
    assert accuracy.compressed == proportion(compressed.correct, level)
    assert loss.change == mean(compressed.loss - dense.loss, dense.weight, level)
    assert flips(dense, compressed, looks=looks) == proportion(
        (dense.answers != compressed.answers).double(), level
    )
    assert (accuracy.confidence, accuracy.looks) == (0.95, looks)  # the joint confidence


def test_flips_count_changed_answers_that_equal_accuracy_hides():
    dense, compressed = pairs(gained=5, lost=5, both=80, neither=10)
    assert quality("accuracy", dense, compressed)[0].change.value == 0
    assert flips(dense, compressed).value == 0.1
    tokens = [
        Scores(torch.zeros(2), torch.zeros(2), torch.full((2,), 4.0), torch.tensor(rows))
        for rows in ([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 0], [0, 0, 0, 8]])
    ]
    assert flips(*tokens).value == 0.5


def test_one_item_and_different_items_are_refused():
    with pytest.raises(DataError, match="1 evaluation item: an interval needs at least 2"):
        quality("accuracy", answers([1]), answers([1]))
    with pytest.raises(DataError, match="scores are of different items: 3 and 2"):
        quality("accuracy", answers([1, 1, 0]), answers([1, 1]))


# --- sizes


def entropy_free_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all tensors of a model, shared ones once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}.values())


def test_the_dense_file_is_what_safetensors_writes(sort, tmp_path):
    model = tiny_task(sort).model
    own = tiny_tasks.MODELS[sort]().to(torch.float32) if sort == "mixtral" else model  # as it is stored
    unique = {name: tensor for name, tensor in own.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(unique, tmp_path / "model.safetensors", metadata={"format": "pt"})
    counted = sizes(model)
    assert counted.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert counted.packed_bytes == counted.theoretical_bytes == entropy_free_bytes(model)
    assert counted.file_bytes > counted.packed_bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_low_bit_weights_take_their_bits_and_their_scales(bits):
    task = tiny_task("vit")
    compressed = compress(task, Recipe(wb.Quantize(weight_bits=bits, group_size=16)))
    packed = pack_model(compressed.model, compressed.layers)
    expected = theoretical = entropy_free_bytes(task.model)
    for row in compressed.report:
        if row.bits:
            count, groups = row.shape[0] * row.shape[1], row.shape[0] * row.shape[1] // 16
            expected += count * bits // 8 + 2 * groups + -(-groups * bits // 8) - 4 * count
            theoretical += count * bits // 8 - 4 * count
    assert packed.packed_bytes == expected
    assert packed.theoretical_bytes == theoretical
    assert (
        len(file_content(packed)) - packed.packed_bytes < 160 * len(packed.tensors) + 64
    )  # a header and nothing else


def test_zeros_save_bytes_only_where_they_can():
    task = tiny_task("vit")
    dense = sizes(task.model)
    for sparsity, smaller in ((0.0, False), (0.01, False), (0.25, True), (0.5, True), (0.95, True)):
        compressed = compress(task, Recipe(wb.Prune(sparsity=sparsity)))
        counted = sizes(compressed.model, compressed.layers)
        assert (counted.packed_bytes < dense.packed_bytes) == smaller
        zeros = sum(
            row.shape[0] * row.shape[1] - round((1 - row.sparsity) * row.shape[0] * row.shape[1])
            for row in compressed.report
            if row.sparsity
        )
        assert counted.theoretical_bytes == dense.theoretical_bytes - 4 * zeros
        if smaller:  # four bytes a kept weight and one bit a weight
            positions = sum(-(-row.shape[0] * row.shape[1] // 8) for row in compressed.report if row.sparsity)
            assert counted.packed_bytes == counted.theoretical_bytes + positions


def test_four_bits_and_half_zeros_are_stored_in_whichever_way_is_smaller():
    task = tiny_task("vit")
    bits = {}
    for width in (2, 8):
        compressed = compress(task, Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=width)))
        bits[width] = {
            encoding.kind
            for encoding in pack_model(compressed.model, compressed.layers).encodings.values()
            if encoding.bits
        }
    assert bits == {2: {"grid"}, 8: {"grid+bitmask"}}  # 2 bits against 1 + 1 and a mask; 8 against 4 + 1


# --- latency and memory


def test_latency_is_timed_in_turn_and_recorded_with_its_conditions(device):
    task = tiny_task("vit", device)
    order: list[str] = []
    realised = tiny_task("vit", device).model
    for name, model in (("dense", task.model), ("other", realised)):
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    latency = measure_latency(task.kind, task.model, realised, task.evaluation[:8].to(device), most=10)
    turns = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(turns) > 10  # some to warm up
    assert set(turns) == {
        ("dense", "other"),
        ("other", "dense"),
    }  # neither is ever ahead by more than one, nor always first
    assert abs(turns[-10:].count(("dense", "other")) - 5) <= 1
    assert (latency.batch, latency.input_shape, latency.rounds) == (8, (1, 8, 8), 10)
    assert 0 < latency.median_ms <= latency.p95_ms
    assert 0 < latency.dense_median_ms <= latency.dense_p95_ms
    assert latency.speedup.low <= latency.speedup.value <= latency.speedup.high


def test_a_model_that_works_five_times_as_hard_is_seen_to(monkeypatch):
    """Time is what the clock says.

    This one counts passes of the model instead of seconds, so that no other program matters.
    """
    task, passes = tiny_task("vit"), []
    task.model.register_forward_hook(lambda *_: passes.append(1))

    class Slow(torch.nn.Module):
        def forward(self, **inputs):
            for _ in range(4):
                task.model(**inputs)
            return task.model(**inputs)

    def counted(_clock, work):
        before = len(passes)
        work()
        return float(len(passes) - before)

    monkeypatch.setattr("workbench.measure.latency.Clock.time_ms", counted)
    latency = measure_latency(task.kind, task.model, Slow(), task.evaluation[:8], most=15)
    assert (latency.speedup.value, latency.speedup.low, latency.speedup.high) == (0.2, 0.2, 0.2)
    assert (latency.dense_median_ms, latency.median_ms, latency.rounds) == (1.0, 5.0, 15)


def test_a_slow_model_is_timed_for_as_long_as_was_granted_and_at_least_six_times():
    task = tiny_task("vit")
    latency = measure_latency(task.kind, task.model, tiny_task("vit").model, task.evaluation[:8], budget_s=0)
    assert latency.rounds == 6
    assert latency.speedup.low <= latency.speedup.value <= latency.speedup.high


def test_peak_memory_holds_the_weights_and_something_more(sort, device):
    task = tiny_task(sort, device)
    few, many = (
        peak_memory_bytes(task.kind, task.model, task.evaluation[:count].to(device))
        for count in (2, EVALUATION)
    )
    held = sum({p.data_ptr(): p.nbytes for p in [*task.model.parameters(), *task.model.buffers()]}.values())
    assert held < few < many


def test_a_low_rank_model_needs_less_memory(device):
    task = tiny_task("vit", device)
    compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.1)))
    dense, low = (
        peak_memory_bytes(task.kind, model, task.evaluation[:1].to(device))
        for model in (task.model, compressed.model)
    )
    assert low < dense


def test_what_no_kernel_makes_faster_says_so():
    task = tiny_task("vit")
    reasons = {
        label: realise(compress(task, Recipe(*steps)), "cpu").no_kernel
        for label, steps in {
            "dense": (),
            "low": (wb.LowRank(rank_ratio=0.3),),
            "pruned": (wb.Prune(sparsity=0.5),),
            "2:4": (wb.Prune(pattern="2:4"),),
            "both": (wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3)),
        }.items()
    }
    assert reasons["dense"] == reasons["low"] == ()
    assert len(reasons["pruned"]) == 1
    assert "unstructured zeros on this CPU" in reasons["pruned"][0]
    assert "2:4 zeros on this CPU" in reasons["2:4"][0]
    assert len(reasons["both"]) == 2
    assert "3-bit" in reasons["both"][1]
