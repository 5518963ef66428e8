"""Speech models of a few kilobytes, and sound to feed them: saved as any other transformers folder, read back
by the zoo."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

WORDS = 40
SPECIAL = {
    "<|endoftext|>": 0,
    "<|startoftranscript|>": 1,
    "<|en|>": 2,
    "<|transcribe|>": 3,
    "<|translate|>": 4,
    "<|startofprev|>": 5,
    "<|notimestamps|>": 6,
}


def word(index: int) -> str:
    """Return the word of a number, one that no normaliser changes: bax, bex, ... nux."""
    return f"{'bdfgklmn'[index // 5]}{'aeiou'[index % 5]}x"


def word_tokenizer():
    """Return a tokenizer of 40 words with Whisper's special tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {**SPECIAL, **{word(i): len(SPECIAL) + i for i in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<|endoftext|>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
    )


def tiny_whisper(seed: int = 0):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=len(SPECIAL) + WORDS,
        num_mel_bins=80,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=64,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    spread(model)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(8)  # what is heard matters
    return model


def spread(model) -> None:
    """Draw large weights: transformers starts from 0.02, which makes every answer the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "parametrizations" not in name:
                parameter.normal_(std=(2 if parameter.ndim == 2 else 1) * parameter[0].numel() ** -0.5)


def whisper(folder: Path, seed: int = 0, **generation) -> Path:
    """Save a tiny Whisper with everything that a folder of the hub has."""
    from transformers import GenerationConfig, WhisperFeatureExtractor

    model = tiny_whisper(seed)
    model.generation_config = GenerationConfig(
        **{
            "decoder_start_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "no_timestamps_token_id": 6,
            "is_multilingual": False,
            "suppress_tokens": [1, 2, 3, 4, 5, 6],
            "begin_suppress_tokens": [0],
            "max_length": 64,
            "return_timestamps": False,
            **generation,
        }
    )
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


def wav2vec2(folder: Path) -> Path:
    """Save a tiny CTC model of letters."""
    import json

    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[16, 16],
        conv_stride=[20, 16],
        conv_kernel=[20, 16],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        pad_token_id=0,
        do_stable_layer_norm=True,
        layerdrop=0.0,
    )
    model = Wav2Vec2ForCTC(config)
    spread(model)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


def sounds(
    folder: Path, texts: list[str], rate: int = 16_000, seconds: float = 0.5, channels: int = 1
) -> Path:
    """Write one tone in noise for each text, and metadata.csv."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, text in enumerate(texts):
        noise = np.random.default_rng(index).normal(0, 0.02, (int(rate * seconds), channels))
        tone = 0.5 * np.sin(2 * np.pi * (150 + 130 * index) * np.arange(len(noise)) / rate)[:, None]
        soundfile.write(folder / f"{index}.wav", (noise + tone).astype(np.float32), rate)
        rows.append((f"{index}.wav", text))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "transcription"), *rows])
    return folder


def words(count: int, length: int = 4) -> list[str]:
    """Return texts of words that the tokenizer knows, no two alike."""
    draws = np.random.default_rng(3).integers(0, WORDS, (count, length))
    return [" ".join(word(i) for i in row) for row in draws]
