import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization.packing import pack, packed_bytes, unpack

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "packed_codes.json").read_text())


@given(st.integers(1, 8), st.data())
def test_streams_are_dense_little_endian_and_come_back(num_bits, data):
    codes = data.draw(st.lists(st.integers(0, (1 << num_bits) - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), num_bits)
    number = sum(code << (place * num_bits) for place, code in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(packed_bytes(len(codes), num_bits), "little")
    assert unpack(packed, num_bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_golden_streams(num_bits):
    golden = GOLDEN[str(num_bits)]
    packed = pack(torch.tensor(golden["codes"], dtype=torch.uint8), num_bits)
    assert bytes(packed.tolist()).hex() == golden["stream"]


def test_inputs_stay_as_they_are():
    codes = torch.arange(16, dtype=torch.uint8)
    packed = pack(codes, 8)
    packed[:] = 0
    assert codes.tolist() == list(range(16))


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(QuantizationError, match="code 8 does not fit in 3 bits"):
        pack(torch.tensor([1, 8], dtype=torch.uint8), 3)


def test_short_streams_are_refused():
    with pytest.raises(QuantizationError, match="2 bytes cannot hold 5 codes of 4 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)
