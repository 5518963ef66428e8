"""Whisper from CTranslate2's file to a transformers folder, without that library: a mapping of names, no
value changed.

The file (`model.bin`, little endian) holds a version, the name and revision of a specification, and tensors:
name, rank, sizes, type, bytes. Query, key and value of self-attention lie in one tensor, key and value of
cross-attention in another. Beside it lie `config.json` (CTranslate2's, with the tokens that generation
suppresses) and `tokenizer.json`.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from workbench.errors import ModelError
from workbench.util.quiet import quiet

TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
END = "<|endoftext|>"
# Tokens of the smallest Whisper of many languages; the English ones have one less (and list the languages all
# the same)
MULTILINGUAL = 51_865
UNUSED = re.compile(
    r"(num_heads|num_source_heads|alignment_layer|alignment_heads|pre_norm|activation|scale_embeddings"
    r"|scale_outputs|position_encodings/.*|layernorm_embedding)$"
)


@dataclass
class Source:
    """The tensors of a file; those taken are struck off, so that nothing is forgotten in silence."""

    tensors: dict[str, Tensor]
    taken: set[str] = field(default_factory=set)

    def take(self, name: str) -> Tensor:
        """Return a tensor by its name."""
        if name not in self.tensors:
            raise ModelError(
                f"the CTranslate2 file has no tensor {name!r}: it is no Whisper model, or of another version"
            )
        self.taken.add(name)
        return self.tensors[name]

    def depth(self, side: str) -> int:
        """Return the number of layers of encoder or decoder."""
        return 1 + max(
            (int(match[1]) for name in self.tensors if (match := re.match(rf"{side}/layer_(\d+)/", name))),
            default=-1,
        )

    def left(self) -> list[str]:
        """Return the weights that nothing took."""
        return sorted(
            name
            for name in self.tensors
            if name not in self.taken and not UNUSED.search(name) and self.tensors[name].ndim > 0
        )


def read(path: Path) -> Source:
    """Return the tensors of a CTranslate2 file.

    Raises:
        ModelError: the file ends early, or is of another form.

    """
    tensors: dict[str, Tensor] = {}
    try:
        with path.open("rb") as file:
            unsigned(file, 4), text(file), unsigned(file, 4)  # version, specification, revision
            for _ in range(unsigned(file, 4)):
                name, rank = text(file), unsigned(file, 1)
                sizes = [unsigned(file, 4) for _ in range(rank)]
                kind = TYPES[unsigned(file, 1)]
                values = np.frombuffer(exactly(file, unsigned(file, 4)), kind)
                tensors[name] = torch.from_numpy(values.reshape(sizes).copy())
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path.name} is no CTranslate2 model, or is damaged: {type(error).__name__}: {error}"
        ) from None
    return Source(tensors)


def exactly(file: BinaryIO, count: int) -> bytes:
    """Return the next `count` bytes; ValueError if the file ends before."""
    content = file.read(count)
    if len(content) != count:
        raise ValueError(f"the file ends after {len(content)} of {count} bytes")
    return content


def unsigned(file: BinaryIO, size: int) -> int:
    """Return an unsigned integer of 1, 2 or 4 bytes."""
    return int(struct.unpack({1: "<B", 2: "<H", 4: "<I"}[size], exactly(file, size))[0])


def text(file: BinaryIO) -> str:
    """Return a string: its length in two bytes, its letters, a final NUL."""
    return exactly(file, unsigned(file, 2)).rstrip(b"\0").decode()


def convert_whisper(weights: Path, folder: Path) -> None:
    """Write the Whisper model in `weights` (config.json and tokenizer.json beside it) to `folder` as
    safetensors of the same bits.

    Raises:
        ModelError: another model, a damaged file, or a tensor that did not arrive as it was.
    """
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    source = read(weights)
    said = json.loads((weights.parent / "config.json").read_text())
    tokens = {
        token["content"]: token["id"]
        for token in json.loads((weights.parent / "tokenizer.json").read_text())["added_tokens"]
    }
    state = dict(renamed(source))
    if source.left():
        raise ModelError(
            f"{weights.name} has {len(source.left())} tensors that Whisper has not, the first is"
            f" {source.left()[0]!r}"
        )
    with quiet(), torch.device("meta"):
        model = WhisperForConditionalGeneration(configuration(source, tokens))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise ModelError(
            f"{weights.name} does not fit Whisper: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    model.tie_weights()
    model.generation_config = GenerationConfig(
        **generation(said, tokens, multilingual=model.config.vocab_size >= MULTILINGUAL)
    )
    with quiet():
        model.save_pretrained(folder)
        tokenizer_file = folder / "tokenizer.json"
        tokenizer_file.write_text(
            json.dumps(
                with_all_merges(json.loads((weights.parent / "tokenizer.json").read_text())),
                ensure_ascii=False,
            )
        )
        PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file), bos_token=END, eos_token=END, pad_token=END, unk_token=END
        ).save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)
    check_bits(state, folder / "model.safetensors")


def with_all_merges(said: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json with a merge for every token of two symbols.

    The archive of whisper-base lost its first, of a space and t.

    Without it no text is cut into the tokens that the model was trained with. Merges stand in the order of
    their tokens.

    Raises:
        ModelError: a longer token that no merge makes.
    """
    model = said["model"]
    if model.get("type") != "BPE":
        return said
    numbers = model["vocab"]
    pairs = {
        "".join(pair): list(pair)
        for pair in (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    }
    special = {token["content"] for token in said["added_tokens"]}
    lost = [token for token in numbers if len(token) > 1 and token not in pairs and token not in special]
    if any(len(token) > 2 for token in lost):
        raise ModelError(f"tokenizer.json lacks the merges of {len(lost)} tokens, such as {lost[-1]!r}")
    pairs |= {token: list(token) for token in lost}
    return {
        **said,
        "model": {**model, "merges": sorted(pairs.values(), key=lambda pair: numbers["".join(pair)])},
    }


def check_bits(state: Mapping[str, Tensor], path: Path) -> None:
    """Compare every tensor with the one in a safetensors file, bit for bit."""
    from safetensors.torch import load_file

    written = load_file(path)
    wrong = [
        name
        for name, tensor in state.items()
        if name not in written
        or written[name].dtype != tensor.dtype
        or not torch.equal(written[name], tensor)
    ]
    if wrong or len(written) != len(state):
        raise ModelError(
            f"{path.name} is not what was converted: {len(wrong)} tensors differ, such as {wrong[:3]}"
        )


def configuration(source: Source, tokens: Mapping[str, int]) -> Any:
    """Return the configuration of the model, read from the shapes of its tensors."""
    from transformers import WhisperConfig

    width, heads = (
        source.tensors["encoder/conv1/bias"].numel(),
        int(source.tensors["encoder/num_heads"].flatten()[0]),
    )
    feed_forward, end = len(source.tensors["encoder/layer_0/ffn/linear_0/weight"]), tokens[END]
    return WhisperConfig(
        vocab_size=len(source.tensors["decoder/embeddings/weight"]),
        num_mel_bins=source.tensors["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=source.depth("encoder"),
        decoder_layers=source.depth("decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        max_source_positions=len(source.tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(source.tensors["decoder/position_encodings/encodings"]),
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=tokens["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
        architectures=["WhisperForConditionalGeneration"],
    )


def generation(said: Mapping[str, Any], tokens: Mapping[str, int], *, multilingual: bool) -> dict[str, Any]:
    """Return the settings of generation: first tokens, suppressed tokens, languages."""
    end = tokens[END]
    settings: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": tokens["<|startoftranscript|>"],
        "max_length": 448,
        "is_multilingual": multilingual,
        "suppress_tokens": said["suppress_ids"],
        "begin_suppress_tokens": said["suppress_ids_begin"],
        "alignment_heads": said["alignment_heads"],
        "no_timestamps_token_id": tokens["<|notimestamps|>"],
        "prev_sot_token_id": tokens["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
    }
    if multilingual:
        languages = set(said["lang_ids"])
        settings["lang_to_id"] = {name: number for name, number in tokens.items() if number in languages}
        settings["task_to_id"] = {task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return settings


def renamed(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under the name that transformers gives it."""
    for side in ("encoder", "decoder"):
        for index in range(source.depth(side)):
            yield from layer(
                source, f"model.{side}.layers.{index}", f"{side}/layer_{index}", crossed=side == "decoder"
            )
        yield from pair(source, f"model.{side}.layer_norm", f"{side}/layer_norm", "gamma", "beta")
    for name in ("conv1", "conv2"):
        yield from pair(source, f"model.encoder.{name}", f"encoder/{name}")
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", source.take(f"{side}/position_encodings/encodings")
    yield "model.decoder.embed_tokens.weight", source.take("decoder/embeddings/weight")


def layer(source: Source, to: str, of: str, *, crossed: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of one block; Whisper's key projections have no bias."""
    weight, bias = (
        source.take(f"{of}/self_attention/linear_0/{kind}").chunk(3) for kind in ("weight", "bias")
    )
    for index, name in enumerate("qkv"):
        yield f"{to}.self_attn.{name}_proj.weight", weight[index].clone()
        if name != "k":
            yield f"{to}.self_attn.{name}_proj.bias", bias[index].clone()
    yield from pair(source, f"{to}.self_attn.out_proj", f"{of}/self_attention/linear_1")
    yield from pair(source, f"{to}.self_attn_layer_norm", f"{of}/self_attention/layer_norm", "gamma", "beta")
    yield from pair(source, f"{to}.fc1", f"{of}/ffn/linear_0")
    yield from pair(source, f"{to}.fc2", f"{of}/ffn/linear_1")
    yield from pair(source, f"{to}.final_layer_norm", f"{of}/ffn/layer_norm", "gamma", "beta")
    if crossed:
        yield from pair(source, f"{to}.encoder_attn.q_proj", f"{of}/attention/linear_0")
        key, value = source.take(f"{of}/attention/linear_1/weight").chunk(2)
        yield f"{to}.encoder_attn.k_proj.weight", key.clone()
        yield f"{to}.encoder_attn.v_proj.weight", value.clone()
        yield (
            f"{to}.encoder_attn.v_proj.bias",
            source.take(f"{of}/attention/linear_1/bias").chunk(2)[1].clone(),
        )
        yield from pair(source, f"{to}.encoder_attn.out_proj", f"{of}/attention/linear_2")
        yield from pair(
            source, f"{to}.encoder_attn_layer_norm", f"{of}/attention/layer_norm", "gamma", "beta"
        )


def pair(
    source: Source, to: str, of: str, weight: str = "weight", bias: str = "bias"
) -> Iterator[tuple[str, Tensor]]:
    """Yield a weight and its bias."""
    yield f"{to}.weight", source.take(f"{of}/{weight}")
    yield f"{to}.bias", source.take(f"{of}/{bias}")
