"""Small models on which the shortcuts of evaluation are tried where no user's model is at hand: whether the
installed versions of torch and transformers allow them.

Weights are random, a few thousand of them; a trial takes milliseconds once transformers is imported.
"""

from __future__ import annotations

import torch
from torch import nn

from workbench.tasks.base import Items
from workbench.tasks.language_modelling import window_items

VOCABULARY, TOKENS, WINDOWS = 64, 8, 4


def small_llama(device: torch.device) -> tuple[nn.Module, Items]:
    """Return a Llama of two blocks, and windows for it [4, 8], both on a device; no random state is used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    module: nn.Module = model
    return module.to(device).eval().requires_grad_(False), window_items(ids()).to(device)


def small_bert(device: torch.device) -> tuple[nn.Module, Items]:
    """Return a BERT of one block that tells classes, and padded texts for it [4, 8]; as `small_llama`."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2 * TOKENS,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    mask = (torch.arange(2 * TOKENS) < TOKENS).long().expand(WINDOWS, -1).contiguous()
    items = Items(
        {"input_ids": torch.cat([ids(), torch.zeros_like(ids())], 1), "attention_mask": mask},
        torch.zeros(WINDOWS, dtype=torch.long),
    )
    module: nn.Module = model
    return module.to(device).eval().requires_grad_(False), items.to(device)


def ids() -> torch.Tensor:
    """Return tokens, int64 [windows, tokens]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (WINDOWS, TOKENS), generator=generator)
