"""Tiny random models of architectures whose attentions, MLPs and blocks go by other names, or are fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_tasks import CLASSES, VOCABULARY, spread, tiny_task
from torch import nn

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PICTURES = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": CLASSES,
}


def made(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a transformers model from options of its configuration."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def language(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a causal language model."""
    return made(f"{name}Config", f"{name}ForCausalLM", **{**SMALL, **options})


def own(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a causal language model whose configuration has words of its own."""
    return made(f"{name}Config", f"{name}ForCausalLM", vocab_size=VOCABULARY, **options)


def texts(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a classifier of texts."""
    return made(
        f"{name}Config", f"{name}ForSequenceClassification", **{**SMALL, "num_labels": CLASSES, **options}
    )


def pictures(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a classifier of pictures."""
    return made(f"{name}Config", f"{name}ForImageClassification", **{**PICTURES, **options})


ARCHITECTURES: dict[str, tuple[str, Callable[[], nn.Module]]] = {  # the sort of task, a builder
    "gptneox": ("llama", language("GPTNeoX")),
    "falcon": ("llama", language("Falcon", new_decoder_architecture=False, multi_query=False, alibi=False)),
    "falcon-mqa": ("llama", language("Falcon", multi_query=True, alibi=False)),
    "falcon-gqa": ("llama", language("Falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False)),
    "bloom": ("llama", own("Bloom", hidden_size=32, n_layer=3, n_head=4)),
    "mpt": ("llama", own("Mpt", d_model=32, n_layers=3, n_heads=4, max_seq_len=64)),
    "phi3": ("llama", language("Phi3", num_key_value_heads=4)),
    "phi3-gqa": ("llama", language("Phi3", num_key_value_heads=2)),
    "modernbert": ("bert", texts("ModernBert", global_attn_every_n_layers=1)),
    "modernbert-mixed": ("bert", texts("ModernBert", num_hidden_layers=6, global_attn_every_n_layers=3)),
    "albert": ("bert", texts("Albert", embedding_size=16, num_hidden_groups=1)),
    "gptj": ("llama", own("GPTJ", n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4)),
    "gptneo": (
        "llama",
        own(
            "GPTNeo",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=48,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
        ),
    ),
    "codegen": ("llama", own("CodeGen", n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4)),
    "bigcode": ("llama", own("GPTBigCode", n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "opt": ("llama", language("OPT", ffn_dim=48, word_embed_proj_dim=32)),
    "olmo2": ("llama", language("Olmo2", num_key_value_heads=4)),
    "gemma2": ("llama", language("Gemma2", num_key_value_heads=2, head_dim=8, num_hidden_layers=4)),
    "qwen2": ("llama", language("Qwen2", num_key_value_heads=2)),
    "mistral": ("llama", language("Mistral", num_key_value_heads=2)),
    "glm": ("llama", language("Glm", num_key_value_heads=2, head_dim=8)),
    "beit": ("vit", pictures("Beit", use_relative_position_bias=True)),
    "dinov2": ("vit", pictures("Dinov2", mlp_ratio=2)),
    "deit": ("vit", pictures("DeiT")),
    "swin": (
        "resnet",
        made(
            "SwinConfig",
            "SwinForImageClassification",
            image_size=16,
            patch_size=2,
            num_channels=1,
            embed_dim=8,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=2,
            num_labels=CLASSES,
        ),
    ),
    "convnext": (
        "resnet",
        made(
            "ConvNextConfig",
            "ConvNextForImageClassification",
            num_channels=1,
            patch_size=2,
            num_stages=2,
            hidden_sizes=[8, 16],
            depths=[2, 3],
            layer_scale_init_value=1.0,
            num_labels=CLASSES,
        ),
    ),
    "mobilevit": (
        "resnet",
        pictures(
            "MobileViT",
            image_size=64,
            patch_size=2,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        ),
    ),
}
SIZES = {"mobilevit": 64}


def arch_task(name: str) -> Any:
    """Return a task of a tiny random model of an architecture."""
    sort, build = ARCHITECTURES[name]
    torch.manual_seed(0)
    task = tiny_task(sort, model=spread(build()))
    task.model.config.architectures = [type(task.model).__name__]  # as every saved configuration says
    if name in SIZES:
        for items in (task.evaluation, task.calibration, task.training):
            pixels = items.inputs["pixel_values"]
            items.inputs["pixel_values"] = nn.functional.interpolate(pixels, size=SIZES[name])
    return task
