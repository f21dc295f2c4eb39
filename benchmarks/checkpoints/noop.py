"""`fleetpress` with the quantization of weights left out: as many bytes are read and written as ever, all nonsense.

    python benchmarks/checkpoints/noop.py run SPEC --executor inline

What is left is the cost of moving bytes. Only for the benchmark beside it: the product knows nothing of this.
"""

import math
import random
import sys
from collections.abc import Sequence

from fleetpress.compression.checkpoint.convert import Converter, converter
from fleetpress.compression.checkpoint.tiles import Tile
from fleetpress.compression.scheme import QuantScheme
from fleetpress.compression.treatment import (
    ITEM_BYTES,
    SHAPE,
    ZERO_POINT,
    Stored,
    Treatment,
    stored,
    words,
)
from fleetpress.jobs.checkpoint import stream as checkpoint_stream
from fleetpress.jobs.cli import main

NOISE_BYTES = 1 << 20
_noise = random.Random(0).randbytes(NOISE_BYTES)  # no server can store it in less


def install() -> None:
    """The one place that knows the product's inside: tasks take their converters from `checkpoint_stream.converter`."""
    checkpoint_stream.converter = nothing  # type: ignore[attr-defined]


def nothing(name: str, dtype: str, shape: Sequence[int], treatment: Treatment, *, check: bool) -> Converter:
    """In place of `converter`: what is not quantized is copied as ever, what is becomes bytes of the right number."""
    if treatment.scheme is None:
        return converter(name, dtype, shape, treatment, check=check)
    row_bytes = ITEM_BYTES[dtype] * math.prod(shape[1:])
    return _Nothing(stored(name, dtype, shape, treatment), treatment.scheme, row_bytes)


class _Nothing:
    """Looks at no weight; `row_bytes` are those of the source."""

    def __init__(self, parts: Sequence[Stored], scheme: QuantScheme, row_bytes: int) -> None:
        self._parts, self._bits, self._row_bytes = parts, scheme.num_bits, row_bytes
        # A whole tensor has one scale: only its codes belong to rows.
        self._of_rows = [True] + [
            scheme.strategy != "tensor" and not part.name.endswith(SHAPE) for part in parts[1:]
        ]
        self._noise = memoryview(b"")

    def measure(self, rows: memoryview) -> None:
        """No pass looks at anything."""

    def end_pass(self) -> None:
        """Nothing was seen."""

    def convert(self, rows: memoryview) -> Tile:
        """Noise for the codes, zeros for what goes with them."""
        count = len(rows) // self._row_bytes
        first, *others = (
            self._bytes(part, count) if inside else 0
            for part, inside in zip(self._parts, self._of_rows, strict=True)
        )
        if len(self._noise) < first:
            self._noise = memoryview(_noise * -(-first // NOISE_BYTES))
        return Tile(parts=(self._noise[:first], *(memoryview(bytes(size)) for size in others)))

    def tail(self) -> tuple[bytes, ...]:
        """Zeros for what belongs to no rows."""
        return tuple(
            b"" if inside else bytes(part.item_bytes * math.prod(part.shape))
            for part, inside in zip(self._parts, self._of_rows, strict=True)
        )

    def _bytes(self, part: Stored, rows: int) -> int:
        packed = part.name.endswith(ZERO_POINT) and part.dtype == "I32"
        return part.item_bytes * (words(rows, self._bits) if packed else rows) * math.prod(part.shape[1:])


if __name__ == "__main__":
    install()
    sys.exit(main())
