"""Checkpoints that are not what their config.json describes, that are quantized already, or that do not fit
their tokenizer: one line by name and number, or dequantized to the numbers that a loop makes."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from workbench.errors import ModelError
from workbench.measure.size import given_sizes
from workbench.zoo import load_task


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("made") / "llama")


@pytest.fixture
def model(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    return str(tiny_models.words_file(tmp_path / "text.txt"))


def load(model, text, context=16):
    return load_task(model, text, context=context, progress=False)


def refusal(model, text, context=16) -> str:
    with pytest.raises(ModelError) as caught:
        load(model, text, context)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(model, edit):
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change(model, **values):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def linears(weights) -> list[str]:
    return [name for name in weights if name.endswith("_proj.weight")]


# --- tensors that do not fit


def test_scales_beside_the_weights_are_refused_by_name_and_number(model, text):
    def edit(weights):
        for name in linears(weights):
            weights[name] = weights[name].div(0.01).to(torch.float8_e4m3fn)
            weights[f"{name}_scale"] = torch.tensor([0.01])

    rewrite(model, edit)
    said = refusal(model, text)
    assert "holds 14 tensors that LlamaForCausalLM does not take" in said
    assert "'model.layers.0.mlp.down_proj.weight_scale'" in said
    assert "config.json has no quantization_config" in said


def test_an_adapter_that_is_not_merged(model, text):
    def edit(weights):
        name = "model.layers.1.self_attn.q_proj"
        weights[f"{name}.base_layer.weight"] = weights.pop(f"{name}.weight")
        weights[f"{name}.lora_A.default.weight"] = torch.zeros(2, 16)
        weights[f"{name}.lora_B.default.weight"] = torch.zeros(16, 2)

    rewrite(model, edit)
    said = refusal(model, text)
    assert "lacks 1 weights" in said
    assert "holds 3 tensors that it does not take" in said
    assert "merge it into its base model" in said


def test_adapter_weights_beside_whole_ones(model, text):
    rewrite(
        model,
        lambda weights: weights.update({"model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 16)}),
    )
    said = refusal(model, text)
    assert "holds 1 tensor that LlamaForCausalLM does not take" in said
    assert "merge_and_unload" in said


@pytest.mark.parametrize("blocks", [1, 4])
def test_another_number_of_blocks_than_config_says(model, text, blocks):
    change(model, num_hidden_layers=blocks)
    said = refusal(model, text)
    if blocks == 1:
        assert "holds 9 tensors" in said
        assert "config.json describes 1 blocks of 'model.layers', and this is one of block 1" in said
    else:
        assert "lacks 18 weights of the model, the first is 'model.layers.2.input_layernorm.weight'" in said


def test_an_old_gptq_folder(model, text):
    def edit(weights):
        for name in linears(weights):
            rows, columns = weights.pop(name).shape
            stem = name.removesuffix(".weight")
            weights[f"{stem}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
            weights[f"{stem}.qzeros"] = torch.zeros(1, max(1, rows // 8), dtype=torch.int32)
            weights[f"{stem}.scales"] = torch.ones(1, rows, dtype=torch.float16)
            weights[f"{stem}.g_idx"] = torch.zeros(columns, dtype=torch.int32)

    rewrite(model, edit)
    (model / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    said = refusal(model, text)
    assert "lacks 14 weights" in said
    assert "packed by GPTQ or AWQ" in said
    assert "give the original weights" in said


def test_a_head_that_the_class_does_not_have(model, text):
    rewrite(model, lambda weights: weights.update({"value_head.weight": torch.zeros(1, 16)}))
    assert "the first is 'value_head.weight'" in refusal(model, text)


def test_constants_of_older_versions_are_no_weights(model, text):
    rewrite(
        model,
        lambda weights: weights.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.position_ids": torch.arange(64)[None],
            }
        ),
    )
    assert load(model, text).kind.name == "language modelling"


# --- quantized already


@pytest.mark.parametrize(
    ("values", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization_config": {"bits": 4}}, "an unnamed method"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "MLX"),
    ],
)
def test_what_is_never_dequantized_is_refused(model, text, values, method):
    change(model, **values)
    said = refusal(model, text)
    assert f"is quantised already (by {method}); give the original weights" in said


@pytest.mark.parametrize(
    ("values", "package"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_a_package_that_is_missing_is_named(model, text, values, package, monkeypatch):
    import importlib.util

    find_any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == package.replace("-", "_") else find_any(name, *a),
    )
    change(model, quantization_config=values)
    assert f"pip install {package}" in refusal(model, text)


def test_fp8_is_dequantized_and_said_and_counted_as_its_file(model, text):
    pytest.importorskip("accelerate")
    expected: dict[str, torch.Tensor] = {}

    def edit(weights):
        for name in linears(weights):
            rows, columns = weights[name].shape
            scale = 0.001 * torch.arange(1, rows * columns // 64 + 1, dtype=torch.float32).view(
                rows // 8, columns // 8
            )
            codes = (weights[name] / scale.repeat_interleave(8, 0).repeat_interleave(8, 1)).clamp(-400, 400)
            weights[name] = codes.to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
            whole = torch.zeros(rows, columns)
            for row in range(rows):
                for column in range(columns):
                    whole[row, column] = weights[name][row, column].float() * scale[row // 8, column // 8]
            expected[name] = whole

    rewrite(model, edit)
    change(
        model,
        quantization_config={
            "quant_method": "fp8",
            "weight_block_size": [8, 8],
            "activation_scheme": "dynamic",
        },
    )
    task = load(model, text)
    state = task.model.state_dict()
    assert all(torch.equal(state[name], whole) for name, whole in expected.items())
    assert any("quantized already (by fp8) and was dequantized" in note for note in task.notes)
    data = sum(value.nbytes for value in load_file(model / "model.safetensors").values())
    assert given_sizes(task.model).packed_bytes == data
    assert not hasattr(task.model.config, "quantization_config")


# --- one item through the model


def test_a_tokenizer_larger_than_the_embedding(tmp_path, text):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "small")
    tiny_models.tokenizer_files(tmp_path / "small")
    said = refusal(tmp_path / "small", text)
    assert "makes tokens up to number 63, and its embedding has 50 rows, 0 to 49" in said


def test_a_tokenizer_whose_further_tokens_never_occur_is_fine(model, text):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["never"] = 99
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load(model, text).kind.name == "language modelling"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": [7]}, r"architectures=[7]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": None}, "config.json"),
        ({"num_attention_heads": 0}, ""),
        ({"num_key_value_heads": 3}, ""),
        ({"hidden_act": "no such"}, "no such"),
        ({"text_config": 3}, ""),
        ({"model_type": ["llama"]}, "model type ['llama'] is unknown"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, ""),
    ],
)
def test_values_of_config_that_do_not_fit_are_one_line(model, text, values, message):
    change(model, **values)
    assert message in refusal(model, text)


@pytest.mark.parametrize(
    "values", [{"image_size": "large"}, {"image_size": 12}, {"num_channels": 1}, {"patch_size": 3}]
)
def test_pictures_that_do_not_fit_are_one_line(tmp_path, values):
    from PIL import Image

    vit = tiny_models.vit(tmp_path / "vit")
    for number in range(24):
        folder = tmp_path / "pictures" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number * 9, 5, 7)).save(folder / f"{number}.png")
    (vit / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}})
    )
    change(vit, **values)
    assert str(vit) in refusal(vit, str(tmp_path / "pictures"))


@pytest.mark.parametrize("sort", ["absolute", "shifted"])
def test_more_tokens_than_positions_are_one_line_with_the_numbers(tmp_path, sort):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    shifted = 1 if sort == "shifted" else 0
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        pad_token_id=shifted,
    )
    folder = tmp_path / "few"
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tiny_models.tokenizer_files(folder)
    from workbench.tasks.text_classification import TEXT_CLASSIFICATION, text_items
    from workbench.zoo import local
    from workbench.zoo.trial import try_items

    model = local.load_model(folder, TEXT_CLASSIFICATION)
    tokenizer = TEXT_CLASSIFICATION.processor(folder, {})
    fits, over = (text_items(["w1 w2"] * 4, [0, 1, 0, 1], tokenizer, count) for count in (19 - shifted, 20))
    try_items("few", TEXT_CLASSIFICATION, model, [fits])
    with pytest.raises(
        ModelError, match=rf"20 tokens an item, and its table .*position_embeddings' has {19 - shifted}"
    ):
        try_items("few", TEXT_CLASSIFICATION, model, [over])
