"""A layer that cannot take a step is skipped with its own reason; the others are done as if it were not
there."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_tasks import CLASSES, KINDS, VOCABULARY, spread, tiny_task
from torch import nn

import workbench as wb
from workbench.bench import Bench
from workbench.calibration import passes
from workbench.compress import compress
from workbench.compress.core import batch as batches
from workbench.compress.pruning import prune
from workbench.errors import Cancelled, CompressionError, LayerSkipped, RecipeError
from workbench.recipe import Recipe

FAMILIES = {
    "wanda": wb.Prune(sparsity=0.5, criterion="wanda"),
    "sparsegpt": wb.Prune(sparsity=0.5, criterion="sparsegpt"),
    "by sensitivity": wb.Prune(sparsity=0.5, allocation="sensitivity"),
    "fisher": wb.Prune(sparsity=0.5, criterion="fisher"),
    "2:4": wb.Prune(sparsity=0.5, pattern="2:4", criterion="wanda"),
    "svd": wb.LowRank(rank_ratio=0.4, factorization="svd"),
    "whitened": wb.LowRank(rank_ratio=0.4),
    "by loss": wb.LowRank(rank_ratio=0.4, rank_allocation="loss"),
    "spatial": wb.LowRank(rank_ratio=0.3, conv="spatial"),
    "gptq": wb.Quantize(weight_bits=4, rounding="gptq"),
    "awq": wb.Quantize(weight_bits=4, rounding="awq"),
    "mixed": wb.Quantize(weight_bits=4.5),
    "static": wb.Activations(activation_scaling="static", activation_granularity="tensor", smoothing=0.5),
}


class Odd(nn.Module):
    """A classifier with layers that one method or another cannot take, and some that every one can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding="same")
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.strided = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.back = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.along = nn.Conv1d(8, 8, 3, padding=1)
        self.deep = nn.Conv3d(1, 1, 3, padding=1)
        self.table = nn.Embedding(8, 256)
        self.read = nn.Linear(256, 256)
        self.never = nn.Linear(32, 32)
        self.wide = nn.Linear(256, 64)
        self.head = nn.Linear(64, CLASSES)
        self.config = None

    def forward(self, pixel_values, **_):
        x = self.grouped(self.depthwise(self.first(pixel_values)).relu())
        x = nn.functional.pad(x, [self.strided.groups - 1] * 4)
        x = self.back(self.strided(x).relu())
        x = self.along(x.flatten(2)).mean(1)
        x = self.deep(x.view(-1, 1, 1, 16, 16)).flatten(1)
        x = x + self.table((x.mean(1).abs() * 5).long() % 8)
        x = x @ self.read.weight.t() + self.read.bias  # its weight is used, and it is never called
        return type("Out", (), {"logits": self.head(self.wide(x).relu())})()


def odd_task():
    return tiny_task("resnet", model=spread(Odd()))


@pytest.mark.parametrize("name", FAMILIES)
def test_odd_layers_are_skipped_with_their_own_reasons_and_the_rest_is_done(name, tmp_path):
    bench = Bench(odd_task(), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    step = FAMILIES[name]
    point = bench.measure(Recipe(step))
    rows = {row.name: row for row in point.layers}
    assert math.isfinite(point.primary.compressed.value)
    kind = step.kind()
    for odd in ("depthwise", "grouped", "back", "along", "deep"):
        assert rows[odd].outcome.startswith(f"{kind} skipped: "), rows[odd]
    assert "in 8 groups" in rows["depthwise"].outcome
    assert "ConvTranspose2d is not a" in rows["back"].outcome
    for done in ("wide", *(["strided"] if kind != "lowrank" else [])):
        assert "skipped" not in rows[done].outcome, rows[done]
        assert rows[done].relative_error > 0 or kind == "activations"
    reads = name in {
        "wanda",
        "sparsegpt",
        "by sensitivity",
        "2:4",
        "whitened",
        "by loss",
        "gptq",
        "awq",
        "mixed",
    }
    if reads:
        assert "receives no input during calibration" in rows["read"].outcome
        assert "receives no input during calibration" in rows["never"].outcome
    if kind == "lowrank":
        assert rows["strided"].outcome == (
            "lowrank skipped: the model uses groups of it, which two layers in its place do not have"
        )
    if kind == "activations":
        assert "never calls it" in rows["read"].outcome
    left = {part.name for part in point.coverage.untouched}
    assert {"depthwise", "grouped", "back", "along", "deep"} <= left
    skipped = [row for row in point.layers if "skipped" in row.outcome]
    assert point.coverage.touched == point.coverage.weights - sum(p.weights for p in point.coverage.untouched)
    assert skipped


@pytest.mark.parametrize("name", ["wanda", "whitened", "gptq", "svd"])
def test_layers_that_can_come_out_as_if_the_odd_one_had_been_left_out_by_hand(name):
    step = FAMILIES[name]
    compressed = compress(odd_task(), Recipe(step))
    skipped = [row.name for row in compressed.report if row.outcome.startswith(f"{step.kind()} skipped")]
    by_hand = [f"!{n}" for n in skipped if n in {"read", "never", "strided"}]
    without_it = compress(odd_task(), Recipe(dataclasses.replace(step, targets=("*", *by_hand))))
    mine, theirs = compressed.model.state_dict(), without_it.model.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4
        )
    )


def jamba():
    from transformers import JambaConfig, JambaForCausalLM

    return JambaForCausalLM(
        JambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=1,
            num_experts_per_tok=1,
            mamba_d_state=4,
            mamba_d_conv=2,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        )
    )


def mobilenet():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(
        MobileNetV2Config(num_channels=1, image_size=16, depth_multiplier=0.25, num_labels=CLASSES)
    )


def efficientnet():
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    return EfficientNetForImageClassification(
        EfficientNetConfig(
            num_channels=1,
            image_size=16,
            width_coefficient=0.25,
            depth_coefficient=0.3,
            hidden_dim=320,
            kernel_sizes=[3] * 7,
            strides=[1, 2, 1, 1, 1, 1, 1],
            num_labels=CLASSES,
        )
    )


BUILDERS = {"mamba": mamba, "jamba": jamba, "mobilenet": mobilenet, "efficientnet": efficientnet}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("family", ["wanda", "svd", "whitened", "gptq", "static"])
def test_real_architectures_with_an_odd_layer_are_compressed_without_it(name, family):
    torch.manual_seed(0)
    sort = "llama" if name in {"mamba", "jamba"} else "resnet"
    task = tiny_task(sort, model=spread(BUILDERS[name]()))
    compressed = compress(task, Recipe(FAMILIES[family]))
    with torch.no_grad():
        answers = KINDS[sort].logits(compressed.model, task.evaluation[:4])
    assert torch.isfinite(answers).all()
    assert 0 < compressed.coverage.share < 1
    odd = {row.name: row.outcome for row in compressed.report if "skipped" in row.outcome}
    if name in {"mamba", "jamba"} and family != "svd":
        unread = [outcome for layer, outcome in odd.items() if layer.endswith("dt_proj")]
        assert unread
        assert all("receives no input" in outcome or "never calls it" in outcome for outcome in unread)
    if name == "mobilenet" and family in {"svd", "whitened"}:
        padded = compressed.model.mobilenet_v2.layer[3].expand_1x1.convolution
        dense = task.model.mobilenet_v2.layer[3].expand_1x1.convolution
        for read in ("kernel_size", "stride", "dilation", "in_channels", "out_channels"):
            assert getattr(padded, read) == getattr(dense, read)


# --- what nobody foresaw


def test_an_exception_that_nobody_foresaw_is_told_with_the_layer_and_sinks_nothing(monkeypatch):
    real = prune.prune_batch

    def failing(step, batch, **given):
        if any(layer.name.endswith("layers.1.mlp.fc2") for layer in batch.layers):
            raise KeyError("no such thing")
        return real(step, batch, **given)

    monkeypatch.setattr(prune, "prune_batch", failing)
    task = tiny_task("vit")
    step = wb.Prune(sparsity=0.5)
    compressed = compress(task, Recipe(step, wb.Quantize(weight_bits=4)))
    rows = {row.name: row for row in compressed.report}
    name = "vit.layers.1.mlp.fc2"
    assert rows[name].outcome.startswith("prune skipped: KeyError: 'no such thing'; W4")
    assert all(row.sparsity >= 0.5 for row in compressed.report if row.bits and row.name != name)
    monkeypatch.setattr(prune, "prune_batch", real)
    by_hand = compress(
        task, Recipe(dataclasses.replace(step, targets=("*", f"!{name}")), wb.Quantize(weight_bits=4))
    )
    mine, theirs = compressed.model.state_dict(), by_hand.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_where_it_fails_for_every_layer_the_recipe_is_refused_with_the_words(monkeypatch):
    def failing(*_given, **_named):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(prune, "prune_batch", failing)
    with pytest.raises(CompressionError, match="fits no layer of tiny-vit.*ZeroDivisionError: by nothing"):
        compress(tiny_task("vit"), Recipe(wb.Prune(sparsity=0.5)))


@pytest.mark.parametrize(
    "error", [RecipeError("bad"), Cancelled("stop"), CompressionError("no"), MemoryError("full")]
)
def test_what_is_meant_for_the_whole_recipe_is_not_taken_for_a_layers(monkeypatch, error):
    def failing(*_given, **_named):
        raise error

    monkeypatch.setattr(prune, "prune_batch", failing)
    with pytest.raises(type(error), match=str(error)):
        compress(tiny_task("vit"), Recipe(wb.Prune(sparsity=0.5)))


def test_a_layer_that_a_method_will_not_leave_out_is_an_error_not_a_loop(monkeypatch):
    def stubborn(batch, act):
        raise LayerSkipped(batch.layers[0].name, "again")

    monkeypatch.setattr(prune, "attempt", stubborn)
    with pytest.raises(CompressionError, match="again"):
        compress(tiny_task("vit"), Recipe(wb.Prune(sparsity=0.5)))
    assert batches.attempt is not stubborn


def test_inputs_that_cannot_be_taken_as_rows_cost_that_layer_alone(monkeypatch):
    real = passes.patches

    def failing(module, given):
        if getattr(module, "out_features", 0) == 32:
            raise IndexError("odd inputs")
        return real(module, given)

    monkeypatch.setattr(passes, "patches", failing)
    rows = compress(tiny_task("vit"), Recipe(wb.Prune(sparsity=0.5, criterion="wanda"))).report
    wide = [row for row in rows if row.shape[0] == 32]
    assert wide
    assert {row.outcome for row in wide} == {"prune skipped: IndexError: odd inputs"}
    assert sum(row.sparsity == 0.5 for row in rows if row.sparsity) > 6


class Standardised(nn.Conv2d):
    """A convolution that multiplies by something else than its weight."""

    def forward(self, given):
        weight = self.weight / self.weight.std()
        return nn.functional.conv2d(given, weight, self.bias, self.stride, self.padding)


class Handed(nn.Module):
    """Hands a layer more than one input."""

    class Two(nn.Linear):
        def forward(self, given, _more=None):
            return super().forward(given)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.two = Standardised(1, 4, 3, padding=1), Handed.Two(1024, 64)
        self.plain, self.head = nn.Linear(64, 64), nn.Linear(64, CLASSES)
        self.config = None

    def forward(self, pixel_values, **_):
        x = self.two(self.conv(pixel_values).flatten(1), None)
        return type("Out", (), {"logits": self.head(self.plain(x).relu())})()


def test_a_class_of_its_own_that_only_multiplies_is_taken():
    class Written(nn.Linear):
        def forward(self, given):
            return given @ self.weight.T + self.bias

    task = tiny_task("vit")
    dense = task.model.vit.layers[0].mlp.fc1
    dense.__class__ = Written
    rows = {row.name: row.outcome for row in compress(task, Recipe(wb.LowRank(rank_ratio=0.3))).report}
    assert rows["vit.layers.0.mlp.fc1"].startswith("rank ")


def test_layers_that_do_more_than_a_product_are_not_taken_for_one():
    compressed = compress(tiny_task("resnet", model=spread(Handed())), Recipe(wb.LowRank(rank_ratio=0.3)))
    rows = {row.name: row.outcome for row in compressed.report}
    assert rows["conv"] == "lowrank skipped: a Standardised does more than one product"
    assert rows["two"].startswith("lowrank skipped: the model uses a call with more than one input of it")
    assert rows["plain"].startswith("rank 19 of 64")
