"""The suite of benchmarks: every part runs, results survive an interruption, and no page says what no result
says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import random_task  # noqa: E402
from benchmarks.suite import against, drawing, growth, limits, memory, page, slider  # noqa: E402
from benchmarks.suite.record import RESULTS, Options, Record  # noqa: E402

README = ROOT / "README.md"
TOY = Options("cpu", moves=1, context=16, windows=40, ledger_sizes=(3,), shapes=("tiny",))
MEASURED = re.compile(r"\b\d[\d.,]*\s?(?:ms|s|seconds|minutes|x|times|MB|GB|GB/s|TFLOP/s)(?![\w-])")


def test_the_page_is_what_the_results_say():
    results = page.results(RESULTS)
    assert (RESULTS / page.PAGE).read_text() == page.page(results)
    for name, text in page.figures(results).items():
        assert (RESULTS / name).read_text() == text


def test_the_readme_quotes_no_measured_number_that_the_suite_does_not_write():
    text = README.read_text()
    quoted = page.quoted(page.results(RESULTS))
    assert text.count(page.BEGIN) == 1
    assert quoted in text
    assert MEASURED.findall(text.replace(quoted, "")) == []


@pytest.mark.parametrize(
    "text", ["takes 12 ms", "is 1.63x faster", "3.5 s a move", "of 92.9 MB", "1,200 seconds", "10 times"]
)
def test_these_are_measured_numbers(text):
    assert MEASURED.search(text)


def test_settings_and_versions_are_none():
    assert not MEASURED.search("looks at 16, 64, 256 items of 2 to 8 bits, 95%, W8A8, Python 3.11, 2:4")


def toy(part, folder: Path, **changes) -> Record:
    record = Record("part", "tiny", "a toy", "cpu", folder)
    part.run("tiny", Options(**(vars(TOY) | changes)), record)
    assert json.loads((folder / "part-tiny-cpu.json").read_text())["rows"] == record.rows
    return record


def test_a_slider_is_moved_through_the_panels_own_session(tmp_path):
    (row,) = toy(slider, tmp_path, sliders=("sparsity",)).rows
    assert row["moves"] == 1
    assert 0 < row["predicted_ms"] < row["first_ms"] <= row["all_ms"] <= row["complete_ms"]


def test_a_move_can_end_when_all_items_are_read(tmp_path):
    (row,) = toy(slider, tmp_path, sliders=("sparsity",), quality_only=True).rows
    assert 0 < row["first_ms"] <= row["all_ms"]
    assert not {"complete_ms", "cold_complete_ms"} & row.keys()


def test_a_part_ends_with_what_it_has_when_its_time_is_over(tmp_path):
    record = toy(memory, tmp_path, seconds=1e9, sliders=("sparsity", "rank"))
    assert [row["name"] for row in record.rows] == ["sparsity", "rank"]
    late = Record("part", "tiny", "a toy", "cpu", tmp_path)
    late.add(name="measured")
    late.begun -= 10
    assert late.late(Options(seconds=5), "the rest")
    written = json.loads((tmp_path / "part-tiny-cpu.json").read_text())
    assert written["stopped"] == "5 s were over before the rest"
    assert written["rows"] == [{"name": "measured"}]
    for name in ("what", "command", "date", "device", "versions", "load"):
        assert written[name]


def test_memory_counts_the_copy_and_what_is_kept(tmp_path):
    record = toy(memory, tmp_path, sliders=("rank",))
    (row,) = record.rows
    assert 0 < row["compressed_bytes"] < record.settings["dense_bytes"]
    assert row["cached_bytes"] > 0
    assert (
        row["peak_bytes"]
        == record.settings["dense_bytes"]
        + row["compressed_bytes"]
        + row["cached_bytes"]
        + row["beyond_bytes"]
    )


def test_limits_count_operations_and_bytes_as_by_hand(tmp_path):
    task = random_task("tiny", torch.device("cpu"), 16, 2)
    hidden, layers, middle, shared, vocabulary = 64, 2, 128, 32, 512  # of the shape
    weights = layers * (2 * hidden * hidden + 2 * hidden * shared + 3 * hidden * middle) + hidden * vocabulary
    attention = layers * 4 * 16 * 16 * hidden
    angles = 2 * 16 * (16 // 2)  # of rotary positions, which some versions write as a product of matrices
    assert 2 * 16 * weights <= limits.flop(task, task.evaluation[:1]) <= 2 * 16 * weights + attention + angles
    half = torch.nn.Linear(4, 4, bias=False)
    wider = torch.nn.Linear(4, 4, bias=False)
    assert limits.moved(half, half) == 0
    assert limits.moved(half, wider) == 2 * 4 * 16
    rows = toy(limits, tmp_path).rows
    assert rows[0]["times_floor"] > 0
    assert {row["name"] for row in rows} == {
        "evaluation",
        "apply sparsity",
        "apply bits",
        "apply sparsity + bits",
        "apply sparsity, wanda",
        "apply rank, svd",
    }


def test_shares_of_bandwidth_are_bytes_over_time_over_what_a_copy_reaches():
    shares = limits.shares(least=4_000, moved=12_000, spent=2e-6, busy=1e-6, bandwidth=2e10)
    assert shares == {
        "of_bandwidth": 0.1,
        "moved_bytes": 12_000,
        "moved_of_bandwidth": 0.3,
        "busy_ms": 0.001,
        "busy_of_bandwidth": 0.6,
    }
    assert limits.shares(least=4_000, moved=0, spent=2e-6, busy=None, bandwidth=2e10) == {
        "of_bandwidth": 0.1
    }  # plain operations ran


def test_passes_count_what_they_read_and_write(monkeypatch):
    from workbench.kernels import weight_passes

    weights = [torch.zeros(4, 8, dtype=torch.bfloat16) for _ in range(3)]  # 3 x 64 bytes
    masks = torch.ones(3, 4, 8, dtype=torch.bool)  # 96 bytes
    monkeypatch.setattr(
        weight_passes,
        "prune",
        lambda weights, threshold, stay: ([weight.clone() for weight in weights], masks),
    )
    edge = torch.zeros(3, 1, dtype=torch.int32)  # 12 bytes
    with limits.counted() as pass_bytes:
        pruned, _ = weight_passes.prune(weights, edge, edge + 1)
    assert len(pruned) == 3
    assert pass_bytes == [2 * 192 + 2 * 12 + 192 + 96]  # read twice, thresholds, written, masks
    weight_passes.prune(weights, edge, edge)
    assert len(pass_bytes) == 1


def test_moved_models_stand_beside_resident_ones():
    row = {
        "move": "bits",
        "recipe": "W4 g64",
        "time": 0,
        "compress_s": 0.1,
        "first_s": 0.5,
        "all_s": 2.0,
        "complete_s": 3.0,
    }
    result = {
        "target": "1.1b",
        "device": "NVIDIA H200",
        "file": "streaming-1.1b-cuda.json",
        "same_bits": True,
        "memory_gb": 4.0,
        "windows": 64,
        "context": 512,
        "model_bytes": 2_200_000_000,
        "rows": [
            {**row, "placement": "device"},
            {
                **row,
                "placement": "streamed",
                "forecast_first_s": 0.4,
                "forecast_all_s": 1.5,
                "peak_bytes": 3_000_000_000,
            },
        ],
    }
    text = "\n".join(page.streaming([result]))
    assert (
        "4 GB of memory allowed, 64 windows of 512 tokens, a model of 2,200 MB; the same bits come out."
        in text
    )
    assert "| bits: W4 g64 | resident | first | 0.1 | 0.5 |  | 2 |  | 3 |  |" in text
    assert "| bits: W4 g64 | streamed | first | 0.1 | 0.5 | 0.4 | 2 | 1.5 | 3 | 3,000 |" in text
    assert "**other bits come out**" in "\n".join(page.streaming([{**result, "same_bits": False}]))


def test_growth_measures_everything_that_grows(tmp_path):
    rows = toy(growth, tmp_path).rows
    assert [row["grows"] for row in rows] == [*["items"] * 3, *["layers changed"] * 3, "parameters", "ledger"]
    assert [row["size"] for row in rows if row["grows"] == "layers changed"] == [1, 1, 2]


def test_a_filled_ledger_holds_so_many_points_that_differ(tmp_path, ledger):
    import workbench as wb

    bench = wb.Bench(random_task("tiny", torch.device("cpu"), 16, 2), ledger=ledger, progress=False)
    row = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))
    growth.filled(tmp_path / "many.journal", row, 12)
    rows = wb.Ledger(tmp_path / "many.journal").rows()
    assert len({copy.key for copy in rows}) == 12
    assert len({copy.sizes.file_bytes for copy in rows}) > 1
    assert len({copy.recipe for copy in rows}) == len({copy.primary.drop for copy in rows}) == 12
    assert {(type(step), len(copy.recipe)) for copy in rows for step in copy.recipe} == {(wb.Prune, 1)}
    assert all(
        copy.primary.change.low < copy.primary.change.value < copy.primary.change.high for copy in rows
    )
    assert {copy.layers for copy in rows} == {row.layers}


def test_the_plain_way_rounds_as_the_product_does_and_a_missing_peer_says_why(tmp_path):
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    rounded = against.rounded(weight, 4, 64)
    assert all(len(set(group.tolist())) <= 16 for group in rounded.reshape(-1, 64))
    assert (rounded - weight).abs().max() <= (
        weight.reshape(6, 2, 64).amax(-1) - weight.reshape(6, 2, 64).amin(-1)
    ).max() / 15
    record = toy(against, tmp_path)
    first, *peers = record.rows
    assert first["theirs"]["value"] == pytest.approx(first["ours"]["warm_value"], rel=1e-3)
    assert all(
        first["ours"][f"{when}_{what}_s"] > 0
        for when in ("cold", "warm")
        for what in ("predicted", "first_look", "full")
    )
    assert first["rounds"] == against.ROUNDS
    assert all(
        first["ours"][f"{when}_first_look_s"] <= first["ours"][f"{when}_full_s"] for when in ("cold", "warm")
    )
    assert first["processor_over_full"] == pytest.approx(
        first["theirs"]["full_processor_s"] / first["ours"]["warm_full_processor_s"], abs=0.02
    )
    for row in peers:
        assert "theirs" in row or "No module named" in row["failed"]


def test_pages_say_whether_an_aim_was_reached():
    assert page.aimed(100.0, 120) == "100 (aim 120: reached)"
    assert page.aimed(0.5, 0.6, least=True) == "0.5 (aim 0.6: **not reached**)"
    assert page.number(1234.6) == "1,230"
    assert page.number(0.0123456) == "0.0123"


def test_figures_put_ten_times_as_much_one_decade_further():
    svg = drawing.bars("title", "ms", [("a", "one", 1.0, None), ("b", "one", 10.0, 100.0)])
    ends = [float(x) for x in re.findall(r"H([\d.]+)v14", svg)]
    (aim,) = re.findall(r'd="M([\d.]+) \d+v18"', svg)
    assert float(aim) - ends[1] == pytest.approx(ends[1] - ends[0])
    assert "polyline" in drawing.lines("title", "x", "y", {"a": [(1, 1), (10, 5)]})
