import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization.trits import pack_trits, unpack_trits


@given(st.lists(st.integers(0, 2), max_size=33))
def test_five_codes_in_a_byte_and_back(codes: list[int]) -> None:
    packed = pack_trits(torch.tensor(codes, dtype=torch.uint8))
    number = sum(
        sum(code * 3**place for place, code in enumerate(codes[start : start + 5])) << 8 * (start // 5)
        for start in range(0, len(codes), 5)
    )
    assert bytes(packed.tolist()) == number.to_bytes(-(-len(codes) // 5), "little")
    assert unpack_trits(packed, len(codes)).tolist() == codes


def test_what_is_no_such_stream_is_refused() -> None:
    with pytest.raises(QuantizationError, match="code 3 is not ternary"):
        pack_trits(torch.tensor([3], dtype=torch.uint8))
    with pytest.raises(QuantizationError, match="1 bytes cannot hold 6 ternary codes"):
        unpack_trits(torch.zeros(1, dtype=torch.uint8), 6)
    with pytest.raises(QuantizationError, match="byte 243 is no five ternary codes"):
        unpack_trits(torch.tensor([243], dtype=torch.uint8), 5)
