"""The teacher's answers, computed once: the same lessons, within the budget, and nothing kept that does not
pay."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_training import close, distilled
from tiny_tasks import TRAINING, same, tiny_task, vit, weights
from tiny_tasks import items as tiny_items

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.distillation import teacher_outputs
from workbench.compress.distillation.hidden_states import SeenStates, see
from workbench.compress.distillation.teacher_cache import teacher_cache
from workbench.compress.distillation.teacher_tables import DiskTable, disk_folder, free_bytes
from workbench.errors import CompressionError
from workbench.recipe import Recipe


@pytest.mark.parametrize("more", [{}, {"hidden_weight": 1.0}], ids=["answers", "hidden states"])
def test_kept_answers_teach_what_computed_ones_do(sort, device, more):
    task = tiny_task(sort, device)
    plain, kept = distilled(task, **more), distilled(task, teacher_cache_mb=16, **more)
    assert kept.warnings == ()
    assert [loss for _, loss in kept.curve] == pytest.approx([loss for _, loss in plain.curve], rel=1e-3)
    assert close(task, plain, kept, 1e-2)


def test_each_item_is_computed_once_for_all_recipes(monkeypatch):
    task = tiny_task("vit")
    statistics, read = Statistics(task), []
    plain = type(task.kind).logits

    def counted(kind, model, items):
        if model is task.model:
            read.append(len(items))
        return plain(kind, model, items)

    monkeypatch.setattr(type(task.kind), "logits", counted)
    first = distilled(task, steps=20, teacher_cache_mb=16, statistics=statistics)
    assert (
        sum(read) == TRAINING + 2
    )  # and one item each to see that it answers with numbers, and to measure their size
    distilled(task, wb.Prune(sparsity=0.7), steps=20, teacher_cache_mb=16, statistics=statistics)
    assert sum(read) == TRAINING + 3
    assert same(
        weights(distilled(task, steps=20, teacher_cache_mb=16).model), weights(first.model)
    )  # what was read before does not matter


def test_a_language_models_last_hidden_states_are_kept_instead_of_its_logits():
    task = tiny_task("llama")  # 16 numbers a token instead of 64

    def answers(items):
        return see(task.kind, task.model, items)

    cache, size = teacher_cache(answers, task.model, task.training, 16)
    assert size == TRAINING * 8 * 16 * 4
    index = torch.tensor([5, 39, 0, 5])
    assert torch.allclose(
        cache.look_up(index).logits, task.kind.logits(task.model, task.training[index]), atol=1e-5
    )
    assert cache.nbytes == size


def test_a_head_that_something_follows_is_not_replayed():
    """Scaled logits (as Cohere's and Granite's) are not what the head alone makes: they are kept as they
    are."""
    task = tiny_task("llama")

    def answers(items):
        return SeenStates(task.kind.logits(task.model, items) / 8)

    cache, size = teacher_cache(answers, task.model, task.training, 16)
    assert cache.head is None
    assert size == TRAINING * 7 * 64 * 4


def test_answers_beyond_the_budget_are_computed_anew_and_that_is_said(monkeypatch):
    task = tiny_task("vit")
    plain = distilled(task, hidden_weight=1)
    monkeypatch.setattr(teacher_outputs, "MB", 1000)
    compressed = distilled(task, hidden_weight=1, teacher_cache_mb=5)
    assert compressed.warnings == (
        (
            "teacher_cache_mb=5 is too little for the teacher's answers to 40 training items, 40 MB: they are"
            " computed at each step"
        ),
    )
    assert same(weights(compressed.model), weights(plain.model))


def test_a_cache_that_would_read_more_than_the_training_is_not_used():
    compressed = distilled(tiny_task("vit"), steps=2, teacher_cache_mb=5)
    assert compressed.warnings == (
        "teacher_cache_mb=5 is not used: 2 steps of 8 items read fewer than the 40 training items",
    )


# --- on disk


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return disk_folder()


@pytest.fixture
def few(monkeypatch):
    """Let a "megabyte" be 1,000 bytes, so that tiny answers exceed budgets."""
    monkeypatch.setattr(teacher_outputs, "MB", 1000)


@pytest.mark.parametrize(
    "more",
    [{}, {"hidden_weight": 1.0}, {"train_precision": "mixed"}],
    ids=["answers", "hidden states", "mixed"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_answers_on_disk_give_the_bits_of_those_in_memory_and_leave_no_file(
    sort, device, dtype, more, folder
):
    task = tiny_task(sort, device, dtype)
    kept, read = (
        distilled(task, teacher_cache_mb=16, **more),
        distilled(task, teacher_cache_disk_mb=16, **more),
    )
    assert [warning for warning in read.warnings if "cache" in warning] == []
    assert read.curve == kept.curve
    assert same(weights(read.model), weights(kept.model))
    assert list(folder.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_are_made_again_in_the_arithmetic_that_the_head_had(dtype):
    """Under autocast the head is given float32 states and computes in bfloat16."""
    task = tiny_task("gpt2", "cpu", dtype)

    def compute(items):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            states = task.model.transformer(items.inputs["input_ids"]).last_hidden_state.float()
            return SeenStates(task.model.lm_head(states)[:, :-1], {})

    cache, _ = teacher_cache(compute, task.model, task.training, 8)
    assert (cache.head, cache.precision) == (task.model.lm_head, torch.bfloat16)
    wanted = compute(task.training[:8]).logits
    assert torch.equal(cache.look_up(torch.arange(8)).logits, wanted)


def test_disk_is_used_where_memory_is_too_little(few, folder, monkeypatch):
    compressed = []
    plain = DiskTable.put
    monkeypatch.setattr(
        DiskTable, "put", lambda table, start, values: compressed.append(start) or plain(table, start, values)
    )
    task = tiny_task("vit")
    assert distilled(task, hidden_weight=1, teacher_cache_mb=39, teacher_cache_disk_mb=41).warnings == ()
    assert compressed
    compressed.clear()
    assert distilled(task, hidden_weight=1, teacher_cache_mb=41, teacher_cache_disk_mb=41).warnings == ()
    assert not compressed


def test_answers_beyond_both_budgets_are_computed_anew_and_that_is_said(few, folder):
    task = tiny_task("vit")
    plain, compressed = (
        distilled(task, hidden_weight=1),
        distilled(task, hidden_weight=1, teacher_cache_mb=5, teacher_cache_disk_mb=6),
    )
    assert compressed.warnings == (
        (
            "teacher_cache_mb=5 and teacher_cache_disk_mb=6 are too little for the teacher's answers to 40"
            " training items, 40 MB: they are computed at each step"
        ),
    )
    assert same(weights(compressed.model), weights(plain.model))
    assert not folder.exists()


def test_a_disk_without_room_is_not_filled(folder, monkeypatch):
    monkeypatch.setattr(teacher_outputs, "free_bytes", lambda _: 10)
    task = tiny_task("vit")
    plain, compressed = distilled(task), distilled(task, teacher_cache_disk_mb=5)
    assert compressed.warnings == (
        (
            f"teacher_cache_disk_mb=5 is not used: the teacher's answers take 1 MB, and {folder} has 0 MB"
            " free; they are computed at each step"
        ),
    )
    assert same(weights(compressed.model), weights(plain.model))


def test_a_disk_that_fills_up_on_the_way_costs_a_warning_not_the_training(folder, monkeypatch):
    task, statistics = tiny_task("vit"), None
    plain = DiskTable.put

    def full(table, start, values):
        if start:
            raise OSError(28, "No space left on device")
        plain(table, start, values)

    with monkeypatch.context() as patch:
        patch.setattr(DiskTable, "put", full)
        statistics = Statistics(task)
        compressed = distilled(task, teacher_cache_disk_mb=5, statistics=statistics)
    assert compressed.warnings == (
        (
            f"the teacher's answers can no longer be kept in {folder}: No space left on device; from here on"
            " they are computed at each step"
        ),
    )
    assert [loss for _, loss in compressed.curve] == pytest.approx(
        [loss for _, loss in distilled(task).curve], rel=1e-3
    )
    assert (
        distilled(task, teacher_cache_disk_mb=5, statistics=statistics).warnings == ()
    )  # there is room again


def test_a_table_on_disk_gives_back_every_bit_in_any_order(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(7, 3, 5).to(dtype)
        table = DiskTable.like(tmp_path / "made", values, 9)
        table.put(2, values)
        index = torch.tensor([8, 2, 2, 5])
        assert torch.equal(table.take(index), values[index - 2])
        assert table.nbytes == 9 * 15 * dtype.itemsize
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_a_file_is_closed_when_its_table_goes(tmp_path):
    table = DiskTable.like(tmp_path, torch.zeros(2, 3), 2)
    file = table.file
    assert not file.closed
    del table
    assert file.closed
    assert list(Path(tmp_path).iterdir()) == []


# --- what Transfer keeps


FAST = {"transfer_steps": 8, "transfer_batch": 8, "transfer_rate": 1e-2, "transfer_look_every": 0}


def taught(task, statistics=None, **options):
    return compress(task, Recipe(wb.Prune(sparsity=0.5), wb.Transfer(**FAST | options)), statistics)


def other_teacher(folder, seed: int = 7, sort=vit):
    """Save a model whose weights depend on the seed; return its folder."""
    model, generator = sort(), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
        )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """Count the items that each model reads."""
    counts: Counter[int] = Counter()
    kind = type(tiny_task("vit").kind)
    plain = kind.logits

    def counted(kind, model, items):
        counts[id(model)] += len(items)
        return plain(kind, model, items)

    monkeypatch.setattr(kind, "logits", counted)
    return counts


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kl_weight": 0},
        {"align": "none"},
        {"lora_count": 2},
        {"align": "mse", "align_projection": "trained"},
    ],
    ids=str,
)
def test_kept_answers_and_states_transfer_what_computed_ones_do(sort, device, more):
    task = tiny_task(sort, device)
    plain, kept = taught(task, **more), taught(task, transfer_cache_mb=16, **more)
    assert kept.warnings == ()
    assert [loss for _, loss in kept.curve] == pytest.approx([loss for _, loss in plain.curve], rel=1e-3)
    assert close(task, plain, kept, 1e-2)


@pytest.mark.parametrize("where", ["transfer_cache_mb", "transfer_cache_disk_mb"])
def test_each_teacher_reads_each_item_once_whatever_the_temperature(tmp_path, folder, asked, where):
    task = tiny_task("vit")
    statistics, options = Statistics(task), {"teachers": f"dense,{other_teacher(tmp_path / 'a')}", where: 16}
    taught(task, statistics, **options)
    second = next(
        teacher for key in statistics.kept if key[0] == "teacher" for teacher in statistics.kept.get(key)
    )
    before = asked[id(task.model)], asked[id(second)]
    hot = taught(task, statistics, transfer_temperature=5.0, **options)
    after = asked[id(task.model)], asked[id(second)]
    fitted = len(task.calibration)  # projections, with the first
    assert [late - early for late, early in zip(after, before, strict=True)] == [
        1 + fitted,
        1,
    ]  # and one item to see that it answers
    assert before[1] == 2 + TRAINING  # that, one to measure its size, and all
    plain = taught(task, transfer_temperature=5.0, teachers=options["teachers"])
    assert [loss for _, loss in hot.curve] == pytest.approx([loss for _, loss in plain.curve], rel=1e-3)
    assert close(task, plain, hot, 1e-2)


def test_another_teacher_under_the_same_name_is_asked_anew(tmp_path):
    """A folder that was trained again, and that the statistics have let go meanwhile."""
    task = tiny_task("vit")
    statistics, name = Statistics(task), other_teacher(tmp_path / "a")
    options = {"teachers": name, "align": "none", "ce_weight": 0}
    first = taught(task, statistics, transfer_cache_mb=16, **options)
    other_teacher(tmp_path / "a", seed=8)
    statistics.kept.pop(("teacher", name))
    second, plain = taught(task, statistics, transfer_cache_mb=16, **options), taught(task, **options)
    assert second.curve[0][1] == pytest.approx(plain.curve[0][1], rel=1e-4)
    assert second.curve[0][1] != pytest.approx(first.curve[0][1], rel=1e-2)


def test_other_training_items_are_asked_about_anew():
    task = tiny_task("vit")
    statistics = Statistics(task)
    taught(task, statistics, transfer_cache_mb=16)
    object.__setattr__(task, "training", tiny_items("vit", TRAINING, 9))
    second, plain = taught(task, statistics, transfer_cache_mb=16), taught(task)
    assert [loss for _, loss in second.curve] == pytest.approx([loss for _, loss in plain.curve], rel=1e-3)


def test_all_teachers_share_the_budget_and_what_was_used_longest_ago_goes(few, folder):
    task = tiny_task("vit")
    answer_bytes = TRAINING * 4 * 4  # bytes of the answers of one teacher: 1 "MB"
    assert 0.5 * 1000 < answer_bytes < 1000
    statistics, options = Statistics(task), {"align": "none", "transfer_cache_mb": 1}
    answers = lambda: {key for key in statistics.kept.get("teachers' answers")[0]}  # noqa: E731, C416
    assert taught(task, statistics, **options).warnings == ()
    assert answers() == {(False, "dense", (True, ()))}
    assert distilled(task, statistics=statistics, teacher_cache_mb=1).warnings == ()
    assert answers() == {(False, "tiny-vit", (False, False, False))}  # both would be 1.28 "MB"
    compressed = taught(task, statistics, transfer_cache_mb=1, transfer_cache_disk_mb=1, align="geodesic")
    assert compressed.warnings == (
        (
            "transfer_cache_mb=1 and transfer_cache_disk_mb=1 are too little for the teacher's answers to 40"
            " training items, 27 MB: they are computed at each step"
        ),
    )
    assert same(weights(compressed.model), weights(taught(task, align="geodesic").model))
    compressed = taught(task, statistics, transfer_cache_mb=1, transfer_steps=2)
    assert compressed.warnings == (
        "transfer_cache_mb=1 is not used: 2 steps of 8 items read fewer than the 40 training items",
    )


def test_states_that_have_no_row_for_each_item_are_not_kept(monkeypatch):
    task = tiny_task("vit")
    plain = torch.nn.Module.__call__

    def flat(module, *args, **named):
        states = plain(module, *args, **named)
        return states.flatten(0, 1) if type(module).__name__ == "Rows" else states

    class Rows(torch.nn.Identity):
        """A block that passes on all tokens of all items in one list."""

    monkeypatch.setattr(torch.nn.Module, "__call__", flat)
    cache, _ = teacher_cache(
        lambda items: SeenStates(
            torch.zeros(len(items), 4), {"aims": (Rows()(torch.zeros(len(items), 5, 3)),)}
        ),
        task.model,
        task.training,
        16,
    )
    assert not cache.by_item


def test_a_teacher_that_runs_out_of_memory_is_asked_about_fewer_items_at_a_time():
    task = tiny_task("vit")

    def answers(items):
        if len(items) > 3:
            raise torch.OutOfMemoryError(f"CUDA out of memory for {len(items)} items")
        return SeenStates(task.kind.logits(task.model, items))

    cache, _ = teacher_cache(answers, task.model, task.training, 16)
    index = torch.tensor([5, 39, 0, 5])
    assert torch.allclose(
        cache.look_up(index).logits, task.kind.logits(task.model, task.training[index]), atol=1e-5
    )


@pytest.mark.parametrize("bad", ["dense", "other"])
def test_a_teacher_that_answers_nan_is_refused_by_its_name(tmp_path, bad):
    task = tiny_task("vit")
    name = other_teacher(tmp_path / "a")
    if bad == "dense":
        task.model.classifier.bias.data[1] = torch.nan
    else:
        model = vit()
        model.classifier.weight.data[1] = 3e38  # finite, as a checkpoint must be; its answer overflows
        model.save_pretrained(name)
    with pytest.raises(
        CompressionError,
        match=(
            rf"teacher '{'dense' if bad == 'dense' else re.escape(name)}' answers with numbers that are not"
            r" finite \(1 of 4\): nothing can be learned from them; check its weights"
        ),
    ):
        taught(task, teachers=f"dense,{name}")


@pytest.mark.parametrize("where", [{}, {"teacher_cache_mb": 16}], ids=["computed", "kept"])
def test_a_teacher_that_answers_nan_to_some_items_is_refused_when_it_does(where):
    task = tiny_task("vit")
    task.training.inputs["pixel_values"][1:] *= 1e38  # overflows
    with pytest.raises(
        CompressionError,
        match=(
            r"teacher 'tiny-vit' answers with numbers that are not finite \(\d+ of 32\): .* check its weights"
            r" and the training items, or load it in float32"
        ),
    ):
        distilled(task, **where)
