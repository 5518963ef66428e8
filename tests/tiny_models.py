"""Models of a few kilobytes, made on the fly, saved as any other transformers folder."""

from __future__ import annotations

from pathlib import Path

import torch

VOCABULARY = 64


def tokenizer_files(folder: Path) -> None:
    """Write a tokenizer of words `w0` ... with padding and end-of-text tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(VOCABULARY - 3))]
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",  # noqa: S106
        pad_token="[PAD]",  # noqa: S106
        eos_token="[EOS]",  # noqa: S106
    ).save_pretrained(folder)


def llama(folder: Path, **options) -> Path:
    """Save a tiny causal language model with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder, **options)
    tokenizer_files(folder)
    return folder


def bert(folder: Path) -> Path:
    """Save a tiny text classifier of two classes with a tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer_files(folder)
    return folder


def distilbert(folder: Path) -> Path:
    """Save a tiny text classifier whose forward takes no token types."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=40
    )
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer_files(folder)
    return folder


def vit(folder: Path, size: int = 8) -> Path:
    """Save a tiny image classifier of two classes, without a preprocessor file."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=size,
        patch_size=4,
        num_channels=3,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def words_file(path: Path, lines: int = 400) -> Path:
    """Write running text that the tokenizer knows; no two windows are alike."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(VOCABULARY - 3, (lines, 10), generator=generator).tolist()
    path.write_text("\n".join(" ".join(f"w{i}" for i in row) for row in draws))
    return path
