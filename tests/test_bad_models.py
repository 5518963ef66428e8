"""Models that must not be loaded: each is refused with one line that says what is wrong and what would
work."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from workbench.errors import DataError, DeviceError, ModelError
from workbench.zoo import load_task, local


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("made") / "llama")


@pytest.fixture
def model(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    return tiny_models.words_file(tmp_path / "text.txt")


def refused(model, text, message, error=ModelError, **options):
    with pytest.raises(error, match=message) as caught:
        load_task(model, text, context=16, progress=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(model, **values):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def rewrite(model, edit):
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_the_model_is_fine_untouched(model, text):
    assert load_task(model, text, context=16, progress=False).kind.name == "language modelling"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion-vt", "unknown model 'fashion-vt'; nearest: fashion-vit"),
        ("smollm", "unknown model 'smollm'; nearest: smollm2-135m"),
        (
            "zzzz",
            (
                "unknown model 'zzzz'; known: fashion-vit, fashion-cnn, smollm2-135m, all-MiniLM-L6-v2,"
                " whisper-tiny.en, whisper-base; or give a local folder, or a hub id"
            ),
        ),
        ("./not/here", "unknown model './not/here'"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ModelError, match=message):
        load_task(name)


def test_no_config(model, text):
    (model / "config.json").unlink()
    refused(model, text, r"has no config.json \(there: .*model.safetensors")


def test_a_config_that_is_no_json(model, text):
    (model / "config.json").write_text("{")
    refused(model, text, "config.json is not a JSON object")


def test_a_file_instead_of_a_folder(model, text):
    refused(model / "model.safetensors", text, "is a file; give the folder")


def test_remote_code(model, text):
    change(model, model_type="my_own", auto_map={"AutoModelForCausalLM": "modeling_my_own.Mine"})
    (model / "modeling_my_own.py").write_text("raise SystemExit('remote code ran')")
    refused(
        model,
        text,
        r"needs remote code \(auto_map in config.json, model type 'my_own'\); the workbench never runs it",
    )


def test_remote_code_with_a_native_class_is_not_run(model, text):
    change(model, auto_map={"AutoModelForCausalLM": "modeling_my_own.Mine"})
    (model / "modeling_my_own.py").write_text("raise SystemExit('remote code ran')")
    assert type(load_task(model, text, context=16, progress=False).model).__name__ == "LlamaForCausalLM"


def test_an_unknown_model_type(model, text):
    change(model, model_type="my_own")
    refused(model, text, "model type 'my_own' is unknown to the installed transformers")


def test_quantised_already(model, text):
    change(model, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(model, text, r"is quantised already \(by gptq\); give the original weights")


def test_an_adapter(model, text):
    (model / "adapter_config.json").write_text("{}")
    refused(model, text, r"holds an adapter \(adapter_config.json\); merge it into its base model")


def test_a_task_that_the_workbench_does_not_run(model, text):
    change(model, architectures=["LlamaForTokenClassification"])
    refused(model, text, "LlamaForTokenClassification is for a task that the workbench does not run")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.pt", "last.ckpt"])
def test_a_pickle_is_refused_and_never_opened(model, text, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    said = refused(
        model, text, rf"only as a pickle \({name}\), which can run code when loaded, so it is refused"
    )
    assert "AutoModelForCausalLM.from_pretrained" in said
    assert "save_pretrained" in said
    assert not (model / "ran").exists()


def test_no_weights(model, text):
    (model / "model.safetensors").unlink()
    refused(model, text, "holds no weights: model.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 0.5, -1])
def test_truncated_weights(model, text, kept):
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    refused(model, text, "model.safetensors is damaged or truncated")


def test_a_missing_part(tmp_path, text):
    model = tiny_models.llama(tmp_path / "parts", max_shard_size="10KB")
    assert load_task(model, text, context=16, progress=False).model_name == str(model)
    part = min(model.glob("model-*.safetensors"))
    part.unlink()
    refused(model, text, f"is incomplete: {part.name} is missing")
    (model / "model.safetensors.index.json").write_text("[]")
    refused(model, text, "is not an index of safetensors files")


def test_missing_weights_are_never_random(model, text):
    rewrite(model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(
        model,
        text,
        "lacks 1 weights of the model, the first is 'model.layers.1.mlp.up_proj.weight': they would be random"
        " numbers",
    )


def test_a_body_without_the_head_of_the_task(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "headless")
    change(model, architectures=["LlamaForSequenceClassification"])
    (tmp_path / "d.csv").write_text("text,label\n" + "\n".join(f"w{i},{i % 2}" for i in range(9)))
    refused(
        model,
        tmp_path / "d.csv",
        "lacks 1 weights of the model, the first is 'score.weight'.*was it trained for text classification",
    )


def test_weights_of_another_shape(model, text):
    rewrite(model, lambda weights: weights.update({"model.norm.weight": torch.ones(17)}))
    refused(model, text, r"weight 'model.norm.weight' has shape \[17\] in the file, \[16\] by config.json")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model, text, bad):
    rewrite(model, lambda weights: weights["model.layers.0.mlp.up_proj.weight"].view(-1)[:3].fill_(bad))
    refused(model, text, "weight 'model.layers.0.mlp.up_proj.weight' has 3 values that are NaN or infinite")


def test_no_tokenizer(model, text):
    for path in model.glob("token*"):
        path.unlink()
    refused(model, text, "has no tokenizer")


def test_a_broken_tokenizer(model, text):
    (model / "tokenizer.json").write_text("{}")
    refused(model, text, "its tokenizer cannot be loaded")


def test_bad_dtype_and_device(model, text):
    refused(model, text, "dtype='int8' is not one that a model can be loaded in; use float32", dtype="int8")
    if not torch.cuda.is_available():
        refused(
            model, text, "device 'cuda' is not here: torch", error=DeviceError, device="cuda", dtype="float32"
        )


def test_a_classifier_without_data_is_told_to_name_some(tmp_path):
    with pytest.raises(
        DataError, match=r"does text classification: name the data to measure it on \(data=...\)"
    ):
        load_task(tiny_models.bert(tmp_path / "bert"))


def test_data_of_another_task(tmp_path):
    model = tiny_models.vit(tmp_path / "vit")
    (tmp_path / "d.csv").write_text("text,label\n" + "\n".join(f"w{i},{i % 2}" for i in range(9)))
    refused(model, tmp_path / "d.csv", "columns text, label, none of them images", error=DataError)
    refused(model, "fashion-mnist-slice", "grey images of 28x28 in 10 classes", error=DataError)


def test_checks_read_config_before_weights(model):
    change(model, quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match="quantised already"):
        local.read_config(model)
