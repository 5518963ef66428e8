"""Blocks with one kernel where transformers has many: what takes a stand-in, what does not, and that the same
comes out."""

import dataclasses

import pytest
import tiny_tasks
import torch
from tiny_tasks import tiny_task
from torch import nn
from transformers.models.llama import modeling_llama

import workbench as wb
from workbench.compress import compress
from workbench.measure.evaluation.cuda_graphs import counterparts
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.measure.evaluation.fused_blocks import (
    NEAR,
    FusedBlocks,
    FusedGate,
    FusedNorm,
    FusedRotary,
    Operations,
    fused_blocks,
)
from workbench.modules.layer import find_layers

CPU = torch.device("cpu")


@dataclasses.dataclass
class Plain:
    """The operations in plain torch, which counts how often each is used."""

    used: dict[str, int] = dataclasses.field(default_factory=lambda: {"norm": 0, "gated": 0, "rotary": 0})

    def norm(self, x, weight, eps):
        self.used["norm"] += 1
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def gated(self, gate, up):
        self.used["gated"] += 1
        return nn.functional.silu(gate) * up

    def rotary(self, q, k, cos, sin):
        self.used["rotary"] += 1
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)

    def blocks(self):
        return FusedBlocks(Operations(self.norm, self.gated, self.rotary), CPU)


def evaluators(task, plain):
    items = task.evaluation.to(next(task.model.parameters()).device)
    return Evaluator(task, items, fused=plain.blocks()), Evaluator(task, items, fused=False)


# --- which modules are left for stand-ins


def test_every_norm_product_and_rotation_of_a_llama_takes_a_stand_in():
    plain, model = Plain(), tiny_task("llama").model
    fused = plain.blocks().of(model)
    kinds = [type(module) for module in fused.modules()]
    assert [kinds.count(kind) for kind in (FusedNorm, FusedGate, FusedRotary)] == [5, 2, 2]
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with torch.inference_mode():
        ids = torch.arange(12)[None]
        plain.used = dict.fromkeys(plain.used, 0)
        assert torch.equal(fused(input_ids=ids).logits, model(input_ids=ids).logits)
    assert plain.used == {"norm": 5, "gated": 2, "rotary": 2}  # of one run: the model itself used none
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert not any(isinstance(module, FusedNorm | FusedGate | FusedRotary) for module in model.modules())


@pytest.mark.parametrize("sort", ["vit", "resnet", "gpt2", "bert"])
def test_models_of_another_make_are_run_as_they_are(sort):
    model = tiny_task(sort).model
    assert Plain().blocks().of(model) is model


def test_a_norm_that_computes_something_else_is_kept():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    class PlusOneRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return (1 + self.weight) * super().forward(hidden_states)

    blocks = Plain().blocks()
    odd, gemma, fine = PlusOneRMSNorm(16), Gemma2RMSNorm(16), modeling_llama.LlamaRMSNorm(16)
    assert blocks.stand_in(odd) is None
    assert "PlusOneRMSNorm computes something else" in blocks.refused[PlusOneRMSNorm, torch.float32]
    assert blocks.stand_in(gemma) is None
    assert isinstance(blocks.stand_in(fine), FusedNorm)


def test_a_product_with_another_function_or_order_is_kept():
    task = tiny_task("llama")
    mlp = task.model.model.layers[0].mlp
    blocks = Plain().blocks()
    assert isinstance(blocks.stand_in(mlp), FusedGate)

    class Other(type(mlp)):
        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    unlike = Other(task.model.config)
    unlike.requires_grad_(False)
    assert blocks.stand_in(unlike) is None
    mlp.act_fn = nn.GELU()
    assert Plain().blocks().stand_in(mlp) is None


def test_a_module_with_hooks_or_on_another_device_is_kept():
    norm = modeling_llama.LlamaRMSNorm(16)
    assert FusedBlocks(Plain().blocks().operations, torch.device("cuda", 0)).stand_in(norm) is None
    norm.register_forward_hook(lambda *_: None)
    assert Plain().blocks().stand_in(norm) is None


@pytest.mark.parametrize("way", ["forward", "watched function"])
def test_a_module_whose_code_somebody_replaced_is_kept(way):
    plain, mlp = Plain(), tiny_task("llama").model.model.layers[0].mlp
    if way == "forward":
        mlp.forward = lambda x: x
    else:
        mlp.act_fn.register_forward_pre_hook(lambda *_: None)
    assert plain.blocks().stand_in(mlp) is None


def test_layers_of_any_make_are_called_as_they_are():
    plain, task = Plain(), tiny_task("llama")
    mlp = (
        compress(task, wb.Recipe(wb.LowRank(rank_ratio=0.5, targets=("*.gate_proj", "*.up_proj"))))
        .model.model.layers[1]
        .mlp
    )
    fused, x = plain.blocks().stand_in(mlp), torch.randn(2, 5, 16)
    assert type(mlp.gate_proj) is not nn.Linear
    with torch.inference_mode():
        assert torch.equal(fused(x), mlp(x))
    assert plain.used["gated"] == 2  # once tried
    assert fused.gate_proj is mlp.gate_proj


def test_norms_within_an_attention_are_fused_with_it():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model, plain, ids = (
        tiny_tasks.spread(Qwen3ForCausalLM(config).eval().requires_grad_(False)),
        Plain(),
        torch.arange(12)[None],
    )
    fused = plain.blocks().of(model)
    plain.used = dict.fromkeys(plain.used, 0)
    with torch.inference_mode():
        assert torch.equal(fused(input_ids=ids).logits, model(input_ids=ids).logits)
    assert plain.used == {"norm": 9, "gated": 2, "rotary": 2}


def test_weights_that_are_no_numbers_refuse_no_class():
    plain, model = Plain(), tiny_task("llama").model
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    blocks = plain.blocks()
    blocks.of(model)
    assert set(blocks.refused.values()) == {""}


def test_other_dtypes_than_a_norms_own_are_left_to_it():
    plain, norm = Plain(), modeling_llama.LlamaRMSNorm(16)
    fused, x = plain.blocks().stand_in(norm), torch.randn(3, 16)
    plain.used = dict.fromkeys(plain.used, 0)
    with torch.inference_mode():
        assert torch.equal(fused(x.double()), norm(x.double()))
        assert plain.used["norm"] == 0
        assert torch.equal(fused(x), norm(x))
    assert plain.used["norm"] == 1
    fused(x.requires_grad_()).sum().backward()  # a kernel knows no gradients
    assert plain.used["norm"] == 1
    assert x.grad is not None


@pytest.mark.parametrize("name", ["norm", "gated", "rotary"])
def test_a_kernel_that_fails_while_a_model_is_read_gives_way_to_the_models_own_code(name):
    task, plain, calls = tiny_task("llama"), Plain(), []

    def fails(*given):
        calls.append(name)
        if len(calls) > 2:  # the trial goes well, and one call of the model
            raise RuntimeError("out of\n registers")
        return getattr(plain, name)(*given)

    operations = dataclasses.replace(plain.blocks().operations, **{name: fails})
    evaluator = Evaluator(task, task.evaluation, fused=FusedBlocks(operations, CPU))
    own = Evaluator(task, task.evaluation, fused=False)
    for _ in range(2):
        assert torch.equal(evaluator.scores(task.model, [], 48).loss, own.scores(task.model, [], 48).loss)
    assert evaluator.fused.failed == {name: "RuntimeError: out of registers"}
    assert len(calls) == 3


def test_a_kernel_that_fails_is_not_asked_again():
    calls = []

    def broken(*_):
        calls.append(1)
        raise RuntimeError("no compiler here")

    model = tiny_task("llama").model
    blocks = FusedBlocks(Operations(broken, broken, broken), CPU)
    assert blocks.of(model) is model
    assert blocks.of(model) is model
    assert len(calls) == 3  # one a class
    assert set(blocks.refused.values()) == {"RuntimeError: no compiler here"}


def test_the_file_of_the_model_keeps_its_own_function():
    own = modeling_llama.apply_rotary_pos_emb
    plain, model = Plain(), tiny_task("llama").model
    fused = plain.blocks().of(model)
    with torch.inference_mode():
        fused(input_ids=torch.arange(5)[None])
    assert modeling_llama.apply_rotary_pos_emb is own
    with torch.enable_grad():
        used = dict(plain.used)
        fused(input_ids=torch.arange(5)[None])
        assert (
            plain.used["rotary"] == used["rotary"]
        )  # where gradients are asked for, the model's own is used


def test_without_a_gpu_nothing_is_fused():
    assert fused_blocks(CPU) is None
    task = tiny_task("llama")
    evaluator = Evaluator(task, task.evaluation)
    assert evaluator.fuse(task.model) is task.model


# --- the evaluator with and without

RECIPES = {
    "dense": wb.Recipe(),
    "sparse": wb.Recipe(wb.Prune(sparsity=0.5)),
    "rank": wb.Recipe(wb.LowRank(rank_ratio=0.5)),
    "bits": wb.Recipe(wb.Quantize(weight_bits=4)),
    "inputs": wb.Recipe(wb.Activations()),
    "narrow": wb.Recipe(wb.Prune(sparsity=0.5, pattern="neurons")),
    "short": wb.Recipe(wb.Prune(sparsity=0.5, pattern="layers")),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("sort", ["llama", "untied"])
def test_scores_are_the_same_with_and_without(sort, recipe):
    task, plain = tiny_task(sort), Plain()
    model = compress(task, recipe, shared=True).model
    fused, own = evaluators(task, plain)
    for part in ("loss", "answers"):
        assert torch.equal(
            getattr(fused.scores(model, [], 48), part), getattr(own.scores(model, [], 48), part)
        )
    assert min(plain.used.values()) > 0
    assert (counterparts(task.model, model) is not None) is (
        recipe.label() in {"dense", "50% sparse", "W4"}
    )  # stand-ins never get into the models themselves


def test_known_blocks_are_left_out_with_fused_ones():
    task, plain = tiny_tasks.tiny_task("llama", model=tiny_tasks.spread(deep())), Plain()
    name = next(name for name in find_layers(task.model)[0] if ".layers.3." in name)
    model = compress(task, wb.Recipe(wb.Prune(sparsity=0.5, targets=(name,))), shared=True).model
    fused, own = evaluators(task, plain)
    first = fused.scores(model, [], 48)
    assert fused.unchanged_blocks(model) == 3
    plain.used = dict.fromkeys(plain.used, 0)
    again = fused.scores(model, [], 48)
    assert plain.used["gated"] == len(
        list(task.evaluation.batches(task.batch_size))
    )  # of the fourth block alone
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(again.loss, own.scores(model, [], 48).loss)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu_evaluation_agrees_with_that_of_the_models_own_code(graphs, dtype):
    task = tiny_task("untied", "cuda", dtype)
    items = task.evaluation.to("cuda")
    ours, own = Evaluator(task, items, graphs=graphs), Evaluator(task, items, graphs=graphs, fused=False)
    for recipe in RECIPES.values():
        model = compress(task, recipe, shared=True).model
        scores, expected = ours.scores(model, [], 48), own.scores(model, [], 48)
        assert torch.allclose(scores.loss, expected.loss, rtol=1e-4 if dtype == torch.float32 else 3e-2), (
            recipe
        )
        assert (scores.answers == expected.answers).double().mean() > (
            0.99 if dtype == torch.float32 else 0.9
        )
    assert set(ours.fused.refused.values()) == {""}
    assert len(ours.fused.refused) == 3
    assert ours.fused.failed == {}


@pytest.mark.gpu
def test_on_a_gpu_fused_blocks_that_are_left_out_change_no_bit():
    task = tiny_tasks.tiny_task("llama", "cuda", torch.bfloat16, model=tiny_tasks.spread(deep()))
    items = task.evaluation.to("cuda")
    kept, whole = Evaluator(task, items, graphs=False), Evaluator(task, items, graphs=False, budget=0)
    for name in (name for name in find_layers(task.model)[0] if "up_proj" in name):
        model = compress(task, wb.Recipe(wb.Prune(sparsity=0.5, targets=(name,))), shared=True).model
        expected = whole.scores(model, [], 48)
        assert all(torch.equal(kept.scores(model, [], 48).loss, expected.loss) for _ in range(2))
    assert kept.prefix.kept.nbytes > 0


def test_models_that_are_moved_about_are_run_as_they_are(monkeypatch):
    plain = Plain()
    monkeypatch.setattr("workbench.measure.evaluation.evaluator.fused_blocks", lambda _: plain.blocks())
    task = tiny_task("llama")
    assert Evaluator(task, task.evaluation).fuse(task.model) is not task.model
    task.model.spread_over = (CPU, CPU)
    assert Evaluator(task, task.evaluation).fuse(task.model) is task.model
    assert Evaluator(tiny_task("vit"), task.evaluation).fuse(task.model) is task.model


def deep():
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
    return LlamaForCausalLM(config)
