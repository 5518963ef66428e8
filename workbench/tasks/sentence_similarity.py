"""Sentence similarity: two texts in, how alike they are out.

An encoder is as good as its order of the pairs is people's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import DataError, ModelError
from workbench.metrics.scores import Scores
from workbench.tasks import columns
from workbench.tasks.base import Items
from workbench.tasks.columns import Raw
from workbench.tasks.items import ItemCounts, Pool, Pools, Reading
from workbench.tasks.likelihood import Choosing
from workbench.tasks.processors import (
    TOKENIZER_FILES,
    load_tokenizer,
    most_tokens,
    positions,
    set_padding,
)
from workbench.tasks.reading.lengths import count_cut, text_length
from workbench.tasks.reading.tally import Tally
from workbench.tasks.sources import STSB, WORDSIM

MAX_TOKENS = 128
MULTIPLE = 8  # texts are padded to such a number of tokens
SCALES = (1.0, 5.0, 10.0, 100.0)  # upper ends of people's scores
FIRST_NAMES = ("sentence1", "text1", "word1", "first", "word 1", "sentence_1", "text_1", "anchor")
SECOND_NAMES = ("sentence2", "text2", "word2", "second", "word 2", "sentence_2", "text_2", "positive")
SCORE_NAMES = ("score", "similarity", "human", "human (mean)", "similarity_score", "label", "rating")
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


@dataclass(frozen=True)
class SentenceSimilarity(Choosing):
    """Two texts an item and people's score of how alike they are.

    Quality is Spearman's correlation of cosines with scores.

    `pooling` makes one vector of a text's tokens: their "mean", or the "first" one. `tokenizer` turns items
    back into texts. Training pulls the cosine to the score (mean squared error). Distillation pulls each
    vector to the teacher's by 1 - cosine; directions have no temperature, so T has no effect here.
    """

    name = "sentence similarity"
    auto_class = "AutoModel"
    architectures = ("Model",)
    type_mapping = None
    primary = "rank correlation"
    flips_by = "cosine"
    distribution = None
    outputs = "vectors"
    sizes = ItemCounts(2000, 512, 5000)
    latency_items = 16
    sensitivity_items = 256
    data_names = (WORDSIM, STSB)
    default_data = (STSB, WORDSIM)
    files = (*TOKENIZER_FILES, "modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
    kv_cache = False
    behaviour = "told apart"
    masked_texts = True

    pooling: str = "mean"
    limit: int | None = field(
        default=None, compare=False
    )  # tokens that the model reads, None: without an end
    tokenizer: Any = field(default=None, compare=False, repr=False)

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return why a bare model (BertModel) is no encoder of texts: its family also fills in masked words,
        and has no decoder.
        """
        from transformers.models.auto import modeling_auto

        encodes = config.get("model_type") in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (
            config.get("is_encoder_decoder") or config.get("is_decoder")
        )
        return "" if encodes else "it is no encoder of texts"

    def processor(self, directory: Path, config: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """Return the tokenizer of a folder."""
        return load_tokenizer(directory, self.name)

    def prepared(self, model: nn.Module, directory: Path, processor: Any) -> tuple[Self, tuple[str, ...]]:
        """Return the kind with the pooling that the model's own files name; a pooler that it has no use for
        is left dense.
        """
        kind, notes = pooled(self, directory, processor)
        spare_pooler(model)
        return replace(kind, limit=most_tokens(model)), (*notes, *set_padding(model, processor))

    def pools(self, reading: Reading, raw: Raw, sizes: ItemCounts) -> Pools:  # noqa: ARG002
        """Return pairs of texts, one item a row."""
        return pair_pools(reading, raw, self.limit)

    def labels(self, config: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        """Return nothing: scores are no classes."""
        return ()

    def batch_size(self, evaluation: Items, *, on_cpu: bool) -> int:  # noqa: ARG002
        """Return how many pairs are run at once."""
        return 32 if on_cpu else 256

    def logits(self, model: nn.Module, items: Items) -> Tensor:
        """Return the unit vectors of both texts, [N, 2, d], for `input_ids` and `attention_mask`, both [N, 2,
        L].
        """
        given = {name: tensor.flatten(0, 1) for name, tensor in items.inputs.items()}
        tokens: Tensor = model(**given).last_hidden_state  # [2N, L, d]
        if self.pooling == "first":
            pooled = tokens[:, 0]
        else:
            kept = given["attention_mask"].unsqueeze(-1).to(tokens.dtype)
            pooled = (tokens * kept).sum(1) / kept.sum(1).clamp(min=1)
        vectors: Tensor = F.normalize(pooled.float(), dim=-1).unflatten(0, (-1, 2))
        return vectors

    def score(self, model: nn.Module, items: Items) -> Scores:
        """Return cosines and scores as details; the loss is the squared difference.

        A vector that is not finite makes the cosine -inf.
        """
        cosine = cosines(self.logits(model, items)).double().cpu()
        wanted = items.labels.double().cpu()
        loss = (cosine - wanted).square()
        lost = ~torch.isfinite(cosine)
        none = torch.zeros_like(cosine)
        return Scores(
            loss=torch.where(lost, torch.inf, loss),
            correct=none,
            weight=none + 1,
            answers=none.long(),
            details={"cosine": torch.where(lost, -torch.inf, cosine), "score": wanted},
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared difference of cosines [N] and scores [N] in [0, 1]."""
        return (cosines(logits) - labels.float()).square().mean()

    # Directions have none
    def soft_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,  # noqa: ARG002
        temperature: float,  # noqa: ARG002
    ) -> Tensor:
        """Return the mean of 1 - cosine between the vectors of student and teacher, both [items, 2, width] of
        length 1: half their squared distance, a float32 scalar.
        """
        return (1 - (student.float() * teacher.float()).sum(-1)).mean()

    def together(self, answers: Tensor, temperature: float) -> Tensor:  # noqa: ARG002  directions have none
        """Return the mean direction of several teachers' vectors, [teachers, N, 2, d]."""
        return F.normalize(answers, dim=-1).mean(0)

    def examples(self, model: nn.Module, items: Items) -> list[tuple[str, str]]:
        """Return each pair with people's score, and the model's cosine."""
        with torch.no_grad():
            values = cosines(self.logits(model, items)).tolist()
        pairs = (
            [
                [self.tokenizer.decode(text, skip_special_tokens=True) for text in pair]
                for pair in items.inputs["input_ids"].tolist()
            ]
            if self.tokenizer
            else [["?", "?"]] * len(items)
        )
        return [
            (f"{first} / {second} (people: {wanted:.2f})", f"{cosine:.2f}")
            for (first, second), wanted, cosine in zip(pairs, items.labels.tolist(), values, strict=True)
        ]


SENTENCE_SIMILARITY = SentenceSimilarity()
K = TypeVar("K", bound=SentenceSimilarity)


def spare_pooler(model: nn.Module) -> None:
    """Mark BERT's pooler, which the mean of tokens does not go through: what it does would neither cost nor
    save quality.
    """
    pooler = getattr(model, "pooler", None)
    for module in pooler.modules() if isinstance(pooler, nn.Module) else ():
        module.left_dense = "the answers do not depend on it (BERT's pooler)"  # type: ignore[assignment]


def cosines(vectors: Tensor) -> Tensor:
    """Return the cosine of both vectors of each item: unit vectors [N, 2, d] -> [N]."""
    return (vectors[:, 0] * vectors[:, 1]).sum(-1)


def pooled(kind: K, directory: Path, tokenizer: Any) -> tuple[K, tuple[str, ...]]:
    """Return the kind with the pooling that a sentence encoder's own files name, and notes.

    Raises:
        ModelError: layers after pooling, or a way to pool that is not built.

    """
    kind = replace(kind, tokenizer=tokenizer)
    listed, pooling = directory / "modules.json", directory / "1_Pooling" / "config.json"
    try:
        modules = (
            [str(module["type"]).rsplit(".", 1)[-1] for module in json.loads(listed.read_text())]
            if listed.is_file()
            else []
        )
        said = json.loads(pooling.read_text()) if pooling.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{directory}: modules.json or 1_Pooling/config.json cannot be read: {error}"
        ) from None
    more = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if more:
        raise ModelError(
            f"{directory} puts {', '.join(more)} after its encoder (modules.json); only pooling and"
            " normalising are built"
        )
    chosen = [name for name, on in said.items() if name.startswith("pooling_mode_") and on]
    if not chosen:
        return kind, ("texts are pooled by the mean of their tokens: the model says nothing else",)
    if len(chosen) > 1 or chosen[0] not in POOLINGS:
        raise ModelError(f"{directory} pools by {', '.join(chosen)}; built are {', '.join(POOLINGS)}")
    return replace(kind, pooling=POOLINGS[chosen[0]]), ()


def pair_columns(name: str, rows: Any) -> tuple[str, str, str]:
    """Return the columns of both texts and of people's score, whatever their case.

    Raises:
        DataError: a column is missing; the message lists those that are there.

    """
    by_name = {column.strip().casefold(): column for column in rows.column_names}
    chosen = [
        next((by_name[wanted] for wanted in names if wanted in by_name), None)
        for names in (FIRST_NAMES, SECOND_NAMES, SCORE_NAMES)
    ]
    if None in chosen:
        raise DataError(
            f"data {name!r} have columns {', '.join(rows.column_names)}; sentence similarity expects two"
            " texts and a number: columns such as sentence1, sentence2 and score"
        )
    return str(chosen[0]), str(chosen[1]), str(chosen[2])


def pair_pools(reading: Reading, raw: Raw, limit: int | None = None) -> Pools:
    """Return pairs of texts, one item a row, with scores between 0 and 1, after checking every row; the model
    reads at most `limit` tokens, None: as many as its config says.

    Raises:
        DataError: missing columns, a text that is none, a score that is no number or below 0.

    """
    held_out_name = columns.held_out(raw)
    names = [columns.train_name(raw, held_out_name), *([held_out_name] if held_out_name else [])]
    rows = {split: checked(raw, split) for split in names}
    top = max(score for split in rows.values() for _, _, score in split)
    scale = next((scale for scale in SCALES if top <= scale), top)
    texts = [text for split in rows.values() for first, second, _ in split for text in (first, second)]
    length = padded_length(texts, reading, limit or positions(reading.config), tally := Tally("texts"))

    def pool(split: str) -> Pool:
        return Pool(
            len(rows[split]),
            lambda index: pair_items([rows[split][i] for i in index], scale, reading.processor, length),
        )

    return (
        pool(names[0]),
        pool(names[1]) if held_out_name else None,
        (
            f"scores of 0 to {scale:g} stand between 0 and 1; texts are padded to {length} tokens",
            *tally.notes(),
        ),
    )


def checked(raw: Raw, split: str) -> list[tuple[str, str, float]]:
    """Return the pairs of a split as (text, text, score)."""
    rows = raw.splits[split]
    names = pair_columns(raw.name, rows)
    pairs = []
    for number, (first, second, score) in enumerate(zip(*(list(rows[name]) for name in names), strict=True)):
        for column, text in zip(names, (first, second), strict=False):
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"item {number} of data {raw.name!r} has {text!r} in column {column!r}; a text is needed"
                )
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise DataError(
                f"item {number} of data {raw.name!r} has {score!r} in column {names[2]!r}; a score of 0 or"
                " more is needed"
            )
        pairs.append((first, second, value))
    if not pairs:
        raise DataError(f"data {raw.name!r} ({split}) hold no pairs")
    return pairs


def padded_length(texts: Sequence[str], reading: Reading, limit: int | None, tally: Tally) -> int:
    """Return the tokens of the longest text rounded up, at most those that are read.

    Texts that are longer are counted.
    """
    most = text_length(reading.context, reading.processor, limit, MAX_TOKENS)
    count_cut(tally, [texts], reading.processor, most, limit)
    longest = max(
        len(ids) for ids in reading.processor(list(texts), truncation=True, max_length=most)["input_ids"]
    )
    return min(most, -(-longest // MULTIPLE) * MULTIPLE)


def pair_items(pairs: Sequence[tuple[str, str, float]], scale: float, tokenizer: Any, length: int) -> Items:
    """Return items of pairs: `input_ids` and `attention_mask` [N, 2, length], labels float32 [N] = score /
    scale.
    """
    texts = [text for first, second, _ in pairs for text in (first, second)]
    encoded: Mapping[str, Tensor] = (
        tokenizer(texts, truncation=True, padding="max_length", max_length=length, return_tensors="pt")
        if texts
        else {}
    )
    empty = torch.zeros(0, length, dtype=torch.long)
    inputs = {
        name: encoded.get(name, empty).unflatten(0, (len(pairs), 2))
        for name in ("input_ids", "attention_mask")
    }
    return Items(inputs, torch.tensor([score / scale for _, _, score in pairs], dtype=torch.float32))
