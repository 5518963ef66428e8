"""What is computed once: within its budget, and the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from caches import CPU, RECIPES, check_same, keeping, numbers, plain_value
from tiny_tasks import same, tiny_task, weights

from workbench.calibration.memory_cache import Budget, Cache
from workbench.calibration.statistics import Statistics
from workbench.calibration.tensor_tree import (
    NotPlainError,
    checksums,
    class_named,
    is_plain,
    relocated,
    storages_in,
)
from workbench.compress import compress

# --- plain data


def test_a_value_comes_back_bit_by_bit_with_its_views_strides_and_shared_objects():
    whole = numbers(24).view(4, 6)
    value = plain_value(whole)
    assert sum(map(len, storages_in(value).values())) == whole.nbytes + whole.half().nbytes
    again = relocated(value, lambda storage: storage.clone())
    assert again["same"].data_ptr() != whole.data_ptr()
    check_same(again, whole)


@dataclasses.dataclass(frozen=True)
class Foreign:
    value: int


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 2),
        lambda: 1,
        Foreign(1),
        {1, 2},
        torch.nn.Parameter(torch.ones(2)),
        numbers().requires_grad_(),
        {"a": [object()]},
    ],
    ids=["module", "function", "record", "set", "parameter", "with gradient", "object"],
)
def test_what_is_no_plain_data_is_not_moved(value):
    assert not is_plain(value)
    with pytest.raises(NotPlainError, match="is no plain data"):
        relocated(value, lambda storage: storage)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "workbench.calibration.statistics.Statistics",
        "workbench.recipe.Recipe",
        "test_cache.Foreign",
        "workbench.calibration.statistics.absent",
    ],
)
def test_a_file_cannot_name_other_code(name):
    with pytest.raises(NotPlainError):
        class_named(name)


def test_memory_that_is_shared_counts_once():
    whole = numbers(1000)
    linear = torch.nn.Linear(10, 10)
    assert (
        sum(
            storage.numel()
            for storage in storages_in([whole, whole[10:], {"a": whole.view(10, 100)}, (whole,)]).values()
        )
        == whole.nbytes
    )
    assert (
        sum(storage.numel() for storage in storages_in((linear, linear.weight)).values())
        == linear.weight.nbytes + linear.bias.nbytes
    )


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4096])
def test_a_checksum_notices_every_bit(count):
    storage = torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = checksums([storage])
    for place in range(min(count, 20)):
        storage[place] ^= 1 << (place % 8)
        assert checksums([storage]) != before
        storage[place] ^= 1 << (place % 8)
    assert checksums([storage]) == before


# --- budgets


def test_the_least_recently_used_goes_first():
    cache, computed = keeping(Budget(3 * numbers().nbytes)), []
    for key in "abcadb":
        cache.begin()
        cache.once(key, lambda key=key: computed.append(key) or numbers(seed=ord(key)))
    assert computed == list("abcdb")
    assert list(cache) == ["a", "d", "b"]
    assert cache.used_bytes == {"device": 3 * numbers().nbytes, "host": 0}


def test_a_move_does_not_throw_out_what_it_has_used():
    cache, computed = keeping(Budget(2 * numbers().nbytes)), []

    def ask(key: str, *, optional: bool) -> None:
        cache.once(key, lambda: computed.append(key) or numbers(), optional=optional)

    for _ in range(2):
        cache.begin()
        for key in "abcd":
            ask(key, optional=True)
    assert computed == list("abcdcd")  # what does not fit is not kept: the others are there again next time
    cache.begin()
    ask("statistics", optional=False)
    ask("more statistics", optional=False)
    ask("even more", optional=False)
    assert {"statistics", "more statistics", "even more"} <= set(
        cache
    )  # asked for many times a move: over the budget until the next
    cache.begin()
    assert cache.used_bytes["device"] <= 2 * numbers().nbytes


def test_what_goes_first_goes_before_what_is_older():
    cache = keeping(Budget(2 * numbers().nbytes))
    cache.once("old", numbers)
    cache.begin()
    cache.once("state", numbers, first_out=True)
    cache.begin()
    cache.once("new", numbers)
    assert list(cache) == ["old", "new"]


def test_what_leaves_the_device_waits_on_the_host_and_comes_back_bit_by_bit(device):
    cache = Cache(torch.device(device), Budget(numbers().nbytes, 2 * numbers().nbytes))
    value = numbers().to(device)
    wanted = value.cpu().clone()
    cache.once("a", lambda: {"x": value, "y": value[2:]})
    for key in "bc":
        cache.begin()
        cache.once(key, lambda: numbers(seed=5).to(device))
    assert cache.used_bytes == {"device": wanted.nbytes, "host": 2 * wanted.nbytes}
    cache.begin()
    again = cache.once("a", lambda: pytest.fail("computed again"))
    assert again["x"].device.type == device
    assert torch.equal(again["x"].cpu(), wanted)
    assert again["y"].untyped_storage().data_ptr() == again["x"].untyped_storage().data_ptr()
    for key in "de":
        cache.begin()
        cache.once(key, lambda: numbers().to(device))
    assert cache.used_bytes["host"] <= 2 * wanted.nbytes
    assert cache.used_bytes["device"] <= wanted.nbytes


def test_memory_of_the_model_and_memory_that_two_values_share_count_once():
    task = tiny_task("vit")
    kept = Statistics(task).kept
    kept.once("its weights", lambda: dict(task.model.named_parameters()))
    assert kept.used_bytes["device"] == 0
    whole = numbers(100)
    kept.once("one", lambda: whole)
    kept.once("part", lambda: whole[:10])
    assert kept.used_bytes["device"] == whole.nbytes
    kept.pop("one")
    assert kept.used_bytes["device"] == whole.nbytes
    kept.pop("part")
    assert kept.used_bytes["device"] == 0


@pytest.mark.parametrize(
    "budget", [Budget(0), Budget(2000), Budget(8000), Budget(0, 10**9), Budget(4000, 6000)], ids=str
)
def test_a_tiny_budget_changes_no_bit(sort, budget):
    task = tiny_task(sort)
    kept = Statistics(task, cache=Cache(CPU, budget, held=lambda: task))
    for recipe in (*RECIPES, *RECIPES):
        mine, fresh = compress(task, recipe, kept), compress(task, recipe)
        assert same(weights(mine.model), weights(fresh.model))
        assert mine.report == fresh.report
        kept.kept.begin()
        assert kept.kept.used_bytes["device"] <= budget.device
        assert kept.kept.used_bytes["host"] <= budget.host
