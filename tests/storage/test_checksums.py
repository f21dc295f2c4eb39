"""CRC-32 of parts put together, against zlib's of the whole."""

import zlib

from hypothesis import given
from hypothesis import strategies as st

from fleetpress.storage.checksums import combined_crc32


@given(st.lists(st.binary(max_size=300), max_size=12))
def test_it_is_the_checksum_of_the_whole(parts: list[bytes]) -> None:
    assert combined_crc32((len(part), zlib.crc32(part)) for part in parts) == zlib.crc32(b"".join(parts))


def test_large_parts() -> None:
    part = bytes(range(256)) * 40_000
    assert combined_crc32([(len(part), zlib.crc32(part))] * 3) == zlib.crc32(part * 3)
