"""Packing codes into bytes: every width, every length, exact sizes, and nothing that does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.formats.bit_packing import pack, unpack

WIDTHS = range(1, 9)


def by_hand(codes: list[int], bits: int) -> list[int]:
    """Pack through Python's unbounded integers: code i takes bits [i * bits, (i + 1) * bits), least
    significant first."""
    word = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(word.to_bytes(-(-len(codes) * bits // 8), "little"))


@given(bits=st.sampled_from(WIDTHS), data=st.data())
def test_packing_is_the_documented_format_and_unpacking_gives_the_codes_back(bits, data):
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == by_hand(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_b_bit_codes_take_b_bits(bits, count, device):
    codes = torch.arange(count, device=device) % (1 << bits)
    packed = pack(codes, bits)
    assert packed.nbytes == (count * bits + 7) // 8
    assert packed.device.type == device
    assert torch.equal(unpack(packed, bits, count).long(), codes)


def test_a_million_3_bit_weights_take_375_000_bytes():
    assert pack(torch.randint(8, (1000, 1000)), 3).nbytes == 375_000


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5), ()])
def test_any_shape_and_integer_type_is_packed_in_row_major_order(shape):
    codes = torch.randint(4, shape)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(pack(codes.to(dtype), 2), pack(codes.flatten(), 2))
    assert torch.equal(pack(codes.bool(), 1), pack(codes.bool().long(), 1))


def test_packing_does_not_share_memory_with_its_input():
    codes = torch.randint(256, (16,), dtype=torch.uint8)
    packed = pack(codes, 8)
    restored = unpack(packed, 8, 16)
    packed.zero_()
    assert torch.equal(restored, codes)


def test_a_view_that_is_not_contiguous_is_packed_in_the_order_in_which_it_reads():
    codes = torch.arange(12).view(3, 4).t()
    assert unpack(pack(codes, 4), 4, 12).tolist() == codes.flatten().tolist()


@pytest.mark.parametrize(
    ("code", "bits"),
    [(2, 1), (4, 2), (16, 4), (200, 7), (255, 7), (256, 4), (256, 8), (300, 8), (-1, 3), (-1, 8), (-256, 4)],
)
def test_a_code_that_does_not_fit_is_refused(code, bits):
    with pytest.raises(ValueError, match=rf"code {code} does not fit in {bits} bits"):
        pack(torch.tensor([0, code, 1]), bits)


@pytest.mark.parametrize("bits", [0, 9, 16, -1])
def test_widths_that_cannot_be_packed_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits}: from 1 to 8 can be packed"):
        pack(torch.tensor([0]), bits)
    with pytest.raises(ValueError, match=f"bits={bits}: from 1 to 8 can be packed"):
        unpack(torch.tensor([0], dtype=torch.uint8), bits, 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("off", [-1, 1])
def test_bytes_of_the_wrong_number_are_refused(bits, off):
    packed = pack(torch.zeros(100, dtype=torch.uint8), bits)
    wrong = packed[:-1] if off < 0 else torch.cat([packed, packed[:1]])
    with pytest.raises(
        ValueError, match=f"100 codes of {bits} bits take {len(packed)} bytes; got {len(wrong)}"
    ):
        unpack(wrong, bits, 100)
