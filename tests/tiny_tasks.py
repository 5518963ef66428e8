"""Tasks of a few kilobytes, made in memory: one model of each sort of layer, random data, nothing read from
disk."""

from __future__ import annotations

import torch

from workbench.tasks.base import Items, Kind, Task
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION
from workbench.tasks.language_modelling import LANGUAGE_MODELLING, window_items
from workbench.tasks.text_classification import TEXT_CLASSIFICATION

VOCABULARY, CLASSES = 64, 4
SORTS = (
    "vit",
    "resnet",
    "llama",
    "gpt2",
    "mixtral",
)  # Linear; Conv2d; Linear with tied embeddings; Conv1D with tied embeddings; fused experts
EVALUATION, CALIBRATION, TRAINING = 48, 24, 40


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def resnet() -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config)


def llama(*, tied: bool = True) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def mixtral() -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return MixtralForCausalLM(config)


def bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config)


def untied() -> torch.nn.Module:
    return llama(tied=False)


MODELS = {
    "vit": vit,
    "resnet": resnet,
    "llama": llama,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "bert": bert,
    "untied": untied,
}
KINDS: dict[str, Kind] = {
    "vit": IMAGE_CLASSIFICATION,
    "resnet": IMAGE_CLASSIFICATION,
    "llama": LANGUAGE_MODELLING,
    "gpt2": LANGUAGE_MODELLING,
    "mixtral": LANGUAGE_MODELLING,
    "bert": TEXT_CLASSIFICATION,
    "untied": LANGUAGE_MODELLING,
}


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Make random weights large enough to matter: transformers starts from 0.02, which makes every answer the
    same."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
                )
    return model


def items(sort: str, count: int, seed: int) -> Items:
    generator = torch.Generator().manual_seed(seed)
    if sort in {"vit", "resnet"}:
        size = 8 if sort == "vit" else 16
        pixels = torch.randn(count, 1, size, size, generator=generator)
        return Items({"pixel_values": pixels}, torch.randint(CLASSES, (count,), generator=generator))
    ids = torch.randint(VOCABULARY, (count, 8), generator=generator)
    if sort == "bert":
        return Items(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            torch.randint(CLASSES, (count,), generator=generator),
        )
    return window_items(ids)


def tiny_task(
    sort: str = "vit",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    evaluation: int = EVALUATION,
    model: torch.nn.Module | None = None,
) -> Task:
    """Return a task as `load_task` would: the model on its device, the data on the CPU."""
    torch.manual_seed(0)
    placed = spread(MODELS[sort]()) if model is None else model
    placed = placed.to(device).eval().requires_grad_(False)
    for tensor in placed.state_dict(
        keep_vars=True
    ).values():  # as from_pretrained does: rotary frequencies, which no file holds, stay float32
        tensor.data = tensor.data.to(dtype if tensor.is_floating_point() else tensor.dtype)
    return Task(
        kind=KINDS[sort],
        model=placed,
        model_name=f"tiny-{sort}",
        model_fingerprint=f"{sort}-{dtype}",
        data_name="noise",
        evaluation=items(sort, evaluation, 1),
        calibration=items(sort, CALIBRATION, 2),
        training=items(sort, TRAINING, 3),
        batch_size=16,
    )


def vocabulary(model: torch.nn.Module) -> set[str]:
    """Return the names of the modules whose weights belong to the words: Quantize rounds these last."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return {name for name, module in model.named_modules() if id(getattr(module, "weight", None)) in tables}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of everything in the model, to compare with later."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts hold the same names and the same bits."""
    return list(left) == list(right) and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )
