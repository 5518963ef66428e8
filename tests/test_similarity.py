"""Sentence similarity: pairs and their scores, rank correlation with its interval, and every method on a tiny
encoder."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import statistical
import tiny_models
import torch
from scipy import stats

import workbench as wb
from workbench.errors import DataError, ModelError
from workbench.measure.kl import WHAT
from workbench.metrics.bootstrap import average_ranks, paired, spearman
from workbench.metrics.quality import flips, quality
from workbench.metrics.scores import Scores
from workbench.tasks import score
from workbench.tasks.sentence_similarity import SENTENCE_SIMILARITY, SentenceSimilarity, cosines, pooled
from workbench.zoo import load_task


def encoder(folder):
    """Save a tiny BERT without a head, as sentence encoders are."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    tiny_models.tokenizer_files(folder)
    return folder


def pairs(path, count=60, top=5.0, header=("sentence1", "sentence2", "score")):
    generator = np.random.default_rng(0)
    rows = [
        [" ".join(f"w{i}" for i in generator.integers(0, 40, generator.integers(1, 6))) for _ in range(2)]
        + [round(float(generator.uniform(0, top)), 2)]
        for _ in range(count)
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    folder = tmp_path_factory.mktemp("similarity")
    return load_task(encoder(folder / "m"), pairs(folder / "pairs.csv"), progress=False)


def scores(cosine, human):
    """Return scores as the kind makes them."""
    cosine, human = (torch.as_tensor(np.asarray(values, np.float64)) for values in (cosine, human))
    none = torch.zeros_like(cosine)
    return Scores((cosine - human).square(), none, none + 1, none.long(), {"cosine": cosine, "score": human})


# --- the task


def test_pairs_become_items(alike):
    assert alike.kind.name == "sentence similarity"
    assert [len(part) for part in (alike.evaluation, alike.calibration, alike.training)] == [30, 15, 15]
    assert alike.evaluation.inputs["input_ids"].shape == (30, 2, 8)  # the longest has 5 tokens
    assert alike.evaluation.labels.dtype == torch.float32
    assert 0 <= float(alike.evaluation.labels.min()) <= float(alike.evaluation.labels.max()) <= 1
    assert "scores of 0 to 5 stand between 0 and 1; texts are padded to 8 tokens" in alike.notes
    assert alike.labels == ()


def test_vectors_are_means_of_real_tokens(alike):
    items = alike.evaluation[:6]
    vectors = alike.kind.logits(alike.model, items)
    assert vectors.shape == (6, 2, 16)
    for i in range(6):
        for side in (0, 1):
            ids = items.inputs["input_ids"][i, side][items.inputs["attention_mask"][i, side].bool()]
            mean = (
                alike.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
                .last_hidden_state[0]
                .mean(0)
            )
            assert torch.allclose(vectors[i, side], mean / mean.norm(), atol=1e-5)  # filling changes nothing


def test_score_is_the_cosine_of_both_texts(alike):
    scored = score(alike.kind, alike.model, alike.evaluation)
    with torch.no_grad():
        vectors = alike.kind.logits(alike.model, alike.evaluation).double()
    assert torch.allclose(scored.details["cosine"], (vectors[:, 0] * vectors[:, 1]).sum(1), atol=1e-6)
    assert torch.equal(scored.details["score"], alike.evaluation.labels.double())
    assert float(alike.kind.loss(vectors, alike.evaluation.labels)) == pytest.approx(
        float(scored.loss.mean()), rel=1e-5
    )


def test_soft_loss_is_half_the_squared_distance():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.nn.functional.normalize(torch.randn(7, 2, 5, generator=generator), dim=-1) for _ in range(2)
    )
    assert float(SENTENCE_SIMILARITY.soft_loss(student, teacher, torch.zeros(7), 3.0)) == pytest.approx(
        float((student - teacher).square().sum(-1).mean() / 2), rel=1e-5
    )
    assert float(SENTENCE_SIMILARITY.soft_loss(student, student, torch.zeros(7), 3.0)) == pytest.approx(
        0, abs=1e-6
    )
    assert torch.allclose(
        cosines(student), torch.nn.functional.cosine_similarity(student[:, 0], student[:, 1]), atol=1e-6
    )


def test_pooling_is_read_from_the_model(tmp_path):
    kind, notes = pooled(SENTENCE_SIMILARITY, tmp_path, None)
    assert (kind.pooling, len(notes)) == ("mean", 1)
    (tmp_path / "1_Pooling").mkdir()
    told = tmp_path / "1_Pooling" / "config.json"
    told.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert pooled(SENTENCE_SIMILARITY, tmp_path, None) == (SentenceSimilarity(pooling="first"), ())
    told.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(
        ModelError, match="pools by pooling_mode_max_tokens; built are pooling_mode_mean_tokens"
    ):
        pooled(SENTENCE_SIMILARITY, tmp_path, None)
    (tmp_path / "modules.json").write_text(
        json.dumps(
            [
                {"type": "sentence_transformers.models.Transformer"},
                {"type": "sentence_transformers.models.Dense"},
            ]
        )
    )
    with pytest.raises(ModelError, match="puts Dense after its encoder"):
        pooled(SENTENCE_SIMILARITY, tmp_path, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("w1,,2", "item 1 of data .* has None in column 'sentence2'; a text is needed"),
        ("w1,w2,much", "item 1 of data .* has 'much' in column 'score'; a score of 0 or more is needed"),
        ("w1,w2,-1", "item 1 of data .* has -1 in column 'score'; a score of 0 or more is needed"),
    ],
)
def test_bad_pairs_are_refused(tmp_path, row, message):
    (tmp_path / "p.csv").write_text(f"sentence1,sentence2,score\nw1,w2,1\n{row}\n")
    with pytest.raises(DataError, match=message):
        load_task(encoder(tmp_path / "m"), tmp_path / "p.csv", progress=False)


def test_other_columns_are_refused(tmp_path):
    model = encoder(tmp_path / "m")
    with pytest.raises(
        DataError, match="have columns a, b, score; sentence similarity expects two texts and a number"
    ):
        load_task(model, pairs(tmp_path / "p.csv", header=("a", "b", "score")), progress=False)
    assert (
        load_task(
            model,
            pairs(tmp_path / "q.csv", header=("Word 1", "Word 2", "Human (mean)"), top=10),
            progress=False,
        ).evaluation.labels.max()
        <= 1
    )


@pytest.mark.gpu
def test_a_gpu_finds_the_same_alike(alike):
    import copy

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        there = score(alike.kind, copy.deepcopy(alike.model).cuda(), alike.evaluation)
    assert torch.allclose(
        score(alike.kind, alike.model, alike.evaluation).details["cosine"], there.details["cosine"], atol=1e-4
    )


# --- rank correlation


def test_spearman_is_that_of_scipy():
    generator = np.random.default_rng(0)
    for ties in (3, 1000):
        values, others = generator.integers(0, ties, (2, 5, 40)).astype(float)
        correlations = spearman(torch.tensor(values), torch.tensor(others))
        expected = [
            stats.spearmanr(left, right).statistic for left, right in zip(values, others, strict=True)
        ]
        assert correlations.tolist() == pytest.approx(expected)
        assert average_ranks(torch.tensor(values)).numpy() + 0.5 == pytest.approx(
            stats.rankdata(values, axis=1)
        )
    assert spearman(torch.ones(1, 9), torch.arange(9.0)[None]).item() == 0  # all alike: no order


def test_interval_of_a_rank_correlation_covers_the_truth():
    """Samples of 60 pairs with a known correlation, and the paired change of another model that is as good.

    120 samples are enough to find out intervals of half the width.
    """
    generator, truth, reaches = np.random.default_rng(1), 6 / np.pi * np.arcsin(0.7 / 2), ([], [])
    for _ in range(120):
        human, noise, more = generator.normal(size=(3, 60))
        dense = 0.7 * human + np.sqrt(1 - 0.49) * noise
        second = 0.7 * human + np.sqrt(1 - 0.49) * (0.9 * noise + np.sqrt(1 - 0.81) * more)  # not the same
        measured = quality("rank correlation", scores(dense, human), scores(second, human))[0]
        for kept, estimate, wanted in zip(
            reaches, (measured.dense, measured.change), (truth, 0.0), strict=True
        ):
            kept.append(statistical.reach(wanted, estimate.value, estimate.low, estimate.high))
        assert (
            measured.change.high - measured.change.low < measured.dense.high - measured.dense.low
        )  # pairing helps
    for kept, about in zip(reaches, ("value", "change"), strict=True):
        statistical.assert_covers(kept, 0.95, about=about)


def test_change_and_drop_of_a_rank_correlation():
    human = np.arange(40.0)
    good, bad = scores(human / 40, human / 40), scores(-human / 40, human / 40)
    main, error = quality("rank correlation", good, bad)
    assert (main.dense.value, main.compressed.value) == (pytest.approx(1), pytest.approx(-1))
    assert main.change.value == pytest.approx(-2)
    assert main.drop.value == pytest.approx(2)
    assert (error.metric, error.dense.value) == ("squared error", 0)
    broken = quality("rank correlation", good, scores(np.full(40, -np.inf), human / 40))[0]
    assert broken.compressed.value == 0


def test_flips_are_reversed_orders():
    generator = np.random.default_rng(0)
    before, after = generator.normal(size=(2, 30))
    flipped = flips(scores(before, before), scores(after, before), by="cosine")
    reversed_pairs = np.mean(
        [(before[i] - before[j]) * (after[i] - after[j]) < 0 for i in range(30) for j in range(30) if i != j]
    )
    assert flipped.value == pytest.approx(reversed_pairs)
    assert flipped.value == pytest.approx((1 - stats.kendalltau(before, after).statistic) / 2)
    assert flipped.low < flipped.value < flipped.high
    assert flips(scores(before, before), scores(2 * before, before), by="cosine").value == 0


def test_bootstrap_is_that_of_a_loop():
    values = torch.tensor(np.random.default_rng(0).normal(size=25))
    intervals = paired(
        lambda index: values[index].mean(1),
        lambda index: (values[index] + 1).mean(1),
        25,
        0.9,
        (-np.inf, np.inf),
    )
    generator = torch.Generator().manual_seed(0)
    drawn = [float(values[row].mean()) for row in torch.randint(25, (2000, 25), generator=generator)]
    assert (intervals[0].low, intervals[0].high) == (
        pytest.approx(np.quantile(drawn, 0.05)),
        pytest.approx(np.quantile(drawn, 0.95)),
    )
    assert intervals[2].value == pytest.approx(1)
    assert intervals[2].high - intervals[2].low < 1e-9


# --- methods


@pytest.mark.parametrize(
    "step",
    [
        wb.Prune(sparsity=0.5, criterion="wanda"),
        wb.Prune(sparsity=0.5, criterion="fisher"),
        wb.Quantize(weight_bits=4),
        wb.LowRank(rank_ratio=0.3),
    ],
    ids=str,
)
def test_methods_work_on_an_encoder(alike, step):
    compressed = wb.compress(alike, wb.Recipe(step))
    assert sum(bool(row.relative_error) for row in compressed.report) >= 8
    assert "do not depend on it" in next(
        row.outcome for row in compressed.report if row.name == "pooler.dense"
    )
    assert not torch.allclose(
        alike.kind.logits(compressed.model, alike.evaluation),
        alike.kind.logits(alike.model, alike.evaluation),
        atol=1e-3,
    )


def test_distillation_pulls_vectors_back(alike):
    prune = wb.Prune(sparsity=0.6)
    with torch.no_grad():
        teacher = alike.kind.logits(alike.model, alike.training)
        models = [
            wb.compress(alike, wb.Recipe(prune, *more)).model
            for more in (
                (),
                (wb.Distill(temperature=2.0, steps=30, learning_rate=3e-3, alpha=1.0, look_every=0),),
            )
        ]
        before, after = (
            float(
                alike.kind.soft_loss(
                    alike.kind.logits(model, alike.training), teacher, alike.training.labels, 2.0
                )
            )
            for model in models
        )
    assert after < 0.5 * before


def test_a_point_of_an_encoder(alike, tmp_path):
    bench = wb.Bench(alike, device="cpu", ledger=tmp_path / "p.journal", progress=False)
    recipe = wb.Recipe(wb.Prune(sparsity=0.7))
    *_, point = bench.stream(recipe)
    assert [q.metric for q in point.quality] == ["rank correlation", "squared error"]
    assert list(point.missing) == [WHAT]  # there is no KL divergence, and the point says so
    assert point.latency.real_time_factors is None
    assert 0 < point.flips.value < 1
    guess = bench.predictor().predict(recipe)
    assert guess.metric == "rank correlation"
    assert guess.quality.value == pytest.approx(point.primary.compressed.value, abs=0.02)
    assert guess.file_bytes >= point.sizes.file_bytes
    assert type(point).from_json(point.to_json()) == point
    texts = bench.behaviour(recipe)
    assert texts[0].prompt.count("/") == 1
    assert "people" in texts[0].prompt
    assert float(texts[0].dense) != float(texts[0].compressed)
    assert next(iter(bench.sensitivity(recipe, items=8))).loss is None
    loaded = wb.load(bench.export(recipe, tmp_path / "out"))
    assert torch.equal(
        alike.kind.logits(loaded, alike.evaluation),
        alike.kind.logits(bench.compress(recipe).model, alike.evaluation),
    )
    assert bench.ledger.frame()["rank_correlation"].iloc[0] == point.primary.compressed.value


@pytest.mark.slow
def test_minilm_for_real():
    """Spearman 0.729 on all 353 pairs of WordSim-353, as measured apart from this code."""
    task = load_task("all-MiniLM-L6-v2", "wordsim353", progress=False)
    batches = [
        score(task.kind, task.model, some).details
        for some in (task.evaluation, task.calibration, task.training)
    ]
    cosine, human = (torch.cat([details[name] for details in batches]) for name in ("cosine", "score"))
    assert len(cosine) == 353
    assert stats.spearmanr(cosine, human).statistic == pytest.approx(0.729, abs=0.002)
