"""Architectures of the table: configurations of a few thousand parameters, saved as any folder of the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

WORDS, CLASSES = 61, 4
VOCABULARY = WORDS + 3


@dataclass(frozen=True)
class Architecture:
    """One row of the table: a model type of transformers, its kind of task, and a small configuration."""

    model_type: str
    kind: str  # "language", "text", "image", "whisper" or "ctc"
    sort: str  # what it stands for, in a word
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 32  # of pictures, in pixels a side


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
TEXT = {**SMALL, "num_labels": CLASSES}
IMAGE = {
    "num_labels": CLASSES,
    "num_channels": 3,
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
STAGES = {
    "num_labels": CLASSES,
    "num_channels": 3,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [2, 2],
}
MLA = {  # attention over low-rank keys and values
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
STATE = {"state_size": 8, "time_step_rank": 4, "expand": 2, "conv_kernel": 4}
HYBRID = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
WHISPER = {
    "vocab_size": 47,
    "num_mel_bins": 80,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_target_positions": 64,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WAVES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16],
    "conv_stride": [20, 16],
    "conv_kernel": [20, 16],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layerdrop": 0.0,
    "pad_token_id": 0,
}

ARCHITECTURES = (
    Architecture("llama", "language", "decoder", SMALL),
    Architecture("gpt2", "language", "decoder", GPT),
    Architecture("opt", "language", "decoder", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture("gpt_neox", "language", "decoder", SMALL),
    Architecture(
        "falcon",
        "language",
        "decoder",
        {**{k: v for k, v in SMALL.items() if k != "head_dim"}, "new_decoder_architecture": False},
    ),
    Architecture(
        "bloom",
        "language",
        "decoder",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    ),
    Architecture(
        "mpt", "language", "decoder", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4}
    ),
    Architecture("phi3", "language", "decoder", SMALL),
    Architecture("qwen3", "language", "decoder", SMALL),
    Architecture("mistral", "language", "sliding window", {**SMALL, "sliding_window": 8}),
    Architecture("gemma2", "language", "sliding window", {**SMALL, "sliding_window": 8}),
    Architecture(
        "gemma3_text",
        "language",
        "sliding window",
        {**SMALL, "sliding_window_pattern": 2, "sliding_window": 8},
    ),
    Architecture("mixtral", "language", "experts", {**SMALL, **EXPERTS}),
    Architecture("olmoe", "language", "experts", {**SMALL, **EXPERTS}),
    Architecture("qwen3_moe", "language", "experts", {**SMALL, **EXPERTS}),
    Architecture("gpt_oss", "language", "experts, sliding window", {**SMALL, **EXPERTS, "sliding_window": 8}),
    Architecture("deepseek_v3", "language", "experts", {**SMALL, **EXPERTS, **MLA}),
    Architecture("mamba", "language", "state space", {**SMALL, **STATE}),
    Architecture("jamba", "language", "hybrid, experts", {**SMALL, **EXPERTS, **HYBRID}),
    Architecture("bert", "text", "encoder", TEXT),
    Architecture(
        "distilbert", "text", "encoder", {**TEXT, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}
    ),
    Architecture("modernbert", "text", "encoder", {**TEXT, "cls_token_id": 2, "sep_token_id": 2}),
    Architecture("albert", "text", "encoder", {**TEXT, "embedding_size": 16}),
    Architecture(
        "deberta-v2", "text", "encoder", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    Architecture("vit", "image", "vision", IMAGE),
    Architecture("beit", "image", "vision", {**IMAGE, "use_relative_position_bias": True}),
    Architecture("dinov2", "image", "vision", {**IMAGE, "mlp_ratio": 2}),
    Architecture(
        "swin",
        "image",
        "vision",
        {
            "num_labels": CLASSES,
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    Architecture("convnext", "image", "vision", {**STAGES, "hidden_sizes": [16, 32], "num_stages": 2}),
    Architecture("resnet", "image", "vision", {**STAGES, "layer_type": "basic"}),
    Architecture(
        "mobilenet_v2", "image", "vision", {"num_labels": CLASSES, "depth_multiplier": 0.25, "image_size": 32}
    ),
    Architecture(
        "efficientnet",
        "image",
        "vision",
        {
            "num_labels": CLASSES,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.25,
            "image_size": 32,
            "hidden_dim": 320,
        },
    ),
    Architecture(
        "mobilevit",
        "image",
        "vision",
        {
            "num_labels": CLASSES,
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48],
        },
        64,
    ),
    Architecture("whisper", "whisper", "speech", WHISPER),
    Architecture("wav2vec2", "ctc", "speech", WAVES),
)
CLASSES_OF = {
    "language": "AutoModelForCausalLM",
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
}


def spread(model: nn.Module, seed: int = 5) -> nn.Module:
    """Draw matrices again, large enough to matter: transformers starts from 0.02, and all answers agree."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name and "parametrizations" not in name:
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    draw / (parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]) ** 0.5
                )
    return model


def build(architecture: Architecture) -> nn.Module:
    """Return a model with random weights, float32, on the CPU."""
    import transformers

    config = AutoConfig.for_model(architecture.model_type, **architecture.options)
    torch.manual_seed(0)
    return spread(getattr(transformers, CLASSES_OF[architecture.kind]).from_config(config)).eval()


def save(architecture: Architecture, folder: Path) -> Path:
    """Write the model's folder with what reads its data; return the folder."""
    build(architecture).save_pretrained(folder)
    from benchmarks.architectures import data

    data.PROCESSORS[architecture.kind](folder, architecture.size)
    return folder
