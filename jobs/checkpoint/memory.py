"""What a checkpoint task needs in memory, known before it runs: fixed buffers, and what a method needs whole."""

from collections.abc import Sequence

from fleetpress.storage.streams import PARTS_IN_FLIGHT

from .layout import BLOCK_BYTES, Piece
from .stream import ahead_bytes

# Measured: an interpreter with the libraries of a worker, and what torch adds to it.
_LIBRARIES_BYTES = 112 << 20
_TORCH_BYTES = 160 << 20
_SHARES = 32  # a block takes this share of what a task may use
_WORKSPACE = 6  # a method that needs a tensor whole makes copies of it, in wider dtypes


def block_bytes(memory_bytes: int) -> int:
    """How much of the source one request reads under this ceiling."""
    return max(1 << 20, min(BLOCK_BYTES, memory_bytes // _SHARES))


def task_memory(
    pieces: Sequence[Piece],
    memory_bytes: int,
    parts: Sequence[int] = (),
    crumbs: Sequence[tuple[int, int]] = (),
) -> int:
    """The peak of anonymous memory of a task under this ceiling; larger than it if it cannot be kept."""
    block = block_bytes(memory_bytes)
    cuts = [piece.item.geometry for piece in pieces if piece.source_bytes]
    tiles = max((cut.tile_rows * cut.row_bytes for cut in cuts), default=0)
    whole = max((cut.rows * cut.row_bytes for cut in cuts if cut.whole), default=0)
    torch = any(piece.item.needs_torch for piece in pieces)
    return (
        _LIBRARIES_BYTES
        + (_TORCH_BYTES if torch else 0)
        + ahead_bytes(max(block, tiles))
        + PARTS_IN_FLIGHT * max(parts, default=0)
        + 2 * sum(size for _, size in crumbs)
        + _WORKSPACE * whole
    )
