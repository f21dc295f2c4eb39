"""Ternary codes, five in a byte: byte j is the sum of codes 5j to 5j + 4 times 3^0 to 3^4, at most 242."""

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.errors import QuantizationError

IN_BYTE = 5
BYTES = 3**IN_BYTE  # values that such a byte has


def pack_trits(codes: Tensor) -> Tensor:
    """The stream, uint8 [ceil(codes.numel() / 5)], of uint8 codes 0, 1 and 2 of any shape; the last byte is filled up
    with zeros. Raises QuantizationError for other codes.
    """
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) > 2:
        raise QuantizationError(f"code {int(flat.max())} is not ternary: 0, 1 or 2")
    fives = functional.pad(flat, (0, -flat.numel() % IN_BYTE)).view(-1, IN_BYTE)
    stream = fives[:, IN_BYTE - 1].clone()
    for place in reversed(range(IN_BYTE - 1)):
        stream.mul_(3).add_(fives[:, place])
    return stream


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes, uint8 [count]. Raises QuantizationError for a stream that is too short or damaged."""
    if packed.numel() * IN_BYTE < count:
        raise QuantizationError(
            f"{packed.numel()} bytes cannot hold {count} ternary codes; the packed weight is damaged"
        )
    if packed.numel() and int(packed.max()) >= BYTES:
        raise QuantizationError(
            f"byte {int(packed.max())} is no five ternary codes; the packed weight is damaged"
        )
    fives = torch.empty(packed.numel(), IN_BYTE, dtype=torch.uint8)
    rest = packed
    for place in range(IN_BYTE):
        fives[:, place] = rest % 3
        rest = rest // 3
    return fives.view(-1)[:count].clone()
