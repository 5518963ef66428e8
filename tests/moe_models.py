"""Tiny models with experts, of random weights, each as its own architecture stores and routes them."""

from __future__ import annotations

import torch
from tiny_tasks import KINDS, MODELS, VOCABULARY, tiny_task

from workbench.tasks.base import Task
from workbench.tasks.language_modelling import LANGUAGE_MODELLING

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
EXPERTS = 4
LATENT = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 12,
    "n_routed_experts": 2 * EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
CONFIGS = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen3Moe": {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8},
    "GptOss": {"num_local_experts": EXPERTS, "head_dim": 8, "sliding_window": 8},
    "DeepseekV3": LATENT,
    "Olmoe": {"num_experts": EXPERTS},
}
MORE = {
    "Qwen2Moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
    },
    "Phimoe": {"num_local_experts": EXPERTS},
    "Llama4": {"num_local_experts": EXPERTS, "head_dim": 8, "intermediate_size_mlp": 24},
    "GraniteMoe": {"num_local_experts": EXPERTS},
    "JetMoe": {"num_local_experts": EXPERTS, "kv_channels": 8},
    "DeepseekV2": LATENT | {"topk_method": "greedy"},
}


def moe_model(name: str, **more: int) -> torch.nn.Module:
    """Return a random model of one architecture, as transformers makes it: its experts are fused."""
    import transformers

    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")
    settings = BASE | (CONFIGS | MORE)[name] | more
    if name == "JetMoe":
        settings = {key: value for key, value in settings.items() if key != "num_attention_heads"}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                size = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / size**0.5)
    return model.eval().requires_grad_(False)


def moe_task(name: str, model: torch.nn.Module | None = None) -> Task:
    """Return a task of a model with experts: its experts are layers."""
    KINDS[name] = LANGUAGE_MODELLING
    MODELS[name] = lambda: moe_model(name)
    return tiny_task(name, model=moe_model(name) if model is None else model)


def fused_forward(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers' own model, its experts run one by one."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return model(ids, use_cache=False).logits
