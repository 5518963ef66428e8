"""Number formats: every registered one keeps the rules, float4 is that of an independent library, and what
lacks a fact is refused.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_tasks import tiny_task

import workbench as wb
from workbench.errors import RecipeError
from workbench.formats.number_format import FORMATS as BARE
from workbench.formats.number_format import NumberFormat
from workbench.formats.number_formats import FORMATS

CODED = [record for record in FORMATS if record.largest is not None]


@pytest.mark.parametrize("record", CODED, ids=lambda record: record.name)
def test_codes_are_the_nearest_numbers_and_zero_is_one_of_them(record):
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * record.largest / 2
    numbers = record.decoded(torch.arange(1 << record.bits).to(torch.uint8))
    numbers = numbers[torch.isfinite(numbers)].double()
    decoded = record.decoded(record.encoded(values)).double()
    least = (values.double()[:, None] - numbers).abs().amin(1)
    assert torch.equal((values.double() - decoded).abs(), least)
    zeros = torch.zeros(3)
    assert torch.equal(record.decoded(record.encoded(zeros)), zeros)
    assert float(record.decoded(torch.tensor([record.zero()], dtype=torch.uint8))) == 0


def test_float4_is_that_of_ml_dtypes_ties_included():
    reference = pytest.importorskip("ml_dtypes").float4_e2m1fn
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 1e-9])
    values = torch.cat([ties, -ties, torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 3])
    expected = torch.from_numpy(values.numpy().astype(reference).astype(np.float32))
    assert torch.equal(FORMATS["float4"].decoded(FORMATS["float4"].encoded(values)), expected)


FLOAT4 = FORMATS["float4"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"zero_code": None}, "it states no zero_code"),
        ({"largest": None, "zero_code": None}, "it states no largest, no zero_code"),
        ({"zero_code": 1}, "zero_code=1 does not decode to 0"),
        ({"largest": 5.0}, "largest=5.0, but codes reach 6"),
        ({"bits": 5}, "5 bits have 32 codes; levels are 16"),
        ({"bits": None}, "without bits it is integers"),
        ({"levels": None}, "it states no encode, no decode"),
        ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64"),
        ({"cast": torch.float16}, "a cast to torch.float16 has 16 bits and no codes"),
        ({"name": "nf4"}, "the name is taken"),
    ],
)
def test_a_format_whose_facts_do_not_fit_is_refused_at_registration(facts, message):
    record = dataclasses.replace(FLOAT4, **{"name": "broken", **facts})
    with pytest.raises(RecipeError, match=message):
        BARE.register(record)
    assert "broken" not in FORMATS


TERNARY = NumberFormat(
    name="ternary", label="T2", bits=2, levels=(0.0, 1.0, -1.0, -0.5), largest=1.0, zero_code=0
)


def test_a_format_from_elsewhere_is_a_choice_like_any_other(tmp_path):
    BARE.register(TERNARY)
    try:
        assert "ternary" in wb.Quantize.choices("number_format")
        step = wb.Quantize(weight_bits=2, number_format="ternary", group_size=16)
        assert step.label() == "T2 g16"
        task = tiny_task("vit")
        bench = wb.Bench(task, device="cpu", ledger=tmp_path / "points.journal", progress=False)
        grids = [layer.grid for layer in bench.compress(wb.Recipe(step)).layers if layer.grid is not None]
        assert grids
        for grid in grids:
            numbers = grid.dequantize() / grid.scale.float().repeat_interleave(16, 1)
            assert set(numbers.unique().tolist()) <= set(TERNARY.levels)
        exported = bench.export(wb.Recipe(step), tmp_path / "out")
        loaded = wb.load(exported).state_dict()
        for name, value in bench.compress(wb.Recipe(step)).model.state_dict().items():
            assert torch.equal(value, loaded[name])
    finally:
        FORMATS.unregister("ternary")
    with pytest.raises(RecipeError, match="input should be 'float4', .* or 'nf4'"):
        wb.Quantize(weight_bits=2, number_format="ternary")
