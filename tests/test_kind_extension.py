"""Kinds of task from outside: one module each, and `--plugin` measures, reports, predicts and exports their
models."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from contributing import write_example
from PIL import Image
from test_cli import run
from tiny_models import tokenizer_files
from tiny_tasks import spread

import workbench as wb
from widgets.panes.behaviour_view import answers_html
from widgets.session.report_run import plugins_of
from workbench.errors import CompressionError, DataError, ExportError
from workbench.ledger.ledger import Ledger
from workbench.measure.summary import summary
from workbench.metrics.metrics import METRICS
from workbench.report.report import job_from
from workbench.tasks import score
from workbench.tasks.registry import KINDS

REGRESSION = '''
"""Image regression: a picture in, one number out, such as an age."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from workbench import KINDS, METRICS, Kind, Metric
from workbench.metrics.metrics import other_losses
from workbench.metrics.scores import Scores
from workbench.tasks import columns
from workbench.tasks.image_classification import image_items, plain_processor
from workbench.tasks.items import Items, Pool, ItemCounts, split_pools

METRICS.register(Metric("mean absolute error", other_losses, higher=False, unit="years"))


@dataclass(frozen=True)
class ImageRegression(Kind):
    """One number an image; quality is the mean absolute error."""

    name = "image regression"
    auto_class = "AutoModelForImageClassification"
    architectures = ("ForImageClassification",)
    type_mapping = None
    primary = "mean absolute error"
    flips_by = None
    distribution = None
    outputs = "numbers"
    sizes = ItemCounts(500, 128, 1000)
    latency_items = 16
    sensitivity_items = 64
    data_names = ()
    default_data = ()
    files = ("preprocessor_config.json",)
    kv_cache = False
    behaviour = None

    def why_not(self, config):
        return "" if config.get("problem_type") == "regression" else "its problem_type is not 'regression'"

    def processor(self, directory, config):
        return plain_processor(config)

    def labels(self, config):
        return ()

    def batch_size(self, evaluation, *, on_cpu):
        return 64

    def pools(self, reading, raw, sizes):
        def pool(split):
            rows = columns.undecoded(raw.splits[split], "image")

            def take(index):
                some = rows.select(list(index))
                pictures = image_items(list(some["image"]), [0] * len(some), reading.processor, 3)
                return Items(pictures.inputs, torch.tensor(some["age"], dtype=torch.float32))

            return Pool(len(rows), take)

        return *split_pools(raw, pool), ()

    def logits(self, model, items):
        return model(pixel_values=items.inputs["pixel_values"].to(model.dtype)).logits.float().squeeze(-1)

    def score(self, model, items):
        error = (self.logits(model, items) - items.labels).abs().double().cpu()
        none = torch.zeros_like(error)
        return Scores(torch.where(torch.isfinite(error), error, torch.inf), none, none + 1, none.long())

    def loss(self, logits, labels):
        return F.l1_loss(logits, labels.float())

    def soft_loss(self, student, teacher, labels, temperature):
        return F.mse_loss(student, teacher)

    def together(self, answers, temperature):
        return answers.mean(0)


KINDS.register(ImageRegression())
'''


def tagger(folder: Path) -> Path:
    """Save a tiny model that tags words, with a tokenizer."""
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    names = dict(enumerate(("noun", "verb", "other")))
    model = BertForTokenClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )
    )
    spread(model).save_pretrained(folder)
    tokenizer_files(folder)
    return folder


def tagged(path: Path, count: int = 80) -> Path:
    """Write sentences of 3 to 9 words with a tag each, in an order of their own."""
    draw = np.random.default_rng(0)
    lines = []
    for _ in range(count):
        numbers = draw.integers(0, 61, draw.integers(3, 10))
        lines.append(
            {
                "tokens": [f"w{i}" for i in numbers],
                "tags": [("noun", "verb", "other")[i % 3] for i in numbers],
            }
        )
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def guesser(folder: Path) -> Path:
    """Save a tiny model that gives a picture a number."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=3,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=1,
            problem_type="regression",
        )
    )
    spread(model).save_pretrained(folder)
    return folder


def aged(folder: Path, count: int = 60) -> Path:
    """Write pictures, each with a number in metadata.jsonl, which `datasets` reads with them."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    lines = []
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "age": float(draw.normal(40, 10))})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@dataclass(frozen=True)
class Case:
    """A kind of task in a plugin, with a model and data for it."""

    kind: str
    plugin: str
    model: Path
    data: Path
    folder: Path

    @property
    def tags(self) -> bool:
        return self.kind == "token tagging"

    @property
    def ledger(self) -> Path:
        return self.folder / "points.journal"

    def arguments(self) -> list[str]:
        """Return a job for the command line."""
        job = [str(self.model), "--data", str(self.data), "--ledger", str(self.ledger)]
        return [*job, "--device", "cpu", "--evaluation-items", "24", "--weight-bits", "4"]

    def bench(self) -> wb.Bench:
        """Return a bench of the model, once the plugin is there."""
        importlib.import_module(self.plugin)
        return wb.Bench(
            str(self.model),
            str(self.data),
            device="cpu",
            ledger=self.ledger,
            evaluation_items=24,
            progress=False,
        )


@pytest.fixture(params=["token tagging", "image regression"])
def case(request, tmp_path, monkeypatch):
    """Put a plugin where Python finds it; forget it afterwards."""
    kind, folder = request.param, tmp_path / "elsewhere"
    name = f"{kind.replace(' ', '_')}_plugin"
    if kind == "token tagging":
        write_example("A new kind of task", folder, name)
        model, data = tagger(tmp_path / "model"), tagged(tmp_path / "words.jsonl")
    else:
        folder.mkdir()
        (folder / f"{name}.py").write_text(REGRESSION)
        model, data = guesser(tmp_path / "model"), aged(tmp_path / "faces")
    monkeypatch.syspath_prepend(str(folder))
    kinds, metrics = tuple(KINDS), tuple(METRICS)
    yield Case(kind, name, model, data, tmp_path)
    sys.modules.pop(name, None)
    KINDS.unregister(kind)
    METRICS.unregister("mean absolute error")
    assert (tuple(KINDS), tuple(METRICS)) == (kinds, metrics)


RECIPE = wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4, rounding="gptq"))


def test_it_is_measured(case):
    bench = case.bench()
    assert bench.task.kind.name == case.kind
    dense, point = bench.measure(wb.Recipe()), bench.measure(RECIPE)
    if case.tags:
        assert [quality.metric for quality in point.quality] == ["accuracy", "loss"]
        assert point.kl.value > 0
        assert dense.kl.value == 0
        assert point.kl_answers > point.kl_items == 24  # several words in each item
        assert f"answers in {point.kl_items} items" in shown(point)["KL to dense"]
        assert point.flips.value > 0
        assert point.missing == {}
    else:
        assert [quality.metric for quality in point.quality] == ["mean absolute error"]
        assert (point.kl, point.flips) == (None, None)
        assert point.missing == {
            "KL to the dense model": "image regression gives no answer a distribution of probabilities",
            "changed answers": "answers of image regression cannot be told apart",
        }
        assert "cannot be told apart" in shown(point)["not measured: changed answers"]
        errors = score(bench.task.kind, bench.task.model, bench.task.evaluation).loss
        assert dense.primary.compressed.value == pytest.approx(errors.mean().item())
    assert dense.primary.change.value == 0 != point.primary.change.value
    assert point.latency is not None
    assert Ledger(case.ledger).rows() == [dense, point]


def shown(point) -> dict[str, str]:
    """Return the compressed model's values in the table of a point, by row."""
    return {name: text for name, _, text in summary(point)}


def test_looks_distillation_and_sensitivity(case):
    bench = case.bench()
    recipe = wb.Recipe(wb.Prune(sparsity=0.6), wb.Distill(temperature=2, steps=4, distill_batch=8))
    *looks, point = bench.stream(recipe)
    assert [look.items for look in looks] == [16, 24]
    assert point.curve
    costs = list(bench.sensitivity(wb.Recipe(wb.Quantize(weight_bits=3))))
    assert costs
    assert {cost.metric for cost in costs} == {point.primary.metric}
    with pytest.raises(DataError, match=f"does {case.kind}, which does not say how"):
        bench.behaviour(recipe)
    with pytest.raises(CompressionError, match=f"does {case.kind}; only language models keep keys"):
        bench.compress(wb.Recipe(wb.KVCache(kv_bits=4)))
    if not case.tags:
        with pytest.raises(CompressionError, match="a model of image regression answers with numbers"):
            bench.compress(wb.Recipe(wb.Prune(sparsity=0.5), wb.Distill(temperature=2, divergence="reverse")))


def test_it_is_predicted(case):
    bench = case.bench()
    predictor = bench.predictor()
    dense = bench.measure(wb.Recipe())
    before = predictor.predict(RECIPE)
    assert before.file_bytes == bench.measure(RECIPE).sizes.file_bytes
    assert before.metric == dense.primary.metric
    if not case.tags:  # nobody knows what a destroyed model does: the whole range
        assert before.wide
        assert (before.quality.low, before.quality.high) == (0, float("inf"))


def test_it_is_exported_and_loaded(case):
    bench = case.bench()
    folder = bench.export(RECIPE, case.folder / "out")
    manifest = json.loads((folder / "compression.json").read_text())
    assert manifest["task"] == case.kind
    expected = bench.compress(RECIPE).model.state_dict()
    loaded = wb.load(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert (folder / "tokenizer.json").is_file() is (case.tags)
    if case.tags:
        KINDS.unregister(case.kind)
        with pytest.raises(ExportError, match=r"AutoModelForTokenClassification.*load the plugin"):
            wb.load(folder)


def test_the_panel_says_what_it_cannot_show_and_its_reports_take_the_plugin_along(case):
    bench = case.bench()
    assert answers_html(bench, RECIPE) == (
        f"<p>What changed is not shown: {case.kind} does not say how it could be.</p>"
    )
    assert plugins_of(RECIPE) == [case.plugin]


def test_from_the_command_line(case, capsys):
    code, out, err = run(
        capsys, "--plugin", case.plugin, "measure", *case.arguments(), "--export", str(case.folder / "out"),
    )  # fmt: skip
    assert code == 0, err
    point = Ledger(case.ledger).rows()[0]
    assert point.primary.metric in out
    assert (case.folder / "out" / "model.safetensors").is_file()


def test_a_report_runs_it_in_a_process_of_its_own(case):
    script = Path(sys.executable).with_name("workbench")
    done = subprocess.run(
        [
            script, "--plugin", case.plugin, "report", *case.arguments(), "--slider-minutes", "0.01",
            "--output", str(case.folder / "reports"), "--quiet",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PYTHONPATH": f"{case.folder / 'elsewhere'}:{Path(wb.__file__).parents[1]}",
            "PATH": str(script.parent),
            "HOME": str(case.folder),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mean absolute error" in (page := next((case.folder / "reports").glob("*.html")).read_text()) or (
        case.tags and "accuracy" in page
    )


def test_points_of_a_metric_wait_in_the_ledger_until_it_is_known_again(case):
    bench = case.bench()
    point = bench.measure(RECIPE)
    records = dict(METRICS.records)
    METRICS.unregister(point.primary.metric)
    without = Ledger(case.ledger)
    METRICS.records = records
    assert (len(without), without.unreadable) == (0, 1)
    assert Ledger(case.ledger).rows() == [point]


def test_without_the_plugin_its_models_are_refused(case):
    messages = {
        "token tagging": "BertForTokenClassification is for a task that the workbench does not run",
        "image regression": "problem_type is 'regression'",
    }
    with pytest.raises(wb.errors.ModelError, match=messages[case.kind]):
        job_from({"model": str(case.model), "data": str(case.data)}).bench()
