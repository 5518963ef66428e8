"""Tiny models of every architecture whose structure is removed, and the dense model with the same units
masked."""

from __future__ import annotations

import copy

import torch
from tiny_tasks import MODELS, VOCABULARY, spread, tiny_task
from torch import nn


def grouped_llama(heads: int = 4, shared: int = 2, layers: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            max_position_embeddings=64,
            attention_bias=True,
            pad_token_id=0,
        )
    )


def scaled_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=1,
        scale_attn_by_inverse_layer_idx=True,
    )
    return GPT2LMHeadModel(config)


def bottleneck() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            layer_type="bottleneck",
            num_labels=4,
        )
    )


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=16,
        num_labels=4,
    )
    return DistilBertForSequenceClassification(config)


BUILDERS = {
    **MODELS,
    "grouped": grouped_llama,
    "scaled": scaled_gpt2,
    "bottleneck": bottleneck,
    "distilbert": distilbert,
}
SORT_OF = {"grouped": "llama", "scaled": "gpt2", "bottleneck": "resnet", "distilbert": "bert"}
ALL = {
    "grouped": ("heads", "neurons", "layers"),
    "scaled": ("heads", "neurons", "layers"),
    "vit": ("layers", "neurons", "heads"),
    "distilbert": ("heads", "neurons", "layers"),
    "bert": ("heads", "neurons"),
    "resnet": ("channels", "layers"),
    "bottleneck": ("channels", "layers"),
}


def task_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return tiny_task(SORT_OF.get(name, name), device, dtype, model=spread(BUILDERS[name]()))


def logits(task, model):
    with torch.no_grad():
        return task.kind.logits(model, task.evaluation.to(next(model.parameters()).device)).float()


def masked(task, compressed) -> nn.Module:
    """Return the dense model with every removed input set to zero where it is read: a removed unit that
    nobody hears."""
    model = copy.deepcopy(task.model)
    for layer in compressed.layers:
        weight = model.get_submodule(layer.origin).weight.data
        if layer.columns is not None:
            matrix = layer.as_matrix(weight)
            gone = [i for i in range(matrix.shape[1]) if i not in set(layer.columns.tolist())]
            matrix[:, gone] = 0
    return model
