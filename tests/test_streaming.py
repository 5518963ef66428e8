"""Streamed and spread models: the bits of the resident ones, two blocks at a time, and a word on what does
not work there."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny_models
import tiny_tasks
import torch

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.core.layer_report import LayerReport
from workbench.errors import CompressionError, DeviceError
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.modules import offload, placement
from workbench.modules.layer import find_layers
from workbench.modules.offload import device_of, streams_to
from workbench.modules.placement import attach_spread, device_map, model_bytes, place
from workbench.modules.sharing import sharing_copy
from workbench.tasks.placing import place_task

ROOT = Path(__file__).parents[1]
RECIPES = {
    "dense": wb.Recipe(),
    "magnitude": wb.Recipe(wb.Prune(sparsity=0.5)),
    "2:4": wb.Recipe(wb.Prune(sparsity=0.5, pattern="2:4", criterion="wanda")),
    "rounds": wb.Recipe(wb.Prune(sparsity=0.5, criterion="wanda", rounds=2)),
    "sparsegpt, repair": wb.Recipe(
        wb.Prune(sparsity=0.5, criterion="sparsegpt"), wb.Repair(repair_ratio=0.1)
    ),
    "repair in rounds": wb.Recipe(
        wb.Prune(sparsity=0.5, criterion="wanda"), wb.Repair(repair_ratio=0.1, repair_rounds=2)
    ),
    "svd": wb.Recipe(wb.LowRank(rank_ratio=0.3, factorization="svd")),
    "rank, sparsity, gptq": wb.Recipe(
        wb.LowRank(rank_ratio=0.3),
        wb.Prune(sparsity=0.5, criterion="wanda"),
        wb.Quantize(weight_bits=4, rounding="gptq"),
    ),
    "awq": wb.Recipe(wb.Quantize(weight_bits=4, rounding="awq")),
    "hqq": wb.Recipe(wb.Quantize(weight_bits=3, rounding="hqq", group_size=8)),
    "smoothed W4A8, repair": wb.Recipe(
        wb.Activations(
            activation_bits=8, smoothing=0.5, activation_scaling="static", activation_granularity="tensor"
        ),
        wb.Quantize(weight_bits=4),
        wb.Repair(repair_ratio=0.1),
    ),
}
REFUSED = {
    "gradients": wb.Recipe(wb.Prune(sparsity=0.5, criterion="fisher")),
    "structure": wb.Recipe(wb.Prune(sparsity=0.5, pattern="neurons")),
    "training": wb.Recipe(wb.Prune(sparsity=0.5), wb.Distill(temperature=2.0)),
    "shared out": wb.Recipe(wb.Prune(sparsity=0.5, allocation="global")),
    "average width": wb.Recipe(wb.Quantize(weight_bits=3.5)),
}


def streamed_task(sort: str, device: str):
    return place_task(
        tiny_tasks.tiny_task(sort),
        torch.device("cuda", 0) if device == "cuda" else torch.device("cpu"),
        "streamed",
    )


def at_home(model: torch.nn.Module) -> bool:
    """Return whether every tensor is back on the host, and none of them is a copy that was on the device."""
    return all(
        tensor.device.type == "cpu" and not hasattr(tensor, "home") and streams_to(tensor) is not None
        for tensor in (*model.parameters(), *model.buffers())
    )


def alike(first: tuple[LayerReport, ...], second: tuple[LayerReport, ...]) -> bool:
    """Return whether two reports say the same.

    Relative errors to the last digits of their sums, which a GPU adds up in another order for resident
    layers.
    """
    errors = [
        [0.0 if layer.relative_error is None else layer.relative_error for layer in layers]
        for layers in (first, second)
    ]
    rest = [
        [dataclasses.replace(layer, relative_error=None) for layer in layers] for layers in (first, second)
    ]
    return rest[0] == rest[1] and errors[0] == pytest.approx(errors[1], rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_the_bits_are_those_of_the_resident_model(sort, device, name):
    resident, streamed = tiny_tasks.tiny_task(sort, device), streamed_task(sort, device)
    statistics = Statistics(resident), Statistics(streamed)
    for _ in range(2):  # the second time takes what was kept
        expected, mine = (
            compress(task, RECIPES[name], kept, shared=True)
            for task, kept in zip((resident, streamed), statistics, strict=True)
        )
        assert at_home(mine.model)
        assert at_home(streamed.model)
        theirs = {key: tensor.cpu() for key, tensor in expected.model.state_dict().items()}
        assert tiny_tasks.same(theirs, mine.model.state_dict())
        assert alike(expected.report, mine.report)
        assert expected.warnings == mine.warnings
        scores = [
            Evaluator(task, task.evaluation.to(device), fused=False).scores(model, [], 40)
            for task, model in ((resident, expected.model), (streamed, mine.model))
        ]
        assert torch.equal(scores[0].loss, scores[1].loss)
        assert torch.equal(scores[0].answers, scores[1].answers)
        assert at_home(mine.model)


def test_measured_points_are_the_same_and_say_what_is_missing(sort, device, tmp_path):
    recipe = RECIPES["sparsegpt, repair"]
    benches = [
        wb.Bench(
            tiny_tasks.tiny_task(sort),
            device=device,
            placement=where,
            ledger=tmp_path / f"{where}.journal",
            progress=False,
        )
        for where in ("device", "streamed")
    ]
    for bench in benches:
        bench.setting.evaluator.fused = False  # as a streamed model is run
    for stayed, moved in zip(*(list(bench.stream(recipe)) for bench in benches), strict=True):
        assert (stayed.quality, stayed.flips, stayed.sizes, stayed.dense_sizes) == (
            moved.quality,
            moved.flips,
            moved.sizes,
            moved.dense_sizes,
        )
        assert alike(stayed.layers, moved.layers)
    assert moved.complete
    assert moved.latency is None
    assert moved.missing["latency"].startswith("streamed: the model (0.0")
    assert moved.missing["peak memory"] == moved.missing["latency"]
    assert any(
        warning.startswith("streamed from the host: 0.0") and "to all items" in warning
        for warning in moved.warnings
    )
    assert moved.context.device_name == stayed.context.device_name + ", streamed from the host"
    assert stayed.key != moved.key


def test_an_export_of_a_streamed_model_is_that_of_the_resident_one(tmp_path):
    recipe, exports = RECIPES["rank, sparsity, gptq"], []
    for where in ("device", "streamed"):
        bench = wb.Bench(
            tiny_tasks.tiny_task("llama"),
            placement=where,
            ledger=tmp_path / f"{where}.journal",
            progress=False,
        )
        exports.append(wb.load(bench.export(recipe, tmp_path / where)))
    assert tiny_tasks.same(exports[0].state_dict(), exports[1].state_dict())


def test_one_block_at_a_time_is_on_the_device(monkeypatch):
    """On a CPU nothing is fetched ahead: while a block runs, the copies alive are its own and those of what
    lies outside."""
    task = streamed_task("untied", "cpu")
    copies, fetched = weakref.WeakSet(), offload.fetched

    def counted(host, device):
        copy = fetched(host, device)
        copies.add(copy)
        return copy

    monkeypatch.setattr(offload, "fetched", counted)
    seen: list[set[int]] = []
    blocks = task.model.model.layers
    handles = [
        block.mlp.register_forward_hook(lambda *_: seen.append({id(copy.home) for copy in copies}))
        for block in blocks
    ]
    task.kind.logits(task.model, task.evaluation[:2])
    for handle in handles:
        handle.remove()
    outside = {
        id(tensor)
        for part in (task.model.model.embed_tokens, task.model.model.norm, task.model.lm_head)
        for tensor in part.parameters()
    }
    assert [kept - outside - {id(tensor) for tensor in task.model.buffers()} for kept in seen] == [
        {id(tensor) for tensor in block.parameters()} for block in blocks
    ]
    gc.collect()
    assert not copies


def test_while_a_batch_is_worked_on_only_its_layers_are_away():
    from workbench.compress.core.batch import grouped

    task = streamed_task("llama", "cpu")
    layers = list(find_layers(task.model)[0].values())
    for batch in grouped(layers):
        away = {layer.name for layer in layers if hasattr(layer.parameter, "home")}
        assert away == {layer.name for layer in batch.layers}
    assert at_home(task.model)


def test_a_failing_call_leaves_everything_at_home():
    task = streamed_task("llama", "cpu")
    handle = task.model.model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(ValueError("stop"))
    )
    with pytest.raises(ValueError, match="stop"):
        task.kind.logits(task.model, task.evaluation[:2])
    handle.remove()
    assert at_home(task.model)
    assert torch.isfinite(task.kind.logits(task.model, task.evaluation[:2])).all()


def test_a_failing_step_leaves_the_dense_model_at_home():
    task = streamed_task("llama", "cpu")

    def stop(what: str, done: int, total: int) -> None:
        if done:
            raise wb.errors.Cancelled(what)

    with pytest.raises(wb.errors.Cancelled):
        compress(task, RECIPES["magnitude"], progress=stop, shared=True)
    gc.collect()
    assert at_home(task.model)


def test_the_given_model_stays_as_it_is():
    given = tiny_tasks.tiny_task("llama")
    before = tiny_tasks.weights(given.model)
    task = place_task(given, torch.device("cpu"), "streamed")
    compress(task, RECIPES["magnitude"], shared=True)
    assert streams_to(given.model) is None
    assert not any(streams_to(tensor) for tensor in given.model.parameters())
    assert not given.model._forward_pre_hooks
    assert tiny_tasks.same(before, given.model.state_dict())


def test_copies_are_streamed_too():
    task = streamed_task("llama", "cpu")
    wanted = task.kind.logits(task.model, task.evaluation[:2])
    assert torch.equal(task.kind.logits(sharing_copy(task.model), task.evaluation[:2]), wanted)
    assert at_home(task.model)


def test_parts_can_be_called_within_a_pass():
    task = streamed_task("llama", "cpu")
    with offload.streaming(task.model), torch.no_grad():
        states = task.model.model(**task.evaluation[:2].inputs).last_hidden_state
        logits = task.model.lm_head(states)
        assert hasattr(task.model.lm_head.weight, "home")
    assert torch.equal(logits[:, :-1], task.kind.logits(task.model, task.evaluation[:2]))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("where", ["streamed", "spread"])
def test_what_does_not_work_is_refused_before_any_work(name, where, monkeypatch):
    task = streamed_task("llama", "cpu") if where == "streamed" else spread_over_cpu("llama")
    monkeypatch.setattr(Statistics, "once", lambda *_, **__: pytest.fail("work had begun"))
    messages = {
        "gradients": "gradients need all of the model on one device",
        "structure": "rebuilds modules",
        "training": "Distill.*it trains",
        "shared out": "take the uniform allocation",
        "average width": "a whole width",
    }
    how = "streamed from the host" if where == "streamed" else "spread over 1 devices"
    with pytest.raises(
        CompressionError, match=rf"(?s)does not work on a model that is {how} \(0\.02 MB\).*"
    ) as caught:
        compress(task, REFUSED[name])
    assert re.search(messages[name], str(caught.value))


def test_auto_streams_what_does_not_fit(monkeypatch):
    model = tiny_tasks.MODELS["llama"]()
    size = model_bytes(model)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(placement, "LEAST_ROOM", {})
    monkeypatch.setattr(
        placement, "free_bytes", lambda _: int(2.3 * size)
    )  # 2.25 times its bytes: dense, compressed and room
    assert placement.required_bytes(model, cuda) <= int(2.3 * size)
    monkeypatch.setattr(placement, "free_bytes", lambda _: int(2.2 * size))
    monkeypatch.setattr(placement, "attach", lambda model, device, *, pinned: (model, device, pinned))
    assert place(model, cuda, "auto") == (model, cuda, True)
    monkeypatch.setattr(placement, "free_bytes", lambda _: int(0.9 * size))
    with pytest.raises(
        DeviceError,
        match=r"model 0\.02 MB, free 0\.02 MB on cuda:0: it cannot be held there; take placement='streamed'",
    ):
        place(model, cuda, "device")
    monkeypatch.setattr(placement, "free_bytes", lambda _: size // 10)
    with pytest.raises(
        DeviceError,
        match=(
            r"model 0\.02 MB, free 0\.00 MB on cuda:0: streaming needs 0\.0\d MB there, for two blocks of"
            r" 0\.01 MB"
        ),
    ):
        place(model, cuda, "streamed")


def test_unknown_placements_are_refused():
    with pytest.raises(
        DeviceError, match="placement='disk' is unknown: use 'auto', 'device', 'streamed', 'spread'"
    ):
        wb.Bench(tiny_tasks.tiny_task("vit"), placement="disk")


def test_a_folder_is_loaded_streamed_and_measured_by_the_command(tmp_path):
    folder = tiny_models.llama(tmp_path / "model")
    texts = tiny_models.words_file(tmp_path / "words.txt")
    from click.testing import CliRunner

    from workbench.cli import workbench

    given = [
        "measure",
        str(folder),
        "--data",
        str(texts),
        "--ledger",
        str(tmp_path / "points.journal"),
        "--offline",
        "--device",
        "cpu",
        "--evaluation-items",
        "8",
        "--sparsity",
        "0.5",
        "--placement",
        "streamed",
    ]
    result = CliRunner().invoke(workbench, given, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "streamed from the host" in result.output


def test_the_benchmark_runs(tmp_path):
    out = tmp_path / "streaming.json"
    command = [
        sys.executable,
        "benchmarks/streaming.py",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--context",
        "16",
        "--windows",
        "4",
        "--moves",
        "1",
        "--out",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    told = json.loads(out.read_text())
    assert {row["placement"] for row in told["rows"]} == {"device", "streamed"}
    assert all(row["first_s"] > 0 and row["all_s"] >= row["first_s"] for row in told["rows"])
    assert all(row["forecast_first_s"] > 0 for row in told["rows"] if row["placement"] == "streamed")
    assert told["same_bits"] is True


# --- several devices


def spread_over_cpu(sort: str):
    """A model spread over one device: the way of a real one, without a second device to go to."""
    task = tiny_tasks.tiny_task(sort)
    names = [
        name
        for name, module in task.model.named_modules()
        if name and not any(True for _ in module.children())
    ]
    return dataclasses.replace(
        task, model=attach_spread(task.model, dict.fromkeys(names, torch.device("cpu")), torch.device("cpu"))
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_spread_model_computes_the_same(sort, name):
    resident, spread = tiny_tasks.tiny_task(sort), spread_over_cpu(sort)
    theirs, mine = (compress(task, RECIPES[name], shared=True) for task in (resident, spread))
    assert tiny_tasks.same(theirs.model.state_dict(), mine.model.state_dict())
    scores = [
        Evaluator(task, task.evaluation).scores(model, [], 40)
        for task, model in ((resident, theirs.model), (spread, mine.model))
    ]
    assert torch.equal(scores[0].loss, scores[1].loss)


def test_carried_inputs_reach_the_device_of_the_weights():
    """With a second device that has no values (meta), the output of a model whose last block lies there is
    there as well."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    size = model_bytes(model)
    places = device_map(model, {0: 3 * size, 1: 3 * size})
    assert set(places.values()) == {0, 1}
    assert places["model.layers.0"] == 0
    assert places["lm_head"] == 1
    places["model.rotary_emb"] = 0  # its cosines go to every block
    given: list[str] = []
    attach_spread(
        model,
        {name: torch.device(("cpu", "meta")[where]) for name, where in places.items()},
        torch.device("cpu"),
    )
    handle = model.lm_head.register_forward_hook(
        lambda _module, inputs, output: given.extend((inputs[0].device.type, output.device.type))
    )
    with pytest.raises(NotImplementedError, match="meta"):  # nothing comes back from there
        model(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    handle.remove()
    assert given == ["meta", "meta"]
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("vocabulary", [8, 512, 20_000])
def test_spread_is_even_also_where_an_embedding_is_larger_than_a_block(monkeypatch, vocabulary):
    from accelerate.utils import modeling
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=8,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    monkeypatch.setattr(
        modeling, "get_max_memory", lambda given: dict(given) | {"cpu": 10**12}
    )  # as if there were these GPUs
    places = device_map(model, {0: 10**9, 1: 10**9})
    on = [
        sum(
            p.numel()
            for name, p in model.named_parameters()
            if any(f"{name}.".startswith(f"{part}.") for part, where in places.items() if where == index)
        )
        for index in (0, 1)
    ]
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert abs(on[0] - on[1]) <= 2 * max(*blocks, 16 * vocabulary)
    assert min(on) > 0


def test_spread_needs_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        DeviceError,
        match="needs two GPUs or more; torch sees 1 for device 'cuda:0': take placement='streamed'",
    ):
        place(tiny_tasks.MODELS["vit"](), torch.device("cuda", 0), "spread")


def test_spread_refuses_what_does_not_fit():
    model = tiny_tasks.MODELS["llama"]()
    with pytest.raises(
        DeviceError,
        match=r"model 0\.02 MB, free 0\.01 MB on cuda:0, 0\.01 MB on cuda:1: dense and compressed do not fit",
    ):
        device_map(model, {0: 10_000, 1: 10_000})


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_over_two_gpus_the_answers_are_the_same(name, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, and torch sees {torch.cuda.device_count()}")
    benches = [
        wb.Bench(
            tiny_tasks.tiny_task("untied"),
            device="cuda",
            placement=where,
            ledger=tmp_path / f"{where}.journal",
            progress=False,
        )
        for where in ("device", "spread")
    ]
    places = {parameter.device for parameter in benches[1].task.model.parameters()}
    assert places == {torch.device("cuda", 0), torch.device("cuda", 1)}
    benches[0].setting.evaluator.fused = False  # as a model over several GPUs is run
    single, double = (bench.measure(RECIPES[name]) for bench in benches)
    if "repair" in name:  # products of fewer layers at once round otherwise
        assert double.primary.compressed.value == pytest.approx(single.primary.compressed.value, rel=1e-3)
    else:
        assert (single.quality, single.flips) == (double.quality, double.flips)
    assert single.sizes == double.sizes
    assert "spread over 2 devices" in double.missing["latency"]
    compressed = benches[1].compress(RECIPES[name])
    assert {parameter.device for parameter in compressed.model.parameters()} == places


@pytest.mark.gpu
def test_a_gpu_holds_two_blocks_at_most():
    layers = [torch.nn.Linear(2048, 2048, bias=False) for _ in range(12)]  # 16 MB each
    streamed = offload.attach(Chain(layers).requires_grad_(False), torch.device("cuda", 0), pinned=True)
    given = torch.randn(4, 2048)
    streamed(given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logits = streamed(given)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2.5 * 2048 * 2048 * 4
    assert torch.cuda.memory_allocated() - before < 2**20
    assert all(parameter.is_pinned() for parameter in streamed.parameters())
    assert device_of(streamed) == torch.device("cuda", 0)
    resident = given.cuda()
    for layer in streamed.layers:
        resident = torch.nn.functional.linear(resident, layer.weight.cuda())
    assert torch.equal(logits, resident)


class Chain(torch.nn.Module):
    """Blocks one after the other."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            given = layer(given)
        return given
