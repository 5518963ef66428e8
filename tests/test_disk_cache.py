"""What is kept on disk: for the next process, whole or not at all, and never another's bits."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from caches import MB, RECIPES, check_same, keeping, numbers, plain_value
from click.testing import CliRunner
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.calibration import disk_cache as on_disk
from workbench.calibration.disk_cache import WHERE, DiskCache, contents, key_text, setting
from workbench.calibration.memory_cache import Budget
from workbench.calibration.statistics import Statistics
from workbench.cli import workbench as command
from workbench.compress import compress
from workbench.recipe import Recipe


def drawn(place: Path, task: object = None, limit: int = 64 * MB) -> DiskCache:
    return DiskCache(place, task or tiny_task("vit"), limit=limit, worth_seconds=0.0)


def files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.pt"))


def test_another_process_begins_where_this_one_ended(tmp_path, sort):
    task = tiny_task(sort)
    for recipe in RECIPES:
        wanted = compress(task, recipe)
        first = Statistics(task, cache=keeping(Budget(64 * MB), drawn(tmp_path, task)))
        compress(task, recipe, first)
        again = tiny_task(sort)
        second = Statistics(again, cache=keeping(Budget(64 * MB), drawn(tmp_path, again)))
        heard: list[str] = []
        second.progress = lambda what, *_, heard=heard: heard.append(what)
        mine = compress(again, recipe, second)
        assert same(weights(mine.model), weights(wanted.model))
        assert mine.report == wanted.report
        assert mine.warnings == wanted.warnings
        assert not {"calibration", "gradients"} & set(heard)


def test_only_what_took_long_is_written(tmp_path):
    disk = DiskCache(tmp_path, tiny_task("vit"))
    cache = keeping(Budget(MB), disk)
    cache.once("quick", numbers, lasting=True)
    cache.once("not lasting", lambda: time.sleep(0.25) or numbers())
    cache.once("slow", lambda: time.sleep(0.25) or numbers(), lasting=True)
    cache.once("a function", lambda: time.sleep(0.25) or print, lasting=True)
    assert [path.name for path in files(tmp_path)] == [disk.path("slow").name]


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(numbers(1000).numpy().tobytes()) + 1234] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def other_key(path: Path) -> None:
    second = keeping(Budget(MB), drawn(path.parent / "other"))
    second.once("another key", lambda: numbers(seed=9), lasting=True)
    files(path.parent / "other")[0].replace(path)


@pytest.mark.parametrize("damage", [flipped, cut, emptied, torn, other_key])
def test_a_damaged_file_is_ignored_and_written_anew(tmp_path, damage):
    disk = drawn(tmp_path)
    keeping(Budget(MB), disk).once("key", lambda: numbers(1000), lasting=True)
    (path,) = files(tmp_path)
    good = path.read_bytes()
    damage(path)
    damaged = path.read_bytes()
    assert damaged != good
    with pytest.warns(RuntimeWarning, match="could not be read and was computed anew") as said:
        value = keeping(Budget(MB), disk).once("key", lambda: numbers(1000), lasting=True)
    assert len(said) == 1
    assert torch.equal(value, numbers(1000))
    assert path.read_bytes() != damaged
    assert torch.equal(
        keeping(Budget(MB), disk).once("key", lambda: pytest.fail("computed again"), lasting=True),
        numbers(1000),
    )


def blocked(place: Path, patch: pytest.MonkeyPatch) -> None:
    place.rmdir()
    place.write_text("a file where a folder should be")


def full(place: Path, patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("workbench.util.saving.torch.save", refuse)


def read_only(place: Path, patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    patch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("trouble", [blocked, full, read_only])
def test_what_cannot_be_written_costs_one_warning_and_never_the_value(tmp_path, monkeypatch, trouble):
    place = tmp_path / "place"
    place.mkdir()
    trouble(place, monkeypatch)
    disk = drawn(place)
    cache = keeping(Budget(MB), disk)
    with pytest.warns(
        RuntimeWarning, match=rf"is not kept for the next session: .* cannot be written .*{WHERE}=off"
    ):
        assert torch.equal(cache.once("a", numbers, lasting=True), numbers())
    assert torch.equal(
        cache.once("b", numbers, lasting=True), numbers()
    )  # warnings are errors here: a second one would fail
    assert not list(place.rglob("*.part")) if place.is_dir() else True


def test_a_value_comes_back_bit_by_bit_with_its_views_strides_and_shared_objects(tmp_path):
    whole = numbers(24).view(4, 6)
    disk = drawn(tmp_path)
    disk.offer("key", plain_value(whole), 1.0)
    check_same(*disk.read("key"), whole)


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.where}",)


@pytest.mark.parametrize(
    "foreign",
    [Harm, lambda _: wb.Recipe(), lambda _: tiny_task("vit").model, lambda _: on_disk.setting],
    ids=["os.system", "a class of this package that is no record", "a module", "a function"],
)
def test_a_file_that_names_other_code_is_refused_and_runs_none(tmp_path, foreign):
    disk = drawn(tmp_path / "cache")
    path = disk.path("key")
    path.parent.mkdir(parents=True)
    torch.save({"key": "'key'", "checksums": [], "value": foreign(tmp_path / "harmed")}, path)
    assert disk.read("key") is None
    assert not (tmp_path / "harmed").exists()
    torch.load(path, weights_only=False)  # it would have
    assert (tmp_path / "harmed").exists() == (foreign is Harm)
    with pytest.warns(RuntimeWarning, match=r"computed anew: .* is no dataclass of this package"):
        value = keeping(Budget(MB), disk).once("key", numbers, lasting=True)
    assert torch.equal(disk.read("key")[0], value)


def test_another_version_of_the_code_reads_nothing_of_this_one(tmp_path, monkeypatch):
    disk = drawn(tmp_path)
    keeping(Budget(MB), disk).once("key", numbers, lasting=True)
    assert drawn(tmp_path).read("key") is not None
    monkeypatch.setattr(on_disk, "sources", lambda: "changed")
    assert drawn(tmp_path).read("key") is None


def test_the_disk_keeps_what_was_used_last_within_its_limit(tmp_path):
    task = tiny_task("vit")
    old = tmp_path / "model" / "setting" / "of-a-version-before.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(20_000))
    os.utime(old, (999, 999))
    disk = drawn(tmp_path, task, limit=40_000)
    for age, key in enumerate("abc"):
        keeping(Budget(MB), disk).once(key, lambda: numbers(2000), lasting=True)
        os.utime(disk.path(key), (1000 + age, 1000 + age))
    keeping(Budget(MB), disk).once("a", lambda: pytest.fail("computed again"), lasting=True)  # used now
    for key in "de":
        keeping(Budget(MB), disk).once(key, lambda: numbers(2000), lasting=True)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 40_000
    assert disk.path("a").exists()
    assert disk.path("e").exists()
    assert not disk.path("b").exists()
    assert not old.exists()
    keeping(Budget(MB), disk).once("huge", lambda: numbers(8000), lasting=True)  # more than half of the limit
    assert not disk.path("huge").exists()


def changed_weight(task):
    model = tiny_task("vit").model
    next(iter(model.parameters())).view(-1)[3] += 1e-6
    return dataclasses.replace(task, model=model)


def changed_data(task):
    return dataclasses.replace(task, calibration=task.calibration[:20])


def changed_batch(task):
    return dataclasses.replace(task, batch_size=8)


@pytest.mark.parametrize("change", [changed_weight, changed_data, changed_batch])
def test_another_model_or_other_data_under_the_same_names_are_not_mixed_up(tmp_path, change):
    task = tiny_task("vit")
    changed = change(task)
    assert changed.model_fingerprint == task.model_fingerprint
    assert setting(task) == setting(tiny_task("vit"))
    assert setting(changed) != setting(task)
    first = Statistics(task, cache=keeping(Budget(MB), drawn(tmp_path, task)))
    first.moments()
    second = Statistics(changed, cache=keeping(Budget(MB), drawn(tmp_path, changed)))
    moments, wanted = second.moments(), Statistics(changed).moments()
    assert all(torch.equal(moments.matrices[name], wanted.matrices[name]) for name in wanted.matrices)
    assert moments.rows == wanted.rows


def test_keys_are_text_that_every_process_writes_alike():
    assert (
        key_text(("scales", on_disk.WORTH_SECONDS, None, ("a", 1, True)))
        == "('scales', 0.2, None, ('a', 1, True))"
    )
    assert key_text(("x", object())) is None
    assert key_text(Recipe) is None
    assert key_text((wb.Prune(sparsity=0.5),)) != key_text((wb.Prune(sparsity=0.6),))


WRITER = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import torch
    from tiny_tasks import tiny_task
    from workbench.calibration.memory_cache import Budget, Cache
    from workbench.calibration.disk_cache import DiskCache

    disk = DiskCache(Path({place!r}), tiny_task("vit"), worth_seconds=0.0)
    cache = Cache(torch.device("cpu"), Budget(2**30), disk)
    print("ready", flush=True)
    for turn in range({turns}):
        for key in "abcdef":
            cache.once(key, lambda: torch.arange(200_000, dtype=torch.float32) + ord(key), lasting=True)
            cache.pop(key)
            if {drop}:
                disk.path(key).unlink(missing_ok=True)
    print("done", flush=True)
"""


def writing(place: Path, turns: int, *, drop: bool = False) -> subprocess.Popen[str]:
    code = textwrap.dedent(WRITER).format(
        tests=str(Path(__file__).parent), place=str(place), turns=turns, drop=drop
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def check_all(place: Path) -> None:
    disk = drawn(place)
    for key in "abcdef":
        value = keeping(Budget(64 * MB), disk).once(
            key, lambda key=key: torch.arange(200_000, dtype=torch.float32) + ord(key), lasting=True
        )
        assert torch.equal(value, torch.arange(200_000, dtype=torch.float32) + ord(key))
    assert len(files(place)) == 6
    for path in files(place):
        assert path.stat().st_size > 800_000


def test_a_process_killed_while_it_writes_leaves_a_cache_that_works(tmp_path):
    with writing(tmp_path, 10_000, drop=True) as child:
        assert child.stdout.readline() == "ready\n"
        until = time.monotonic() + 60
        while not any(tmp_path.rglob("*.part")):  # in the middle of a file
            assert time.monotonic() < until
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    check_all(tmp_path)
    for left in tmp_path.rglob("*.part"):
        os.utime(left, (1, 1))
    drawn(tmp_path).tidy(0)
    assert not list(tmp_path.rglob("*.part"))


def test_two_processes_at_once_share_one_cache(tmp_path):
    children = [writing(tmp_path, 1), writing(tmp_path, 1)]
    for child in children:
        assert child.communicate(timeout=120)[0] == "ready\ndone\n"
        assert child.returncode == 0
    check_all(tmp_path)


# --- what a user sees


def test_the_command_lists_and_clears_it(tmp_path, monkeypatch):
    monkeypatch.setenv(WHERE, str(tmp_path))
    (tmp_path / "not ours").mkdir()
    disk = drawn(tmp_path)
    keeping(Budget(MB), disk).once("a", lambda: numbers(30_000), lasting=True)
    run = CliRunner().invoke(command, ["cache"])
    assert run.exit_code == 0
    assert "tiny-vit" in run.output
    assert "0.1 of at most 4,096 MB" in run.output
    assert [(kept.name, kept.files) for kept in contents(tmp_path)] == [("tiny-vit", 1)]
    assert "0.1 MB deleted" in CliRunner().invoke(command, ["cache", "--clear"]).output
    assert not contents(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["not ours"]


def test_it_can_be_switched_off(monkeypatch, ledger):
    monkeypatch.setenv(WHERE, "off")
    assert wb.Bench(tiny_task("vit"), ledger=ledger, progress=False).statistics.kept.disk is None
    assert "WORKBENCH_CACHE is off" in CliRunner().invoke(command, ["cache"]).output


def test_a_bench_uses_the_folder_that_is_set(monkeypatch, tmp_path, ledger):
    monkeypatch.setenv(WHERE, str(tmp_path / "here"))
    bench = wb.Bench(tiny_task("vit"), ledger=ledger, progress=False)
    assert bench.statistics.kept.disk.place == tmp_path / "here"
    assert not (tmp_path / "here").exists()  # nothing is made before there is something to keep
