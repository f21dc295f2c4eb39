"""What a checkpoint task needs in memory, known before it runs: fixed buffers, and what a method needs whole."""

from collections.abc import Sequence

from fleetpress.storage.streams import PARTS_IN_FLIGHT

from .layout import BLOCK_BYTES, Piece, stored_bytes
from .stream import ahead_bytes

# Measured: an interpreter with the libraries of a worker, and what torch and transformers add to it.
LIBRARIES_BYTES = 112 << 20
TORCH_BYTES = 160 << 20
TRANSFORMERS_BYTES = 192 << 20
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
    cuts = [
        piece.item.geometry for piece in pieces if piece.source_bytes and not piece.item.treatment.calibrated
    ]
    # What was solved before comes whole, and is handed on.
    ready = max(
        (sum(map(stored_bytes, piece.item.stored)) for piece in pieces if piece.item.treatment.calibrated),
        default=0,
    )
    tiles = max((cut.tile_rows * cut.row_bytes for cut in cuts), default=0)
    whole = max(
        (
            piece.source_bytes
            for piece in pieces
            if piece.item.geometry.whole and not piece.item.treatment.calibrated
        ),
        default=0,
    )
    torch = any(piece.item.needs_torch or piece.item.treatment.calibrated for piece in pieces)
    return (
        LIBRARIES_BYTES
        + (TORCH_BYTES if torch else 0)
        + ahead_bytes(max(block, tiles))
        + PARTS_IN_FLIGHT * max(parts, default=0)
        + 2 * sum(size for _, size in crumbs)
        + _WORKSPACE * whole
        + 2 * ready
    )
