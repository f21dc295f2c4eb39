"""Codes of 1 to 8 bits as a dense little-endian bit stream: code i is bits i*b to (i+1)*b - 1, lowest bit first."""

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.errors import QuantizationError

_BYTE_FULL = {2: torch.int32, 4: torch.int16}  # codes that fill one byte: where to find as many, a byte each


def packed_bytes(count: int, num_bits: int) -> int:
    """Length of the stream of `count` codes."""
    return -(-count * num_bits // 8)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """The stream, uint8 of `packed_bytes(codes.numel(), num_bits)`, of uint8 codes below 2^num_bits, of any shape.

    Raises QuantizationError for a code that does not fit.
    """
    flat = codes.reshape(-1)
    count = flat.numel()
    if num_bits < 8 and count and int(flat.max()) >> num_bits:
        raise QuantizationError(f"code {int(flat.max())} does not fit in {num_bits} bits")
    if num_bits == 8:
        return flat.clone()
    # Eight codes fill num_bits bytes; a word's codes move together, into pairs, then fours, then all eight.
    padded = functional.pad(flat, (0, -count % 8)) if count % 8 or flat.storage_offset() % 8 else flat
    if num_bits in _BYTE_FULL:
        words = padded.view(_BYTE_FULL[num_bits])
        together = words.clone()
        for place in range(1, words.itemsize):
            together |= words >> place * (8 - num_bits)
        stream = together.to(torch.uint8)
    else:
        words = padded.view(torch.int64).clone()
        for width in (8, 16, 32):
            lower = ((1 << width) - 1) * sum(1 << place for place in range(0, 64, 2 * width))
            upper = (words >> width) & lower
            words &= lower
            words |= upper << num_bits * width // 8
        stream = words.view(torch.uint8).view(-1, 8)[:, :num_bits].reshape(-1)
    return stream[: packed_bytes(count, num_bits)].clone()


def unpack(packed: Tensor, num_bits: int, count: int) -> Tensor:
    """The first `count` codes, uint8 [count], of a stream. Raises QuantizationError if the stream is too short."""
    if packed.numel() < packed_bytes(count, num_bits):
        raise QuantizationError(
            f"{packed.numel()} bytes cannot hold {count} codes of {num_bits} bits; the packed weight is damaged"
        )
    if num_bits == 8:
        return packed[:count].clone()
    packed = packed[: packed_bytes(count, num_bits)]
    stream = functional.pad(packed, (0, -packed.numel() % num_bits)).view(-1, num_bits)
    eights = torch.empty(stream.shape[0], 8, dtype=torch.uint8)
    for place in range(8):
        byte, shift = divmod(place * num_bits, 8)
        codes = stream[:, byte] >> shift
        if shift + num_bits > 8:
            codes |= stream[:, byte + 1] << (8 - shift)
        eights[:, place] = codes & ((1 << num_bits) - 1)
    return eights.view(-1)[:count].clone()
