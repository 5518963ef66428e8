"""Texts: which columns are read, pairs and conversations, lengths, padding, and how a window begins."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from test_tasks import BERT, load

import workbench as wb
from workbench.errors import DataError
from workbench.tasks import score
from workbench.tasks.language_modelling import LANGUAGE_MODELLING
from workbench.tasks.reading.texts import text_columns
from workbench.tasks.sentence_similarity import SENTENCE_SIMILARITY
from workbench.tasks.text_classification import TEXT_CLASSIFICATION
from workbench.zoo import load_task


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def words(count: int, seed: int, low: int = 0, high: int = 50) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(low, high, (count,), generator=generator).tolist())


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rows_of(columns_of, count=40, **more):
    """Return rows in which column number n holds words of its own ten, and a label."""
    return [
        {
            **{
                name: words(4 + row % 3, 100 * row + place, 10 * place, 10 * place + 10)
                for place, name in enumerate(columns_of)
            },
            "label": row % 2,
            **more,
        }
        for row in range(count)
    ]


# --- columns


def chosen(features, *, two=True, conversations=False):
    from datasets import Dataset

    rows = Dataset.from_list([features, features])
    return text_columns("d", rows.features, two=two, conversations=conversations)


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"text": "a", "label": 0}, ("text",)),
        ({"Text": "a", "Label": 0}, ("Text",)),
        ({"id": "x1", "uid": "u", "sentence": "a", "label": 0}, ("sentence",)),
        ({"id": "x1", "tweet": "a", "label": "bad", "label_text": "bad"}, ("tweet",)),
        ({"url": "a", "doc_id": "x", "body": "a", "class": 0}, ("body",)),
        ({"title": "a", "content": "b", "label": 0}, ("content",)),
        ({"sentence": "s", "question": "q", "label": 0, "idx": 0}, ("question", "sentence")),
        ({"hypothesis": "h", "premise": "p", "label": 0}, ("premise", "hypothesis")),
        ({"text_pair": "b", "text": "a", "label": 0}, ("text", "text_pair")),
        ({"sentence2": "b", "sentence1": "a", "label": 0}, ("sentence1", "sentence2")),
        ({"Question 2": "b", "Question 1": "a", "label": 0}, ("Question 1", "Question 2")),
        ({"text_b": "b", "text_a": "a", "label": 0, "id": "x"}, ("text_a", "text_b")),
        ({"title-b": "b", "title-a": "a", "label": 0}, ("title-a", "title-b")),
        ({"passage": "p", "question": "q", "label": 0}, ("question", "passage")),
        ({"text": "a", "tokens": ["a"], "label": 0}, ("text",)),
    ],
)
def test_columns_of_classifiers(row, read):
    assert chosen(row).columns == read


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"title": "a", "body": "b", "label": 0},
            "title, body could each hold them: name the one to be read 'text'",
        ),
        ({"text": "a", "review": "b", "label": 0}, "text, review could each hold them"),
        (
            {"id": "a", "conversations": [{"from": "human", "value": "a"}], "label": 0},
            "conversations holds lists",
        ),
        ({"source": "a", "turns": ["a", "b"], "label": 0}, "source, turns could each hold them"),
        ({"sentence1": "a", "sentence2": "b", "premise": "a", "hypothesis": "b"}, "several pairs of texts"),
        ({"id": "a", "label": 0}, "columns id, label; expected texts in a column 'text'"),
        ({"score": 1.0, "label": 0}, "columns score, label; expected texts"),
    ],
)
def test_columns_that_are_not_guessed(row, message):
    with pytest.raises(DataError, match=message):
        chosen(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "question, answer could each hold them: name the one to be read 'text'",
        ),
        ({"prompt": "a", "completion": "b"}, "prompt, completion could each hold them"),
        ({"id": "a", "messages": ["a", "b"]}, "messages holds lists: write them as texts"),
        ({"content": "a", "messages": [{"role": "user", "content": "a"}]}, "content, messages could each"),
        ({"id": "a", "n": 1}, "columns id, n; expected texts"),
    ],
)
def test_columns_of_running_text_that_are_not_guessed(row, message):
    with pytest.raises(DataError, match=message):
        chosen(row, two=False, conversations=True)


def test_which_column_is_read_is_said(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", rows_of(["sentence", "comment"], id="x"))
    assert (
        "texts are read from column 'sentence', labels from 'label'; not read: comment"
        in load(TEXT_CLASSIFICATION, BERT, path).notes
    )
    text = jsonl(tmp_path / "t.jsonl", rows_of(["text", "title"], 400))
    loaded = load(LANGUAGE_MODELLING, {}, text, sizes=(4, 2, 2), context=16)
    assert "texts are read from column 'text'; not read: title" in loaded.notes


# --- pairs


@pytest.mark.parametrize(
    ("first", "second"),
    [("question", "sentence"), ("premise", "hypothesis"), ("text", "text_pair"), ("q1", "q2")],
)
def test_pairs_are_fed_as_pairs(tmp_path, first, second):
    model = tiny_models.bert(tmp_path / "model")
    rows = rows_of([second, first])
    task = load_task(model, str(jsonl(tmp_path / "d.jsonl", rows)), progress=False)
    assert f"pairs of texts are read from columns {first!r} and {second!r}, labels from 'label'" in task.notes
    pairs = {}
    for row in rows:
        given = task.processor(row[first], row[second], return_token_type_ids=True)
        pairs[tuple(given["input_ids"])] = (given["token_type_ids"], row["label"])
    assert any(sum(kinds) for kinds, _ in pairs.values())
    inputs = task.evaluation.inputs
    for ids, kinds, mask, label in zip(
        *(inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")),
        task.evaluation.labels.tolist(),
        strict=True,
    ):
        length = int(mask.sum())
        assert (kinds[:length].tolist(), label) == pairs[tuple(ids[:length].tolist())]
        assert not ids[length:].any()
        assert bool(mask[:length].all())


def test_pairs_of_a_model_that_is_not_told_which_is_which(tmp_path):
    model = tiny_models.distilbert(tmp_path / "model")
    data = jsonl(tmp_path / "d.jsonl", rows_of(["sentence1", "sentence2"]))
    task = load_task(model, str(data), progress=False)
    assert "token_type_ids" not in task.evaluation.inputs
    assert len(score(task.kind, task.model, task.evaluation)) == 20


def test_pairs_are_cut_from_the_longer_text(tmp_path):
    rows = [
        {"question": words(3, row), "sentence": words(60, row + 500), "label": row % 2} for row in range(40)
    ]
    model = tiny_models.bert(tmp_path / "model")
    task = load_task(model, str(jsonl(tmp_path / "d.jsonl", rows)), progress=False)
    assert task.evaluation.inputs["input_ids"].shape[1] == 40
    assert bool(
        (task.evaluation.inputs["token_type_ids"].sum(1) == 37).all()
    )  # all three of the question stay
    assert (
        "40 of 40 texts are longer than 40 tokens and are cut there: the most that the model reads"
        in task.notes
    )


# --- conversations


TEMPLATE = "{% for m in messages %}[EOS] {{ m['role'] }} {{ m['content'] }} {% endfor %}"


def talking(folder, template=TEMPLATE):
    model = tiny_models.llama(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return model


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_conversations_are_written_by_the_chat_template(tmp_path, form):
    says = ("role", "content") if form == "messages" else ("from", "value")
    who = ("user", "assistant") if form == "messages" else ("human", "gpt")
    rows = [
        {
            "id": f"x{row}",
            form: [
                dict(zip(says, (speaker, words(9, 10 * row + place)), strict=True))
                for place, speaker in enumerate(who)
            ],
        }
        for row in range(120)
    ]
    task = load_task(
        talking(tmp_path / "model"),
        str(jsonl(tmp_path / "d.jsonl", rows)),
        context=16,
        evaluation_items=8,
        calibration_items=4,
        training_items=4,
        progress=False,
    )
    assert f"conversations of column {form!r} are written by the model's chat template" in task.notes
    written = " ".join(
        f"[EOS] user {row[form][0][says[1]]} [EOS] assistant {row[form][1][says[1]]} " for row in rows
    )
    ids = task.processor(written, add_special_tokens=False)["input_ids"]
    assert 2 in ids
    windows = {tuple(ids[start : start + 16]) for start in range(0, len(ids), 16)}
    assert {tuple(row) for row in task.evaluation.inputs["input_ids"].tolist()} <= windows


def test_conversations_without_a_template_are_refused(tmp_path):
    rows = [{"id": f"x{row}", "messages": [{"role": "user", "content": words(9, row)}]} for row in range(99)]
    data = str(jsonl(tmp_path / "d.jsonl", rows))
    with pytest.raises(
        DataError, match="hold conversations in column 'messages', and the model's tokenizer has no"
    ):
        load_task(talking(tmp_path / "a", ""), data, progress=False)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"the conversation of item 0 .* TemplateError: roles must alternate"):
        load_task(talking(tmp_path / "b", refusing), data, progress=False)
    talks = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]}] * 9
    with pytest.raises(DataError, match=r"item 0 .* user says list, and a text is needed"):
        load_task(talking(tmp_path / "c"), str(jsonl(tmp_path / "p.jsonl", talks)), progress=False)


# --- lengths


def test_texts_that_are_cut_are_counted_and_context_length_holds(tmp_path):
    rows = [{"text": words(30 if row < 10 else 5, row), "label": row % 2} for row in range(60)]
    data = str(jsonl(tmp_path / "d.jsonl", rows))
    model = str(tiny_models.bert(tmp_path / "model"))
    bench = wb.Bench(model, data, device="cpu", context_length=12, ledger=tmp_path / "l", progress=False)
    assert bench.task.evaluation.inputs["input_ids"].shape[1] == 12
    cut = "10 of 60 texts are longer than 12 tokens and are cut there"
    assert f"{cut}: context_length reads more of them, up to 40" in bench.task.notes
    whole = load_task(model, data, progress=False)
    assert whole.evaluation.inputs["input_ids"].shape[1] == 40
    assert not any("cut" in note for note in whole.notes)
    with pytest.raises(
        DataError, match="context_length=41: a text needs at least 1 tokens and at most the model's 40"
    ):
        load_task(model, data, context=41, progress=False)


def saved(folder, model):
    model.save_pretrained(folder)
    tiny_models.tokenizer_files(folder)
    return folder


def roberta(positions=40):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=positions,
            type_vocab_size=1,
            pad_token_id=1,
        )
    )


def test_positions_that_a_table_keeps_for_padding_are_no_room(tmp_path):
    torch.manual_seed(0)
    model = saved(tmp_path / "model", roberta())
    rows = [{"text": words(60, row), "text_pair": words(3, row), "label": row % 2} for row in range(40)]
    task = load_task(model, str(jsonl(tmp_path / "d.jsonl", rows)), progress=False)
    assert task.evaluation.inputs["input_ids"].shape[1] == 38
    assert "token_type_ids" not in task.evaluation.inputs  # it has one type
    assert len(score(task.kind, task.model, task.evaluation)) == 20


def test_texts_of_pairs_that_are_compared_are_counted_too(tmp_path):
    rows = [
        {"sentence1": words(200 if row % 4 == 0 else 9, row), "sentence2": words(5, row + 99), "score": row}
        for row in range(20)
    ]
    path = jsonl(tmp_path / "d.jsonl", rows)
    loaded = load(SENTENCE_SIMILARITY, {}, path)
    assert loaded.evaluation.inputs["input_ids"].shape[-1] == 128
    assert any(note.startswith("5 of 40 texts are longer than 128 tokens") for note in loaded.notes)
    longer = load(SENTENCE_SIMILARITY, {}, path, context=208)
    assert longer.evaluation.inputs["input_ids"].shape[-1] == 208
    assert not any("cut" in note for note in longer.notes)


# --- padding: labels are the model's own answers to each text alone


def gpt2():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=200)
    )


def opt():
    from transformers import OPTConfig, OPTForSequenceClassification

    return OPTForSequenceClassification(
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=200,
            pad_token_id=1,
        )
    )


def llama():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )


def xlnet():
    from transformers import XLNetConfig, XLNetForSequenceClassification

    return XLNetForSequenceClassification(
        XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32)
    )


def tokenizer(folder, **changed):
    """Change a folder's tokenizer_config.json; None takes a field away."""
    path = folder / "tokenizer_config.json"
    said = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))


@pytest.mark.parametrize(
    "changed", [{"padding_side": "left"}, {"padding_side": "left", "pad_token": None}, {}]
)
@pytest.mark.parametrize("architecture", [gpt2, opt, llama, bert, roberta, xlnet])
def test_padding_changes_no_answer(tmp_path, architecture, changed):
    from transformers import AutoTokenizer

    torch.manual_seed(3)
    model = (architecture(200) if architecture is roberta else architecture()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    folder = saved(tmp_path / "model", model)
    if architecture is xlnet and not changed:
        changed = {"padding_side": "left"}  # its own
    tokenizer(folder, **changed)
    plain, rows = AutoTokenizer.from_pretrained(folder), []
    assert plain.padding_side == changed.get("padding_side", "right")
    for row in range(60):
        text = words(3 + row % 11, row)
        with torch.no_grad():
            answer = model(input_ids=plain(text, return_tensors="pt").input_ids).logits.argmax()
        rows.append({"text": text, "label": int(answer)})
    assert {0, 1} == {row["label"] for row in rows}
    task = load_task(folder, str(jsonl(tmp_path / "d.jsonl", rows)), progress=False)
    assert float(score(task.kind, task.model, task.evaluation).correct.mean()) == 1


def test_the_model_finds_the_padding_that_it_looks_for(tmp_path):
    torch.manual_seed(3)
    model = gpt2().eval()
    model.config.pad_token_id = 9  # the tokenizer's is 0
    folder = saved(tmp_path / "model", model)
    rows = [{"text": words(3 + row % 11, row, 10), "label": row % 2} for row in range(40)]
    task = load_task(folder, str(jsonl(tmp_path / "d.jsonl", rows)), progress=False)
    assert any(
        "padded with 'w6', which the model's config names, not with the tokenizer's '[PAD]'" in note
        for note in task.notes
    )
    inputs = task.evaluation.inputs
    assert bool((inputs["input_ids"][inputs["attention_mask"] == 0] == 9).all())
    with torch.no_grad():
        together = task.kind.logits(task.model, task.evaluation)
        alone = [
            model(input_ids=ids[mask.bool()][None]).logits[0]
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_encoders_of_sentences_are_padded_on_the_right(tmp_path):
    from test_similarity import encoder, pairs

    data, tasks = str(pairs(tmp_path / "pairs.csv")), []
    for side in ("right", "left"):
        folder = encoder(tmp_path / side)
        tokenizer(folder, padding_side=side)
        tasks.append(load_task(folder, data, progress=False))
    assert tasks[0].evaluation.fingerprint == tasks[1].evaluation.fingerprint
    assert any("padded on the right" in note for note in tasks[1].notes)


# --- how a window begins


def beginning(folder, template: str, *tokens):
    from tokenizers import processors
    from transformers import AutoTokenizer

    rewritten = AutoTokenizer.from_pretrained(folder)
    rewritten.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(tokens)
    )
    rewritten.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "begin"),
    [("[EOS] $A", [2]), ("[EOS] $A [UNK]", [2]), ("$A [EOS]", []), ("[EOS] [UNK] $A", [2, 1])],
)
def test_windows_begin_as_the_tokenizer_begins(tmp_path, template, begin):
    folder = beginning(tiny_models.llama(tmp_path / "model"), template, ("[EOS]", 2), ("[UNK]", 1))
    text = tiny_models.words_file(tmp_path / "words.txt")
    task = load_task(
        folder,
        str(text),
        context=16,
        evaluation_items=8,
        calibration_items=8,
        training_items=8,
        progress=False,
    )
    room = 16 - len(begin)
    ids = task.processor(text.read_text(), add_special_tokens=False)["input_ids"]
    windows = {(*begin, *ids[start : start + room]) for start in range(0, len(ids), room)}
    for items in (task.evaluation, task.calibration, task.training):
        assert {tuple(row) for row in items.inputs["input_ids"].tolist()} <= windows
        assert torch.equal(items.labels, items.inputs["input_ids"][:, 1:])
    assert any("as the tokenizer begins" in note for note in task.notes) is bool(begin)
    if begin:
        with pytest.raises(DataError, match=f"a window needs at least {2 + len(begin)} tokens"):
            load_task(folder, str(text), context=1 + len(begin), progress=False)
