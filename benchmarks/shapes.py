"""Llamas of given sizes with random weights and tokens: times depend on shapes, not on values."""

from __future__ import annotations

from functools import partial

import torch

from workbench.tasks.base import Task
from workbench.tasks.language_modelling import LANGUAGE_MODELLING, window_items

SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary, tied
    "tiny": (64, 2, 4, 2, 128, 512, True),
    "wide-128": (128, 4, 4, 4, 352, 2048, True),
    "wide-256": (256, 4, 4, 4, 704, 2048, True),
    "wide-512": (512, 4, 8, 8, 1408, 2048, True),
    "wide-1024": (1024, 4, 16, 16, 2816, 2048, True),
    "135m": (576, 30, 9, 3, 1536, 49152, True),
    "1.1b": (2048, 22, 32, 4, 5632, 32000, False),
    "6.7b": (4096, 32, 32, 32, 11008, 32000, False),
    "6.7b-8-layers": (4096, 8, 32, 32, 11008, 32000, False),
}


def random_llama(shape: str, device: torch.device) -> torch.nn.Module:
    """Return a Llama with random weights, bfloat16 on a GPU and float32 elsewhere, made in that type: 6.7B
    never takes 27 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, shared, middle, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        intermediate_size=middle,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def random_task(shape: str, device: torch.device, context: int, windows: int) -> Task:
    """Return a language-modelling task of random tokens."""
    model = random_llama(shape, device)
    draw = partial(torch.randint, SHAPES[shape][5], generator=torch.Generator().manual_seed(1))
    sets = [window_items(draw((count, context))) for count in (windows, 16, 16)]
    return Task(
        LANGUAGE_MODELLING,
        model,
        f"llama-{shape}-random",
        f"llama-{shape}-random",
        "random tokens",
        *sets,
        batch_size=16,
    )
