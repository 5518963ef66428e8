"""The KV cache in a few bits: the numbers against loops, the bytes against the tensors, and generation
against one pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.bench import Bench
from workbench.compress import compress
from workbench.compress.quantization.kv_cache import cache_format_of, pack_layers, packed_cache
from workbench.errors import CompressionError, RecipeError
from workbench.export import load
from workbench.formats.bit_packing import pack
from workbench.formats.kv_cache import CacheFormat
from workbench.measure.kv_cache import cache_bytes
from workbench.measure.measurement import Measurement
from workbench.measure.summary import summary
from workbench.recipe import Recipe
from workbench.sensitivity import layers_of

CAUSAL = ("llama", "gpt2")


@pytest.fixture(params=CAUSAL)
def sort(request: pytest.FixtureRequest) -> str:
    return request.param


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def logits(task, model, items=None) -> torch.Tensor:
    with torch.no_grad():
        return task.kind.logits(model, (items or task.evaluation).to(next(model.parameters()).device))


def by_hand(values: list[float], bits: int) -> list[float]:
    """Return the rounded numbers of one group in Python floats.

    Only the scale is rounded to float16, as it is stored.
    """
    most = 2**bits - 1
    low, high = min(0.0, *values), max(0.0, *values)
    scale = float(torch.tensor((high - low) / most, dtype=torch.float16)) or 1.0
    zero = min(max(round(-low / scale), 0), most)
    return [(min(max(round(value / scale) + zero, 0), most) - zero) * scale for value in values]


# --- numbers and bytes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("head", "group"), [(16, 0), (16, 8), (12, 4), (10, 0)])
def test_rounding_is_what_a_loop_makes_and_bytes_are_real(bits, head, group, device):
    form, values = CacheFormat(bits, group), noise(2, 3, 5, head)
    rows = form.encode(values.to(device))
    assert rows.dtype == torch.uint8
    assert rows.shape == (2, 3, 5, form.row_bytes(head))
    assert form.row_bytes(head) == math.ceil(head / 8) * bits + 3 * (head // (group or head))
    expected = torch.tensor(
        [by_hand(part, bits) for part in values.view(-1, group or head).tolist()]
    ).view_as(values)
    assert torch.allclose(form.decode(rows, head).cpu(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 2**31))
def test_codes_are_packed_as_weights_are_and_come_back(bits, head, seed):
    form = CacheFormat(bits)
    codes = torch.randint(
        1 << bits, (3, head), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    rows = form.packed(codes)
    assert torch.equal(form.unpacked(rows, head), codes)
    padded = torch.nn.functional.pad(codes, (0, -head % 8))
    assert torch.equal(rows.flatten(), pack(padded, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_stay_zero_and_bad_numbers_show(bits):
    form = CacheFormat(bits)
    assert (form.decode(form.encode(torch.zeros(2, 16)), 16) == 0).all()
    tiny = form.decode(form.encode(torch.full((1, 16), 1e-30)), 16)
    assert float(tiny.abs().max()) < 1e-6
    assert torch.isfinite(form.decode(form.encode(torch.full((1, 16), 1e9)), 16)).all()
    for bad in (math.inf, -math.inf, math.nan):
        values = torch.zeros(2, 16)
        values[1, 3] = bad
        decoded = form.decode(form.encode(values), 16)
        assert torch.isfinite(decoded[0]).all()
        assert decoded[1].isnan().any()


def test_more_bits_and_smaller_groups_are_closer():
    values = noise(64, 32)
    errors = [
        float((CacheFormat(bits).decode(CacheFormat(bits).encode(values), 32) - values).norm())
        for bits in (2, 3, 4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    grouped = [
        float((CacheFormat(3, size).decode(CacheFormat(3, size).encode(values), 32) - values).norm())
        for size in (0, 16, 8, 4)
    ]
    assert grouped == sorted(grouped, reverse=True)


# --- in a model


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_attention_reads_rounded_keys_and_values_everywhere(sort, bits, device):
    """An independent path: the same rounding put into transformers' own cache, one layer's update at a
    time."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Rounded(DynamicLayer):
        def update(self, key_states, value_states, *args, **named):
            form = CacheFormat(bits)
            rounded = [
                form.decode(form.encode(states), states.shape[-1]).to(states.dtype)
                for states in (key_states, value_states)
            ]
            return super().update(*rounded, *args, **named)

    task = tiny_task(sort, device)
    compressed = compress(task, Recipe(wb.KVCache(kv_bits=bits)))
    cache = DynamicCache(config=task.model.config)
    cache.layers = [Rounded() for _ in cache.layers]
    with torch.no_grad():
        expected = task.model(
            **task.evaluation.to(device).inputs, past_key_values=cache, use_cache=True
        ).logits[:, :-1]
    assert torch.equal(logits(task, compressed.model), expected)
    assert not torch.equal(expected, logits(task, task.model))


def test_the_given_model_and_all_weights_stay(task):
    before, dense = weights(task.model), logits(task, task.model)
    compressed = compress(task, Recipe(wb.KVCache(kv_bits=2)))
    assert same(weights(task.model), before)
    assert same(weights(compressed.model), before)
    assert torch.equal(logits(task, task.model), dense)
    assert cache_format_of(task.model) is None
    assert cache_format_of(compressed.model) == CacheFormat(2)
    assert all(row.relative_error in (None, 0) for row in compressed.report)


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_one_by_one_see_what_a_whole_window_sees(sort, bits):
    task = tiny_task(sort)
    model = compress(task, Recipe(wb.KVCache(kv_bits=bits))).model
    ids = task.evaluation.inputs["input_ids"][:2]
    whole = model(input_ids=ids).logits
    cache, steps = packed_cache(model, CacheFormat(bits)), []
    for place in range(ids.shape[1]):
        out = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        steps.append(out.logits)
    assert torch.allclose(
        torch.cat(steps, 1), whole, atol=2e-2 if bits == 4 else 1e-3
    )  # a rounding may fall the other way by float noise


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "samples"],
)
def test_generation_goes_through_the_packed_cache(sort, options):
    from workbench.modules.kv_cache import packed_layer

    task = tiny_task(sort)
    model = compress(task, Recipe(wb.KVCache(kv_bits=8))).model
    ids = task.evaluation.inputs["input_ids"][:2, :5]
    torch.manual_seed(0)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        **options,
    )
    layers = out.past_key_values.layers
    assert all(isinstance(layer, packed_layer()) and layer.keys.dtype == torch.uint8 for layer in layers)
    assert layers[0].get_seq_length() == 10  # the last token is never read


def test_greedy_text_is_that_of_rounding_without_any_cache(sort):
    """Each next token recomputed from the whole window, which the hook rounds afresh."""
    task = tiny_task(sort)
    model = compress(task, Recipe(wb.KVCache(kv_bits=8))).model
    ids = task.evaluation.inputs["input_ids"][:1, :4]
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    grown = ids
    for _ in range(6):
        with torch.no_grad():
            grown = torch.cat([grown, model(input_ids=grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, grown)


def test_bytes_are_those_of_the_tensors_and_of_the_formula(sort):
    task = tiny_task(sort)
    window = task.evaluation[:1]
    tokens, config = window.inputs["input_ids"].shape[1], task.model.config
    heads, head = (1, 8) if sort == "llama" else (2, 8)
    layers = config.num_hidden_layers
    assert cache_bytes(task.model, window) == 2 * layers * heads * tokens * head * 4
    for bits, group in ((4, 0), (8, 0), (3, 4)):
        model = compress(task, Recipe(wb.KVCache(kv_bits=bits, kv_group_size=group))).model
        assert cache_bytes(model, window) == 2 * layers * heads * tokens * (
            head * bits // 8 + 3 * (head // (group or head))
        )


def test_a_point_says_them_and_keeps_them(tmp_path):
    task = tiny_task("llama")
    bench = Bench(task, ledger=tmp_path / "points", progress=False)
    point = bench.measure(Recipe(wb.KVCache(kv_bits=4)))
    assert (point.cache.context, point.cache.dense, point.cache.compressed) == (8, 1024, 2 * 2 * 8 * 7)
    assert Measurement.from_json(point.to_json()) == point
    assert bench.ledger.find(point.key) == point
    assert ("keys and values kept of 8 tokens, bytes", "1,024", "224 (4.57x smaller)") in summary(point)
    plain = bench.measure(Recipe(wb.Quantize(weight_bits=8)))
    assert plain.cache.compressed == plain.cache.dense == 1024


def test_points_measured_before_there_was_a_cache_still_load(tmp_path):
    import json

    point = Bench(tiny_task("vit"), ledger=tmp_path / "points", progress=False).measure(
        Recipe(wb.Quantize(weight_bits=8))
    )
    assert point.cache is None
    old = json.loads(point.to_json())
    del old["cache"]
    assert Measurement.from_json(json.dumps(old)) == point


def test_fewer_heads_keep_less(tmp_path):
    task = tiny_task("gpt2")
    point = Bench(task, ledger=tmp_path / "points", progress=False).measure(
        Recipe(wb.Prune(sparsity=0.5, pattern="heads"), wb.KVCache(kv_bits=8))
    )
    assert point.cache.compressed == 2 * 2 * 1 * 8 * (8 + 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_goes_with_every_other_step_and_the_export_gives_the_same_bits(sort, dtype, tmp_path):
    task = tiny_task(sort, dtype=dtype)
    recipe = Recipe(
        wb.LowRank(rank_ratio=0.45),
        wb.Prune(sparsity=0.3),
        wb.Activations(activation_bits=8, smoothing=0.5),
        wb.Quantize(weight_bits=8),
        wb.KVCache(kv_bits=5, kv_group_size=4),
        wb.Distill(temperature=2, steps=2, distill_batch=8),
    )
    bench = Bench(task, ledger=tmp_path / "points", progress=False)
    compressed = bench.compress(recipe).model
    loaded = load(bench.export(recipe, tmp_path / "out"))
    assert cache_format_of(loaded) == CacheFormat(5, 4)
    assert torch.equal(logits(task, loaded), logits(task, compressed))
    assert torch.equal(logits(task, copy.deepcopy(loaded)), logits(task, compressed))


def test_training_learns_through_it():
    task = tiny_task("llama")
    compressed = compress(
        task,
        Recipe(
            wb.KVCache(kv_bits=2),
            wb.Distill(temperature=2, alpha=1, steps=40, learning_rate=5e-3, look_every=0),
        ),
    )
    losses = [loss for _, loss in compressed.curve]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    before, after = weights(task.model), weights(compressed.model)
    assert all(
        not torch.equal(before[name], after[name]) for name in before if "k_proj" in name or "v_proj" in name
    )


def test_it_is_left_out_of_the_sensitivity_of_layers():
    task = tiny_task("llama")
    by_layer = layers_of(task.model, Recipe(wb.Quantize(weight_bits=4), wb.KVCache(kv_bits=4)))
    assert by_layer
    assert all([step.kind() for step in layer_recipe] == ["quantize"] for layer_recipe in by_layer.values())


# --- bad input


@pytest.mark.parametrize("sort", ["vit", "resnet", "bert"])
def test_models_without_a_cache_are_refused(sort):
    with pytest.raises(
        CompressionError,
        match=(
            rf"KVCache\(kv_bits=4\): tiny-{sort} does (image|text) classification; only language models keep"
            r" keys and values"
        ),
    ):
        compress(tiny_task(sort), Recipe(wb.KVCache(kv_bits=4)))


def test_a_language_model_that_takes_no_cache_is_refused():
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(64, 8)
            self.head = torch.nn.Linear(8, 64)

        def forward(self, input_ids, use_cache=False):
            raise AssertionError

    task = tiny_task("llama", model=Plain())
    with pytest.raises(CompressionError, match=r"KVCache\(kv_bits=8\): Plain takes no transformers cache"):
        compress(task, Recipe(wb.KVCache()))


def windowed(cls: str, layers: int = 2, name: str = "", **options):
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, name or f"{cls}Config")(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        **options,
    )
    return getattr(transformers, f"{cls}ForCausalLM")(config)


def test_nothing_but_sliding_windows_is_refused_by_name():
    with pytest.raises(
        CompressionError,
        match=r"MistralForCausalLM keeps a sliding window of 4 tokens in 2 layers, nothing that grows",
    ):
        compress(tiny_task("llama", model=windowed("Mistral")), Recipe(wb.KVCache()))


@pytest.mark.parametrize(
    ("cls", "options", "window"),
    [
        ("Gemma2", {}, 1),
        ("Gemma3", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}, 2),
        ("Cohere2", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, 1),
    ],
)
def test_layers_that_see_all_tokens_are_rounded_and_windows_stay(cls, options, window):
    name = "Gemma3TextConfig" if cls == "Gemma3" else f"{cls}Config"
    model = windowed(cls, len(options.get("layer_types", "12")), name, **options)
    task = tiny_task("llama", model=model)
    compressed = compress(task, Recipe(wb.KVCache(kv_bits=3)))
    full = len(model.config.layer_types) - window
    said = [warning for warning in compressed.warnings if "sliding window of 4 tokens" in warning]
    assert f"rounded in {full} of {full + window} layers" in said[0]
    window_item = task.evaluation[:1]
    assert not torch.equal(logits(task, compressed.model, window_item), logits(task, task.model, window_item))
    tokens, head = window_item.inputs["input_ids"].shape[1], 8
    dense = cache_bytes(task.model, window_item)
    assert dense == 2 * 4 * head * (full * tokens + window * 3)  # transformers keeps window - 1 tokens
    rows = CacheFormat(3).row_bytes(head)
    assert cache_bytes(compressed.model, window_item) == 2 * (full * tokens * rows + window * 3 * 4 * head)


def test_states_of_fixed_size_stay_and_attention_is_rounded():
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(2)
    config = JambaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=9,
        expert_layer_offset=8,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=2,
    )
    task = tiny_task("llama", model=JambaForCausalLM(config))
    compressed = compress(task, Recipe(wb.KVCache(kv_bits=4)))
    said = [warning for warning in compressed.warnings if "a state of fixed size in 1 layer" in warning]
    assert "rounded in 1 of 2 layers" in said[0]
    item = task.evaluation[:1]
    tokens = item.inputs["input_ids"].shape[1]
    assert cache_bytes(task.model, item) == 2 * 4 * 8 * tokens
    assert cache_bytes(compressed.model, item) == 2 * CacheFormat(4).row_bytes(8) * tokens


def test_groups_that_do_not_divide_a_head_are_refused_with_what_would_work():
    with pytest.raises(
        CompressionError,
        match=(
            r"KVCache\(kv_bits=8, kv_group_size=3\): groups of 3 do not divide a head of 8 numbers: take 0"
            r" for the whole head"
        ),
    ):
        compress(tiny_task("llama"), Recipe(wb.KVCache(kv_group_size=3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 1}, r"KVCache\(kv_bits=1\) is refused: input should be greater than or equal to 2"),
        ({"kv_bits": 9}, r"KVCache\(kv_bits=9\) is refused"),
        (
            {"targets": ("*k_proj",)},
            r"targets=\('\*k_proj',\) name weights, and a cache belongs to none: leave targets out",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        wb.KVCache(**options)


def test_a_second_cache_is_refused():
    with pytest.raises(
        RecipeError, match=r"KVCache\(kv_bits=4\) cannot follow another KVCache: a model has one cache"
    ):
        Recipe(wb.KVCache(), wb.KVCache(kv_bits=4))


def test_a_cache_that_is_in_use_is_refused():
    from transformers import DynamicCache

    task = tiny_task("llama")
    cache = DynamicCache(config=task.model.config)
    task.model(**task.evaluation[:1].inputs, past_key_values=cache)
    with pytest.raises(
        CompressionError,
        match=r"layer 0 of a DynamicCache: its DynamicLayer is in use; give an empty DynamicCache, or none",
    ):
        pack_layers(cache, CacheFormat(4))
