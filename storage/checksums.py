"""CRC-32 of a whole from the CRC-32s of its parts, in any number of them (zlib does not offer it to Python).

Appending n bytes to a message multiplies its remainder by x^8n modulo the polynomial of zlib (RFC 1952): the remainder
of the whole is that product plus the remainder of what was appended.
"""

from collections.abc import Iterable
from functools import cache, lru_cache

_POLYNOMIAL = 0xEDB88320  # bit 31 is the coefficient of x^0
_ONE = 1 << 31


def combined_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of parts put together; each is its number of bytes and its CRC-32."""
    whole = 0
    for size_bytes, crc32 in parts:
        whole = _product(_power(size_bytes), whole) ^ crc32
    return whole


@lru_cache(maxsize=256)  # most parts are of the same few sizes
def _power(size_bytes: int) -> int:
    """x^(8 size_bytes)."""
    result = _ONE
    for place in range(size_bytes.bit_length()):
        if size_bytes >> place & 1:
            result = _product(_doubled(place), result)
    return result


@cache
def _doubled(place: int) -> int:
    """x^(8 2^place)."""
    if not place:
        return _ONE >> 8
    half = _doubled(place - 1)
    return _product(half, half)


def _product(one: int, other: int) -> int:
    result, mask = 0, _ONE
    while one:
        if one & mask:
            result ^= other
            one ^= mask
        mask >>= 1
        other = (other >> 1) ^ (_POLYNOMIAL if other & 1 else 0)
    return result
