"""Experts as layers: the same answers, every family of method, inputs of their own, exports, and dropping
them."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil

import pytest
import safetensors.torch
import torch
from moe_models import CONFIGS, EXPERTS, MORE, fused_forward, moe_model, moe_task
from tiny_tasks import tiny_task

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.errors import WorkbenchError
from workbench.export import load
from workbench.measure.evaluation.cuda_graphs import Graphs
from workbench.modules.expert_files import blocks_of_experts, fused_tensors, separate_tensors
from workbench.modules.experts import (
    SeparateExperts,
    experts_in,
    form_of,
    looks_fused,
    separate_experts,
    separated,
    trial_inputs,
    why_no_graph,
)
from workbench.modules.placement import place
from workbench.recipe import Recipe

FAMILIES = {
    "magnitude": Recipe(wb.Prune(sparsity=0.5)),
    "2:4": Recipe(wb.Prune(pattern="2:4")),
    "wanda": Recipe(wb.Prune(sparsity=0.5, criterion="wanda")),
    "sparsegpt": Recipe(wb.Prune(sparsity=0.5, criterion="sparsegpt")),
    "fisher by sensitivity": Recipe(wb.Prune(sparsity=0.5, criterion="fisher", allocation="sensitivity")),
    "W4": Recipe(wb.Quantize(weight_bits=4)),
    "W3 gptq": Recipe(wb.Quantize(weight_bits=3, rounding="gptq")),
    "W4 awq": Recipe(wb.Quantize(weight_bits=4, rounding="awq")),
    "W3.5": Recipe(wb.Quantize(weight_bits=3.5)),
    "low rank": Recipe(wb.LowRank(rank_ratio=0.4)),
    "W8A8": Recipe(wb.Activations(), wb.Quantize(weight_bits=8)),
    "W8A8 static": Recipe(
        wb.Activations(activation_scaling="static", activation_granularity="tensor", smoothing=0.5),
        wb.Quantize(weight_bits=8),
    ),
    "repair": Recipe(wb.Quantize(weight_bits=3), wb.Repair()),
    "distill": Recipe(wb.Prune(sparsity=0.5), wb.Distill(steps=2)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def moe(request):
    """One tiny architecture with experts, as a bench."""
    return wb.Bench(moe_task(request.param))


def ids() -> torch.Tensor:
    return torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(3))


def weights_of_experts(model: torch.nn.Module) -> int:
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.ndim > 1
    )


# --- the same answers


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_a_model_with_separate_experts_gives_what_it_gave(name):
    model = moe_model(name)
    before = fused_forward(model, ids())
    assert separate_experts(model)
    after = model(ids(), use_cache=False).logits
    if name == "Llama4":  # whose experts transformers multiplies all at once
        torch.testing.assert_close(after, before)
    else:
        assert torch.equal(after, before)
    assert not any(
        looks_fused(module) for module in model.modules() if not isinstance(module, SeparateExperts)
    )


def classes_with_experts() -> dict[str, type[torch.nn.Module]]:
    """Return every class of the installed transformers whose name says that it holds fused experts."""
    import transformers.models

    classes = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        try:
            file = importlib.import_module(f"transformers.models.{package.name}.modeling_{package.name}")
        except ImportError:
            continue
        classes |= {
            name: kind
            for name, kind in vars(file).items()
            if inspect.isclass(kind)
            and "Experts" in name
            and kind.__module__ == file.__name__
            and "nn.Parameter(" in inspect.getsource(kind)
        }
    return classes


class AnyConfig:
    """A configuration that has every number, small."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        settings = {"moe_latent_size": None, "_experts_implementation": "eager", "zero_expert_num": 2}
        if name in settings:
            return settings[name]
        for part, value in (
            ("expert", EXPERTS),
            ("act", "silu"),
            ("eps", 1e-5),
            ("limit", 1.0),
            ("alpha", 1.7),
        ):
            if part in name and "size" not in name and "intermediate" not in name:
                return value
        return 12 if "intermediate" in name or "ffn" in name else 16


LEFT = {"InklingSharedExperts", "LongcatFlashExperts"}  # fused in ways of their own: left, with the reason


def test_every_class_of_experts_gives_what_it_gave():
    classes = classes_with_experts()
    assert len(classes) > 50
    left = set()
    for name, kind in classes.items():
        module = (
            kind(AnyConfig()) if "config" in inspect.signature(kind).parameters else kind(EXPERTS, 16, 12)
        )
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        if not looks_fused(module) or form_of(module) is None:
            left.add(name)
            continue
        apart = separated(module, form_of(module)).eval()
        given = trial_inputs(apart)
        before = inspect.unwrap(kind.forward)(module, *given)
        if name == "Llama4TextExperts":
            torch.testing.assert_close(apart(*given), before)
        else:
            assert torch.equal(apart(*given), before), name
    assert left == LEFT


def test_experts_of_an_unknown_form_are_left_and_named():
    class OddExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 2
            self.gate_up_proj = torch.nn.Parameter(torch.randn(2, 8, 4))
            self.down_proj = torch.nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states + top_k_weights.sum()

        def _apply_gate(self, products):
            return products.chunk(2, dim=-1)[0]

    class Twice(OddExperts):
        def forward(self, hidden_states):
            return hidden_states

    class Thrice(OddExperts):
        def forward(self, hidden_states, gammas):
            return hidden_states

    model = torch.nn.ModuleDict({"one": OddExperts(), "two": Twice(), "three": Thrice()})
    assert separate_experts(model) == []
    assert "something else" in model["one"].left_dense
    assert "cannot be tried" in model["two"].left_dense
    assert "gammas" in model["three"].left_dense


def test_a_task_leaves_the_model_that_it_is_given_as_it_is():
    model = moe_model("Mixtral")
    names = list(model.state_dict())
    task = moe_task("Mixtral", model)
    assert list(model.state_dict()) == names
    assert len(experts_in(task.model)) == 2
    assert experts_in(model) == {}


# --- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_expert_and_loads_back(moe, family, tmp_path):
    point = moe.measure(FAMILIES[family])
    rows = [row for row in point.layers if ".experts." in row.name]
    experts = sum(block.num_experts for block in experts_in(moe.task.model).values())
    assert len(rows) == 2 * experts
    skipped = [row for row in rows if "skipped" in row.outcome and "it is worth" not in row.outcome]
    assert skipped == []
    compressed = compress(moe.task, FAMILIES[family])
    moe.export(FAMILIES[family], tmp_path / "out")  # compares every tensor, bit for bit
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded(ids()).logits, compressed.model(ids()).logits)


def test_most_of_a_model_is_touched(moe):
    compressed = compress(moe.task, FAMILIES["W4"])
    touched = sum(layer.parameter.numel() for layer in compressed.layers if layer.grid is not None)
    embeddings = 2 * 64 * 16
    assert touched > 0.85 * (sum(parameter.numel() for parameter in moe.task.model.parameters()) - embeddings)


@pytest.mark.parametrize("family", ["wanda", "W3 gptq"])
def test_streamed_experts_get_what_resident_ones_get(moe, family):
    resident = compress(moe.task, FAMILIES[family])
    moved = moe_task(moe.task.model_name.removeprefix("tiny-"))
    place(moved.model, torch.device("cpu"), "streamed")
    streamed = compress(moved, FAMILIES[family])
    for mine, theirs in zip(resident.layers, streamed.layers, strict=True):
        assert mine.name == theirs.name
        assert torch.equal(mine.parameter, theirs.parameter), mine.name


# --- inputs of their own


def routed_rows(model: torch.nn.Module, block: str, expert: int, items) -> torch.Tensor:
    """Return the rows [tokens, width] that reach an expert, from its block's inputs, not by its code."""
    given = []
    module = model.get_submodule(block)
    handle = module.register_forward_pre_hook(lambda _, args: given.append(args))
    model(items.inputs["input_ids"], use_cache=False)
    handle.remove()
    ((states, chosen, _),) = given
    return states[(chosen == expert).any(1)]


def test_an_expert_is_calibrated_on_the_tokens_that_are_routed_to_it(moe):
    task = moe.task
    statistics = Statistics(task)
    block = list(experts_in(task.model))[-1]
    for expert in range(EXPERTS):
        rows = routed_rows(task.model, block, expert, task.calibration[: len(task.calibration)])
        name = f"{block}.{expert}.gate_up_proj"
        assert statistics.rows(name) == len(rows)
        if len(rows):
            torch.testing.assert_close(statistics.second_moment(name), rows.t() @ rows / len(rows))


@pytest.fixture(scope="module")
def unrouted():
    """A GPT-OSS whose first router never takes expert 1."""
    model = moe_model("GptOss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[1] = -1e4
    return moe_task("GptOss", model)


ALONE = "model.layers.0.mlp.experts.1."
SAID = {
    "wanda": "by the magnitude of its weights",
    "sparsegpt": "by the magnitude of its weights",
    "fisher by sensitivity": "by the magnitude of its weights",
    "W3 gptq": "rounded to nearest",
    "W4 awq": "rounded to nearest",
    "low rank": "by its plain singular values",
    "W8A8 static": "by the ranges of the experts beside it",
}


@pytest.mark.parametrize("family", SAID)
def test_an_expert_without_tokens_is_compressed_and_the_report_says_how(unrouted, family):
    compressed = compress(unrouted, FAMILIES[family])
    rows = {row.name: row.outcome for row in compressed.report if ".experts." in row.name}
    told = {name for name, outcome in rows.items() if "no calibration token was routed" in outcome}
    assert told == {f"{ALONE}gate_up_proj", f"{ALONE}down_proj"}
    assert all(SAID[family] in rows[name] for name in told)
    assert any("2 of 16 layers" in warning and ALONE in warning for warning in compressed.warnings)


def of_expert(compressed, name: str) -> torch.Tensor:
    """Return the weight [outputs, inputs] of the layer of the expert without tokens."""
    matrices = [layer.matrix() for layer in compressed.layers if layer.origin == f"{ALONE}{name}"]
    return matrices[0] if len(matrices) == 1 else matrices[1] @ matrices[0]


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_what_decides_without_tokens_reads_weights_alone(unrouted, name):
    dense = of_expert(compress(unrouted, Recipe(wb.Activations())), name)
    kept = of_expert(compress(unrouted, FAMILIES["wanda"]), name) != 0
    half = dense.shape[1] // 2
    assert torch.equal(kept, dense.abs() >= dense.abs().sort(1).values[:, half : half + 1])  # within each row
    solved = of_expert(compress(unrouted, FAMILIES["sparsegpt"]), name)
    assert torch.equal(solved[solved != 0], dense[solved != 0])  # nothing to make up for
    nearest = compress(unrouted, Recipe(wb.Quantize(weight_bits=3)))
    assert torch.equal(of_expert(compress(unrouted, FAMILIES["W3 gptq"]), name), of_expert(nearest, name))
    plain = compress(unrouted, Recipe(wb.LowRank(rank_ratio=0.4, factorization="svd")))
    torch.testing.assert_close(
        of_expert(compress(unrouted, FAMILIES["low rank"]), name), of_expert(plain, name)
    )


# --- whole experts


def importance_of(model: torch.nn.Module, block: str, items) -> torch.Tensor:
    """Return the mean over each expert's tokens of the router's weight times the norm of its output, by
    transformers' own fused module: each expert is run on every token, with weight 1.
    """
    module, given = model.get_submodule(block), []
    handle = module.register_forward_pre_hook(lambda _, args: given.append(args))
    fused_forward(model, items.inputs["input_ids"])
    handle.remove()
    ((states, chosen, weights),) = given
    run = inspect.unwrap(type(module).forward)
    means = []
    for expert in range(module.num_experts):
        outputs = run(module, states, torch.full((len(states), 1), expert), torch.ones(len(states), 1))
        taken = chosen == expert
        gates = (weights * taken).sum(1)[taken.any(1)]
        means.append((gates * outputs[taken.any(1)].norm(dim=1)).sum() / max(1, len(gates)))
    return torch.stack(means)


HALF = Recipe(wb.Prune(sparsity=0.5, pattern="experts"))


def test_the_experts_that_add_least_go_and_the_router_with_them(moe, tmp_path):
    task = moe.task
    compressed = compress(task, HALF)
    fused = moe_model(task.model_name.removeprefix("tiny-"))
    for name, block in experts_in(task.model).items():
        scores = importance_of(fused, name, task.calibration[: len(task.calibration)])
        groups = 2 if "Deepseek" in task.model_name else 1
        size = block.num_experts // groups
        order = scores.view(groups, size).sort(descending=True).indices[:, : size // 2]
        stays = sorted((order + size * torch.arange(groups)[:, None]).flatten().tolist())
        left = compressed.model.get_submodule(name)
        assert left.num_experts == len(stays) == block.num_experts // 2
        for now, before in enumerate(stays):
            for part in ("gate_up_proj", "down_proj"):
                kept = left.get_submodule(f"{now}.{part}").weight
                assert torch.equal(kept, block.get_submodule(f"{before}.{part}").weight)
        holder = name.rpartition(".")[0]
        router = "router" if "Gpt" in task.model_name else "gate"
        whole, cut = (model.get_submodule(f"{holder}.{router}") for model in (task.model, compressed.model))
        assert torch.equal(cut.weight, whole.weight[stays])
        told = next(row for row in compressed.report if row.name == f"{holder}.{router}")
        assert "skipped" not in told.outcome
        assert f"{block.num_experts - len(stays)} of {block.num_experts} rows removed" in told.outcome
        assert told.weights == cut.weight.numel()
        assert cut.top_k <= len(stays)
    gone = [row for row in compressed.report if "removed with its expert" in row.outcome]
    assert gone
    assert all(row.weights == 0 for row in gone)
    assert moe.predictor().predict(HALF).file_bytes == moe.measure(HALF).sizes.file_bytes
    moe.export(HALF, tmp_path / "out")
    loaded = load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    numbers = {config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")}
    assert {next(iter(experts_in(compressed.model).values())).num_experts} <= numbers
    assert torch.equal(loaded(ids()).logits, compressed.model(ids()).logits)
    assert torch.equal(
        moe.task.model(ids()).logits, moe_task(task.model_name.removeprefix("tiny-")).model(ids()).logits
    )


def test_a_token_picks_no_more_experts_than_are_left():
    compressed = compress(moe_task("Olmoe"), Recipe(wb.Prune(sparsity=0.7, pattern="experts")))
    assert compressed.model.config.num_experts == compressed.model.config.num_experts_per_tok == 1
    assert compressed.model.model.layers[0].mlp.gate.top_k == 1
    assert torch.isfinite(compressed.model(ids()).logits).all()


def test_other_steps_follow_and_random_experts_go_by_the_seed():
    task = moe_task("Mixtral")
    recipe = Recipe(wb.Prune(sparsity=0.25, pattern="experts"), wb.Quantize(weight_bits=4, rounding="gptq"))
    compressed = compress(task, recipe)
    assert sum(layer.grid is not None for layer in compressed.layers if ".experts." in layer.name) == 12
    first, second = (
        compress(task, Recipe(wb.Prune(pattern="experts", criterion="random", seed=s))) for s in (1, 2)
    )
    left = [
        {layer.origin for layer in compressed.layers if ".experts." in layer.origin}
        for compressed in (first, second)
    ]
    assert left[0] != left[1]


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("llama", {}, "it has no experts"),
        ("JetMoe", {}, "one product each"),
        ("Mixtral", {"allocation": "global"}, "config.json states once"),
        ("Mixtral", {"targets": ("!model.layers.0.mlp.experts.*",)}, "leave out"),
        ("Mixtral", {"sparsity": 0.1}, "starts at sparsity=0.125"),
    ],
)
def test_experts_that_cannot_go_are_refused_with_the_reason(name, step, message):
    task = tiny_task(name) if name == "llama" else moe_task(name)
    with pytest.raises(WorkbenchError, match=message):
        compress(task, Recipe(wb.Prune(**{"pattern": "experts", **step})))


# --- parameters of other names


def test_parameters_of_other_names_are_listed_with_the_reason():
    import transformers

    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=4
    )
    model = transformers.MambaForCausalLM(config)
    compressed = compress(moe_task("Mixtral", model.eval().requires_grad_(False)), FAMILIES["W4"])
    rows = {row.name: row for row in compressed.report}
    place = "backbone.layers.0.mixer"
    assert rows[f"{place}.A_log"].shape == (32, 4)
    assert "a parameter of MambaMixer itself" in rows[f"{place}.A_log"].outcome
    assert "32 numbers" in rows[f"{place}.D"].outcome
    assert f"{place}.in_proj.bias" not in rows


def test_a_weight_that_is_computed_from_others_is_listed():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(4, 4, 3))
    from workbench.modules.layer import find_layers

    left = find_layers(torch.nn.ModuleDict({"position": layer}))[1]
    assert set(left) == {f"position.parametrizations.weight.original{place}" for place in (0, 1)}
    assert all("a parametrization" in reason for reason in left.values())


def test_what_repeats_one_order_of_operations_says_that_experts_have_none(moe):
    point = wb.Bench(moe.task, runtime="onnx").measure(FAMILIES["magnitude"])
    assert any("which experts are run depends on the data" in words for words in point.warnings)
    graphs = Graphs(moe.task.kind, moe.task.model, 8, lambda model: model)
    assert not graphs.load(moe.task.model)
    assert graphs.refused
    assert "experts" in why_no_graph(moe.task.model)
    assert why_no_graph(tiny_task("llama").model) == ""


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "DeepseekV3", "Llama4", "JetMoe"])
def test_what_is_stored_as_it_is_opens_in_transformers(name, tmp_path):
    import transformers

    few = wb.Prune(sparsity=0.01, targets=("lm_head",))  # too few to be stored as zeros
    recipe = Recipe(
        few if name == "JetMoe" else wb.Prune(sparsity=0.5, pattern="experts"), wb.Distill(steps=2)
    )
    bench = wb.Bench(moe_task(name))
    bench.export(recipe, tmp_path / "out")
    names = set(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    ours = load(tmp_path / "out")
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(
        tmp_path / "out", dtype=torch.float32, experts_implementation="eager"
    ).eval()
    assert names <= set(theirs.state_dict())
    torch.testing.assert_close(theirs(ids()).logits, ours(ids()).logits)
    blocks = blocks_of_experts(ours)
    assert blocks
    again = separate_tensors(fused_tensors(ours.state_dict(), blocks), blocks)
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in ours.state_dict().items())


def test_blocks_leave_a_model_whose_first_blocks_have_no_experts(tmp_path):
    bench = wb.Bench(moe_task("DeepseekV3"))
    recipe = Recipe(wb.Prune(sparsity=0.5, pattern="layers"))
    compressed = compress(bench.task, recipe)
    left = int(bool(experts_in(compressed.model)))
    assert compressed.model.config.first_k_dense_replace == 1 - left
    bench.export(recipe, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(ids()).logits, compressed.model(ids()).logits)


def test_blocks_that_no_configuration_can_describe_are_refused_before_they_are_measured():
    model = moe_model("Qwen3Moe", num_hidden_layers=4, decoder_sparse_step=2)
    task = moe_task("Qwen3Moe", model)
    targets = ("!model.layers.1.*", "!model.layers.2.*", "!model.layers.3.*")
    with pytest.raises(WorkbenchError, match="which of those that are left have experts"):
        compress(task, Recipe(wb.Prune(sparsity=0.9, pattern="layers", targets=targets)))
