"""Which runtime runs what: reasons before, checks and fallbacks while, the same way for both models.

The roofline; the command.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from click.testing import CliRunner
from tiny_tasks import tiny_task
from torch import nn

import workbench as wb
from workbench.cli import workbench as command
from workbench.compress import compress
from workbench.compress.quantization.activations import Activations
from workbench.errors import RuntimeRefused
from workbench.ledger.ledger import Ledger
from workbench.modules.input_quantizer import InputFormat
from workbench.recipe import Recipe
from workbench.runtime import execution
from workbench.runtime import plan as module
from workbench.runtime.engine_list import layer_engines, model_engines
from workbench.runtime.execution import WORDS, CapturedModel, Compiled, chosen, repeated, runner, why_not
from workbench.runtime.int8 import wide_bytes
from workbench.runtime.int8_torch import Int8Linear
from workbench.runtime.onnx_engine import OnnxSession
from workbench.runtime.plan import plan, realise, reasons_for
from workbench.runtime.probes import probe
from workbench.runtime.roofline import Limits, Product, Roof, limits_of, roof
from workbench.runtime.runtime_table import runtime_rows

W8A8 = Recipe(Activations(), wb.Quantize(weight_bits=8))
vnni = pytest.mark.skipif(not wide_bytes(), reason="this CPU has no VNNI")


def bench_of(folder, sort: str = "vit", **settings) -> wb.Bench:
    return wb.Bench(tiny_task(sort), ledger=Ledger(folder / "points.journal"), progress=False, **settings)


@dataclasses.dataclass(frozen=True)
class Broken:
    """An engine that takes everything and then fails in one of three ways."""

    way: str
    name: str = "broken"
    takes: str = "everything"
    uses: tuple[str, ...] = ("weights",)

    def here(self, device):
        return ""

    def serves(self, layer, device):
        return "" if isinstance(layer.module, nn.Linear) else "only Linear"

    def build(self, layer):
        if self.way == "build":
            raise RuntimeError("no such instruction")
        dense = layer.module

        class Wrong(nn.Module):
            weight = dense.weight

            def forward(self, given, way=self.way):
                if way == "run":
                    raise RuntimeError("illegal memory access")
                return dense(given) * (float("nan") if way == "nan" else -3)

        return Wrong()


@vnni
def test_a_kernel_takes_the_layers_it_serves_and_the_plan_says_so_beforehand():
    task = tiny_task("vit")
    compressed = compress(task, W8A8)
    planned = plan(compressed, "cpu")
    assert planned.kernels == (f"{len(planned.engines)} layers by torch int8",)
    assert len(planned.no_kernel) == 1  # the patch embedding is a convolution
    assert "no convolution of integers" in planned.no_kernel[0]
    run = realise(compressed, "cpu", dense=task.model, kind=task.kind, items=task.evaluation[:4])
    assert sum(isinstance(part, Int8Linear) for part in run.model.modules()) == len(planned.engines) > 5
    assert run.dense is task.model
    assert not run.warnings
    assert not any(isinstance(part, Int8Linear) for part in compressed.model.modules())
    with torch.inference_mode():
        apart = task.kind.logits(run.model, task.evaluation) - task.kind.logits(
            compressed.model, task.evaluation
        )
    assert float(apart.abs().max()) < 1e-2  # the same numbers but for a rounding that falls the other way


@pytest.mark.parametrize("way", ["build", "run", "nan", "wrong"])
def test_a_kernel_that_fails_costs_its_speed_and_never_the_point(way, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "layer_engines", lambda: (Broken(way),))
    point = bench_of(tmp_path).measure(Recipe(wb.Quantize(weight_bits=4)))
    assert point.latency is not None
    assert point.complete
    text = " ".join(point.warnings)
    assert {
        "build": "no such instruction",
        "run": "illegal memory access",
        "nan": "nan apart",
        "wrong": "gives other products",
    }[way] in text
    assert "floats" in text or "left out" in text
    assert point.kernels == ()  # what was planned is not said to have run
    assert (
        len([warning for warning in point.warnings if "floats" in warning]) <= 2
    )  # one line for all layers of one reason


def test_a_whole_runtime_that_fails_falls_back_for_both_models(monkeypatch, tmp_path):
    def fail(*_given):
        raise RuntimeError("the exporter has a bad day")

    monkeypatch.setattr("workbench.runtime.onnx_engine.export", fail)
    bench = bench_of(tmp_path, runtime="onnx")
    compressed = compress(bench.task, Recipe(wb.Prune(sparsity=0.5)))
    run = realise(
        compressed,
        "cpu",
        "onnx",
        dense=bench.task.model,
        kind=bench.task.kind,
        items=bench.setting.latency_items,
    )
    assert run.model is compressed.model
    assert run.dense is bench.task.model
    point = bench.measure(Recipe(wb.Prune(sparsity=0.5)))
    assert any(
        "timed step by step in torch" in warning and "bad day" in warning for warning in point.warnings
    )
    assert point.latency is not None


@pytest.mark.parametrize(
    ("sort", "steps"),
    [
        ("vit", (wb.Prune(sparsity=0.5, pattern="neurons"),)),
        ("llama", (wb.LowRank(rank_ratio=0.3),)),
        ("resnet", (Activations(), wb.Quantize(weight_bits=8))),
        ("gpt2", ()),
    ],
    ids=["structured", "low rank", "W8A8 convolutions", "dense"],
)
def test_onnx_runtime_answers_as_the_compressed_model(sort, steps):
    task = tiny_task(sort)
    compressed = compress(task, Recipe(*steps))
    run = realise(compressed, "cpu", "onnx", dense=task.model, kind=task.kind, items=task.evaluation[:4])
    assert run.warnings == ()
    assert isinstance(run.model, OnnxSession)
    assert isinstance(run.dense, OnnxSession)
    with torch.inference_mode():
        wanted, logits = (
            task.kind.logits(model, task.evaluation[4:8]) for model in (compressed.model, run.model)
        )
        assert torch.allclose(wanted, logits, atol=1e-4)
        assert torch.allclose(
            task.kind.logits(task.model, task.evaluation[:4]),
            task.kind.logits(run.dense, task.evaluation[:4]),
            atol=1e-4,
        )


def test_a_missing_library_names_the_extra(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxruntime" else find(name, *more)
    )
    with pytest.raises(
        RuntimeRefused, match=r"onnxruntime is not installed: pip install 'compression-workbench\[onnx\]'"
    ):
        bench_of(tmp_path, runtime="onnx")
    assert "compression-workbench[onnx]" in next(
        row.runs for row in runtime_rows("cpu", measure=False) if row.name == "runtime=onnx"
    )


def test_a_runtime_that_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(
        RuntimeRefused,
        match="runtime='tensorrt' is unknown: choose one of auto, torch, onnx, graph, compiled",
    ):
        bench_of(tmp_path, runtime="tensorrt")
    with pytest.raises(
        RuntimeRefused, match="runtime='graph' cannot be used on cpu: CUDA graphs need a CUDA GPU"
    ):
        bench_of(tmp_path, runtime="graph")
    monkeypatch.setattr(execution.shutil, "which", lambda _name: None)
    assert "needs a C++ compiler" in why_not("compiled", "cpu")
    half = tiny_task("vit", dtype=torch.bfloat16)
    with pytest.raises(RuntimeRefused, match="the model is bfloat16; float32 is needed"):
        runner(
            half.model,
            (),
            "onnx",
            kind=half.kind,
            items=half.evaluation[:2],
            once=lambda _key, compute: compute(),
        )


def test_the_runtime_is_part_of_a_points_key_unless_it_is_the_usual_one(tmp_path):
    auto, by_torch = bench_of(tmp_path).context, bench_of(tmp_path, runtime="torch").context
    assert auto.runtime == "auto"
    assert auto.key(W8A8) != by_torch.key(W8A8)
    older = dataclasses.replace(auto)
    key_parts = [
        W8A8.key,
        older.model_fingerprint,
        older.data_fingerprint,
        older.device,
        older.device_name,
        str(older.latency_batch),
        str(older.confidence),
        older.workbench_version,
    ]
    import hashlib

    assert (
        auto.key(W8A8) == hashlib.sha256("|".join(key_parts).encode()).hexdigest()[:16]
    )  # as version 0.1.0 wrote it


def test_reasons_are_told_from_shapes_alone():
    assert "3-bit" in reasons_for(None, [3], "cpu")[0]
    assert "runtime 'onnx' has one" in reasons_for(None, [4], "cpu", group_size=64)[0]
    assert reasons_for(None, [4], "cpu", group_size=64, runtime="onnx") == []
    assert "cannot be used here" in reasons_for(None, [4], "cpu", runtime="graph")[0]
    assert "simulated" in reasons_for(None, [], "cpu", inputs=InputFormat())[0]
    assert (reasons_for(None, [8], "cpu", inputs=InputFormat()) == []) == wide_bytes()
    assert len(reasons_for("unstructured", [8], "cpu", runtime="torch")) == 2


def test_every_engine_answers_about_layers_that_are_shapes_only():
    for engine in layer_engines():
        for bits in range(2, 9):
            for inputs in (None, InputFormat(), InputFormat(dynamic=False, per_token=False)):
                for device in ("cpu", "cuda"):
                    assert isinstance(engine.serves(probe(bits, 64, inputs), device), str)
    names = [engine.name for engine in (*layer_engines(), *model_engines())]
    assert len(set(names)) == len(names)


def test_the_command_lists_every_runtime_with_a_reason_where_it_cannot_run():
    shown = CliRunner().invoke(command, ["runtimes", "--quick", "--device", "cpu"])
    assert shown.exit_code == 0
    text = " ".join(shown.output.replace("│", " ").split())
    for name in WORDS:
        assert f"runtime={name}" in text
    assert "ONNX Runtime" in text
    assert "torch int8" in text
    assert "CUDA GPU" in text


def test_the_roofline_is_what_pencil_and_paper_say():
    limits = Limits(1e9, {32: 1e12, 8: 4e12})
    one_token = Product(
        1, 1000, 1000, 4e6, 32
    )  # 4 MB of weights and 8 kB of activations: 4.008 ms; 1 microsecond of arithmetic
    assert one_token.seconds(limits, 4) == pytest.approx((4.008e-3, 1e-6))
    packed = dataclasses.replace(one_token, weight_bytes=5e5)
    floor = roof([one_token], [packed], limits, 4)
    assert floor == Roof(1.0, pytest.approx(4.008 / 0.508))
    assert floor.bound == "memory"
    many = Product(10**6, 1000, 1000, 4e6, 32)  # 1 s of arithmetic, 8.004 s of memory
    assert roof([many], [dataclasses.replace(many, bits=8)], limits, 4).ratio == pytest.approx(8.004 / 5.004)
    assert roof([Product(1000, 10**4, 10**4, 4e8, 32)], [], limits, 4).ratio == 1.0
    rounded = dataclasses.replace(many, bits=8, passes=5)
    extra = 5 * 2 * 4 * many.rows * many.inputs / limits.bytes_per_s  # each pass reads and writes float32
    assert roof([many], [rounded], limits, 4).ratio == pytest.approx(
        1 / (5.004 / 8.004 + extra / max(many.seconds(limits, 4)))
    )


def test_limits_are_measured_once_and_plausible():
    limits = limits_of("cpu")
    assert limits_of("cpu") is limits
    assert 1e8 < limits.bytes_per_s < 1e13
    assert all(1e8 < rate < 1e16 for rate in limits.multiply_adds_per_s.values())
    assert "GB/s" in limits.words()


def test_a_prediction_says_what_the_model_waits_for(tmp_path):

    predictor = bench_of(tmp_path).predictor()
    dense = predictor.predict(Recipe())
    assert dense.roof.ratio == pytest.approx(1.0)
    low = predictor.predict(Recipe(wb.LowRank(rank_ratio=0.2)))
    assert (
        low.roof.bound == "memory"
    )  # a model this small: what is written between two factors outweighs what they save
    if wide_bytes():
        assert (
            predictor.predict(W8A8).roof.ratio < 1
        )  # so small that rounding the inputs takes longer than its products save
        assert predictor.predict(W8A8).speedup.value < 1
        assert "bandwidth and arithmetic" in " ".join(predictor.predict(W8A8).notes)
    assert predictor.predict(Recipe(wb.Quantize(weight_bits=3))).roof.ratio == pytest.approx(
        1.0
    )  # no kernel here: nothing is promised


@pytest.mark.slow
@pytest.mark.parametrize(("sort", "blocks"), [("vit", 2), ("llama", 2), ("resnet", 2)])
def test_a_compiled_model_answers_as_it_did_and_the_given_one_is_left_alone(sort, blocks):
    task = tiny_task(sort)
    compiled = runner(
        task.model,
        (),
        "compiled",
        kind=task.kind,
        items=task.evaluation[:4],
        once=lambda _key, compute: compute(),
    )
    assert isinstance(compiled, Compiled)
    assert len(repeated(compiled.model)) == blocks
    assert all(module._compiled_call_impl is None for module in task.model.modules())
    with torch.inference_mode():
        assert torch.allclose(
            task.kind.logits(compiled, task.evaluation[:4]),
            task.kind.logits(task.model, task.evaluation[:4]),
            atol=1e-5,
        )


@pytest.mark.slow
def test_blocks_that_are_alike_are_compiled_once():
    task = tiny_task("llama")
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    runner(
        task.model,
        (),
        "compiled",
        kind=task.kind,
        items=task.evaluation[:4],
        once=lambda _key, compute: compute(),
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.gpu
@pytest.mark.parametrize("sort", ["vit", "llama"])
def test_a_captured_model_answers_as_it_did_on_other_inputs_too(sort):
    task = tiny_task(sort, "cuda")
    items = task.evaluation.to("cuda")
    captured = runner(
        task.model, (), "graph", kind=task.kind, items=items[:4], once=lambda _key, compute: compute()
    )
    assert isinstance(captured, CapturedModel)
    with torch.inference_mode():
        for part in (items[:4], items[4:8], items[:2], items[8:12]):
            assert torch.allclose(
                task.kind.logits(captured, part), task.kind.logits(task.model, part), atol=1e-4
            )
    assert len(captured.graphs) == 2


@pytest.mark.gpu
def test_a_compiled_model_can_be_captured():
    task = tiny_task("llama", "cuda")
    items = task.evaluation.to("cuda")
    captured = CapturedModel(Compiled(task.model))
    with torch.inference_mode():
        for part in (items[:4], items[4:8]):
            assert torch.allclose(
                task.kind.logits(captured, part), task.kind.logits(task.model, part), atol=1e-4
            )
    assert not torch.cuda.is_current_stream_capturing()


def test_names_are_checked_wherever_they_come_from():
    assert chosen(None) == "auto"
    assert chosen("onnx") == "onnx"
    assert model_engines()[0].name == "ONNX Runtime"
    shown = CliRunner().invoke(command, ["measure", "fashion-cnn", "--runtime", "fast"])
    assert shown.exit_code == 2
    assert "'fast' is not one of" in shown.output
