"""The registry of kinds of task, and every kind in it: loaded, measured, shown and exported by its facts."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from kind_examples import EXAMPLES
from transformers.models.auto import modeling_auto

import workbench as wb
from workbench.errors import DataError, ModelError
from workbench.measure.behaviour import Behaviour, Continuation
from workbench.measure.kl import WHAT
from workbench.metrics.metrics import METRICS
from workbench.report.kinds_table import kind_rows
from workbench.tasks import score
from workbench.tasks.base import Kind, View
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION, ImageClassification
from workbench.tasks.items import ItemCounts, Items
from workbench.tasks.language_modelling import LanguageModelling
from workbench.tasks.registry import KINDS, Kinds
from workbench.tasks.sources import NAMES
from workbench.tasks.text_classification import TextClassification
from workbench.zoo import local, models

# --- the registry


def test_no_kind_is_without_an_example():
    assert {kind.name for kind in KINDS} == set(EXAMPLES)


@pytest.fixture
def few():
    """A registry of two kinds."""
    kinds = Kinds()
    kinds.register(ImageClassification())
    kinds.register(LanguageModelling())
    return kinds


def test_kinds_are_found_by_name(few):
    assert [kind.name for kind in few] == ["image classification", "language modelling"]
    assert few["language modelling"] == LanguageModelling()
    with pytest.raises(ModelError, match="'image clasification'; nearest: image classification"):
        few["image clasification"]
    few.unregister("language modelling")
    assert len(few) == 1
    assert "language modelling" not in few


def test_a_name_is_taken_once(few):
    with pytest.raises(ModelError, match="'image classification' cannot be registered: the name is taken"):
        few.register(ImageClassification())


class Nothing(Kind):
    """A kind that states nothing."""

    name = "nothing"


@dataclass(frozen=True)
class Pictures(ImageClassification):
    """Another kind of the same models."""

    name = "pictures"


def test_a_kind_that_leaves_facts_out_is_refused(few):
    with pytest.raises(ModelError, match="'nothing' cannot be registered: it does not state") as caught:
        few.register(Nothing())
    message = str(caught.value)
    stated = {"name", "masked_texts", "chunked_head", "fused_blocks"}
    for fact in {*Kind.__annotations__} - stated:
        assert f" {fact}" in message
    for function in ("processor", "pools", "labels", "batch_size", "logits", "score", "loss", "soft_loss"):
        assert f" {function}" in message
    assert "masked_texts" not in message
    with pytest.raises(ModelError, match="'Kind' cannot be registered: it does not state name, auto_class"):
        few.register(Kind())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"primary": "acuracy"}, "its metric 'acuracy' is not registered; nearest: accuracy"),
        ({"behaviour": "films"}, "behaviour='films' is none of classes, continuations, told apart, or None"),
        ({"behaviour": "told apart"}, r"needs examples\(model, items\)"),
        ({"architectures": ()}, "no model would be of this kind"),
        ({"score": lambda *_: None}, "has a score of its own: state distribution=None"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(few, facts, message):
    compressed = type("Odd", (Pictures,), facts)
    with pytest.raises(ModelError, match=f"'pictures' cannot be registered: .*{message}"):
        few.register(compressed())


def test_kinds_of_the_same_classes_say_which_models_they_take(few):
    few.register(Pictures())
    config = {"architectures": ["ViTForImageClassification"]}
    with pytest.raises(ModelError, match="could be for image classification or pictures: each has to say"):
        few.of(config)
    few.unregister("pictures")

    class Several(Pictures):
        def why_not(self, config):
            return "" if "several" in str(config.get("problem_type")) else "it has one label"

    few.register(Several())
    assert few.of(config).name == "image classification"
    assert few.of({**config, "problem_type": "several"}).name == "pictures"
    with pytest.raises(ModelError, match="it runs .*; image classification: .*; pictures: it has one label"):
        few.of({**config, "problem_type": "regression"})


def test_the_longest_ending_of_a_class_decides(few):
    class Later(LanguageModelling):
        name = "the rest of a text"
        architectures = ("Model",)

    few.register(Later())
    assert few.of({"architectures": ["GPT2LMHeadModel"]}).name == "language modelling"
    assert few.of({"architectures": ["GPT2Model"]}).name == "the rest of a text"


# --- the facts of each kind


@pytest.fixture(params=list(KINDS), ids=lambda kind: kind.name)
def kind(request):
    return request.param


def test_facts_name_what_there_is(kind):
    import transformers

    assert hasattr(transformers, kind.auto_class)
    assert kind.type_mapping is None or getattr(modeling_auto, kind.type_mapping)
    assert kind.primary in METRICS
    assert {*kind.data_names, *kind.default_data} <= {*NAMES}
    assert min(kind.latency_items, kind.sensitivity_items) > 0
    assert isinstance(kind.sizes, ItemCounts)


def test_the_catalogue_names_registered_kinds():
    assert {entry.task for entry in models()} <= {kind.name for kind in KINDS}


def test_a_kind_is_listed_with_what_it_lacks(kind):
    row = {row["kind"]: row for row in kind_rows()}[kind.name]
    assert row["quality"] == kind.primary
    assert (row["KL divergence of"] == "none") is (kind.distribution is None)
    assert (row["data"] == "to be named") is (not kind.default_data and not kind.data_names)


# --- each kind at work


@pytest.fixture(scope="module", params=list(EXAMPLES))
def case(request, tmp_path_factory):
    """A bench of a tiny model of each kind, and its point of a recipe."""
    import datasets

    folder = tmp_path_factory.mktemp("kind")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        model, data = EXAMPLES[request.param](folder)
        bench = wb.Bench(
            str(model),
            str(data),
            device="cpu",
            ledger=folder / "p.journal",
            context_length=16,
            progress=False,
        )
    recipe = wb.Recipe(wb.Prune(sparsity=0.6), wb.Quantize(weight_bits=4))
    return SimpleNamespace(
        kind=KINDS[request.param], bench=bench, model=model, recipe=recipe, point=bench.measure(recipe)
    )


def test_it_is_told_by_its_architecture(case):
    assert KINDS.of(local.read_config(case.model)) == case.kind
    assert type(case.bench.task.kind) is type(case.kind)
    assert case.bench.task.labels == case.kind.labels(local.read_config(case.model))
    assert case.bench.task.batch_size == case.kind.batch_size(case.bench.task.evaluation, on_cpu=True)


def test_its_outputs_are_trained_and_scored(case):
    task, items = case.bench.task, case.bench.task.training[:3]
    with torch.no_grad():
        logits = task.kind.logits(task.model, items)
    assert len(logits) == len(items)
    loss = task.kind.loss(logits, items.labels)
    assert loss.ndim == 0
    assert torch.isfinite(loss)
    assert float(task.kind.soft_loss(logits, logits, items.labels, 2.0)) == pytest.approx(0, abs=1e-6)
    averaged = task.kind.together(torch.stack([logits.float()] * 2), 2.0)
    assert float(task.kind.soft_loss(averaged, logits, items.labels, 2.0)) == pytest.approx(0, abs=1e-5)
    scores = score(task.kind, task.model, items)
    assert len(scores) == 3
    if task.kind.flips_by != "answers":
        assert task.kind.flips_by in scores.details


def test_its_point_has_what_its_facts_say(case):
    kind, point = case.kind, case.point
    names = [kind.primary, *([beside] if (beside := METRICS[kind.primary].beside) else [])]
    assert [quality.metric for quality in point.quality] == names
    assert (point.kl is None) is (kind.distribution is None) is (WHAT in point.missing)
    assert point.flips is not None
    assert (point.cache is not None) is kind.kv_cache
    sound = case.bench.task.kind.audio_seconds(case.bench.task.evaluation[:1])
    assert (point.latency.real_time_factors is None) is (sound is None)
    assert len(case.bench.setting.latency_items) == min(kind.latency_items, len(case.bench.task.evaluation))


def test_what_changed_is_shown_as_it_says(case):
    assert case.kind.behaviour in get_args(View)
    changes = case.bench.behaviour(case.recipe)
    if case.kind.behaviour == "classes":
        assert isinstance(changes, Behaviour)
        assert [change.name for change in changes.classes] == list(case.bench.task.labels)
    else:
        assert all(isinstance(row, Continuation) for row in changes)
        assert changes


def test_its_export_takes_its_files_along(case, tmp_path):
    folder = case.bench.export(case.recipe, tmp_path / "out")
    for name in case.kind.files:
        assert (folder / name).is_file() is (case.model / name).is_file()
    expected = case.bench.compress(case.recipe).model.state_dict()
    loaded = wb.load(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_it_is_predicted_in_its_metric(case):
    guess = case.bench.predictor().predict(case.recipe)
    assert guess.metric == case.kind.primary
    assert guess.quality.low <= guess.quality.value <= guess.quality.high


def test_kinds_without_words_say_so():
    with pytest.raises(DataError, match="image classification has no answers in words"):
        IMAGE_CLASSIFICATION.examples(None, Items({}, torch.zeros(0)))


def test_large_pictures_and_small_ones_are_run_by_different_numbers():
    small, large = (Items({"pixel_values": torch.zeros(1, 3, n, n)}, torch.zeros(1)) for n in (64, 224))
    assert [IMAGE_CLASSIFICATION.batch_size(items, on_cpu=True) for items in (small, large)] == [128, 16]
    assert [IMAGE_CLASSIFICATION.batch_size(items, on_cpu=False) for items in (small, large)] == [512, 64]
    assert TextClassification().batch_size(small, on_cpu=True) == 128
