"""Source rows in, shard bytes out: blocks are read ahead, converted tile by tile, and handed on as they come.

Memory is what is being read (AHEAD_BYTES), the parts on their way, and the crumbs; never a tensor, unless its method
needs it whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Protocol

from fleetpress.compression.checkpoint.convert import Converter, converter
from fleetpress.compression.checkpoint.tiles import tiles
from fleetpress.compression.errors import CompressionError
from fleetpress.storage.buffers import SHARED
from fleetpress.storage.streams import Stages, read_ahead

from ..errors import ModelError
from .layout import BLOCK_BYTES, Item, Piece, crumb_classes

_BLOCKS_AHEAD = 4  # being read or waiting for the one that computes


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows of a piece within a block."""

    piece: Piece
    first_row: int
    rows: int

    @property
    def bytes(self) -> int:
        """What it takes of the block."""
        return self.rows * self.piece.item.geometry.row_bytes


@dataclass(frozen=True, kw_only=True)
class Block:
    """One range of a source file, and the segments that lie in it one after the other."""

    path: str
    etag: str
    offset_bytes: int
    bytes: int
    segments: tuple[Segment, ...]


class Sink(Protocol):
    """Where converted bytes go."""

    def body(self, data: memoryview) -> None:
        """The next bytes of the body."""
        ...

    def crumb(self, kind: int, data: memoryview) -> None:
        """The next bytes of a class of the tail."""
        ...


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What another task made of a matrix: bytes of each stored tensor, squares of its weights and of what they lost."""

    parts: Sequence[bytes]
    signal: float
    noise: float


Read = Callable[[Block, memoryview], None]
Sums = dict[str, tuple[float, float]]  # layer -> squares of its weights, and of what they lost


def stream(
    where: str,
    pieces: Sequence[Piece],
    read: Read,
    sink: Sink,
    stages: Stages,
    *,
    block_bytes: int = BLOCK_BYTES,
    solved: Callable[[Item], "Solved"] | None = None,
) -> Sums:
    """Convert the pieces, in order, into the sink; what is calibrated was `solved` before.

    Raises ModelError naming `where` and the tensor.
    """
    sums: Sums = {}
    try:
        for passes, run in _runs(piece for piece in pieces if piece.source_bytes):
            if run[0].item.treatment.calibrated:
                assert solved is not None, "a plan with calibrated items names the tasks that solve them"
                _hand_on(run, solved, sink, sums)
                continue
            again = partial(_tiles, run, read, stages, block_bytes)
            _convert(again(), _measured(run[0].item, passes, again, stages), sink, stages, sums)
    except CompressionError as error:
        raise ModelError(f"{where}: {error}") from None
    return sums


def blocks(pieces: Iterable[Piece], block_bytes: int) -> Iterator[Block]:
    """The pieces as ranges of the source of at most `block_bytes`, or of one tile where that is more."""
    waiting: list[Segment] = []
    for segment in (segment for piece in pieces for segment in _segments(piece, block_bytes)):
        if waiting and not _follows(waiting, segment, block_bytes):
            yield _block(waiting)
            waiting = []
        waiting.append(segment)
    if waiting:
        yield _block(waiting)


def requests(pieces: Iterable[Piece], block_bytes: int) -> int:
    """How many ranges `stream` reads."""
    runs = _runs(piece for piece in pieces if piece.source_bytes and not piece.item.treatment.calibrated)
    return sum((1 + passes) * sum(1 for _ in blocks(run, block_bytes)) for passes, run in runs)


def ahead_bytes(block_bytes: int) -> int:
    """How much is read before it is needed."""
    return _BLOCKS_AHEAD * block_bytes


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """A tile of a piece, and whether it is the piece's first or last one."""

    piece: Piece
    rows: memoryview
    is_first: bool
    is_last: bool


def _runs(pieces: Iterable[Piece]) -> Iterator[tuple[int, list[Piece]]]:
    """Pieces that can be read in one go, with their number of measuring passes; what is measured is read alone."""
    for (passes, _), run in groupby(
        pieces, key=lambda piece: (piece.item.geometry.passes, piece.item.treatment.calibrated)
    ):
        if passes:
            yield from ((passes, [piece]) for piece in run)
        else:
            yield 0, list(run)


def _measured(item: Item, passes: int, tiles_of: Callable[[], Iterator[_Tile]], stages: Stages) -> Converter:
    """The item's converter, after all tiles have been read as often as it wants."""
    working = _converter(item)
    for _ in range(passes):
        for tile in tiles_of():
            stages.compute.timed(len(tile.rows), partial(working.measure, tile.rows))
        working.end_pass()
    return working


def _convert(tiles_of_run: Iterable[_Tile], first: Converter, sink: Sink, stages: Stages, sums: Sums) -> None:
    working = first
    sides: list[list[bytes]] = []
    for tile in tiles_of_run:
        piece = tile.piece
        places = crumb_classes(piece)
        if tile.is_first:
            if sides:  # the run's first piece has its converter already
                working = _converter(piece.item)
            sides = [[] for _ in piece.item.stored]
        made = stages.compute.timed(len(tile.rows), partial(working.convert, tile.rows))
        _put(sink, places[0], made.parts[0])
        for index, part in enumerate(made.parts[1:], start=1):
            sides[index].append(bytes(part))
        layer = piece.item.layer
        if layer is not None and piece.item.treatment.is_measured:
            signal, noise = sums.get(layer, (0.0, 0.0))
            sums[layer] = signal + made.signal, noise + made.noise
        if tile.is_last:
            ends = working.tail() if piece.is_last else (b"",) * len(places)
            for place, parts, end in zip(places, sides, ends, strict=True):
                _put(sink, place, memoryview(b"".join((*parts, end))))


def _hand_on(pieces: Sequence[Piece], solved: Callable[[Item], Solved], sink: Sink, sums: Sums) -> None:
    """Whole matrices as they were solved; each is read when it is its turn."""
    for piece in pieces:
        made = solved(piece.item)
        for place, part in zip(crumb_classes(piece), made.parts, strict=True):
            _put(sink, place, memoryview(part))
        if piece.item.layer is not None:
            sums[piece.item.layer] = made.signal, made.noise


def _put(sink: Sink, place: int | None, data: memoryview) -> None:
    if place is None:
        sink.body(data)
    else:
        sink.crumb(place, data)


def _converter(item: Item) -> Converter:
    return converter(item.name, item.dtype, item.shape, item.treatment, check=item.check)


def _tiles(pieces: Sequence[Piece], read: Read, stages: Stages, block_bytes: int) -> Iterator[_Tile]:
    ahead = read_ahead(
        blocks(pieces, block_bytes), read, stages, buffers=SHARED, ahead_bytes=_BLOCKS_AHEAD * block_bytes
    )
    for block, view in ahead:
        start = 0
        for segment in block.segments:
            piece, cut = segment.piece, segment.piece.item.geometry
            row = segment.first_row
            for rows in tiles(view[start : start + segment.bytes], cut):
                end = row + len(rows) // cut.row_bytes
                yield _Tile(
                    piece=piece,
                    rows=rows,
                    is_first=row == piece.first_row,
                    is_last=end == piece.first_row + piece.rows,
                )
                row = end
            start += segment.bytes


def _segments(piece: Piece, block_bytes: int) -> Iterator[Segment]:
    cut = piece.item.geometry
    tile_bytes = max(1, cut.tile_rows * cut.row_bytes)
    step = max(1, block_bytes // tile_bytes) * cut.tile_rows
    for first in range(piece.first_row, piece.first_row + piece.rows, step):
        yield Segment(piece=piece, first_row=first, rows=min(step, piece.first_row + piece.rows - first))


def _start(segment: Segment) -> int:
    item = segment.piece.item
    return item.offset_bytes + segment.first_row * item.geometry.row_bytes


def _follows(waiting: Sequence[Segment], segment: Segment, block_bytes: int) -> bool:
    """Whether the segment's bytes come right after those waiting, and fit beside them."""
    last = waiting[-1]
    return (
        last.piece.item.path == segment.piece.item.path
        and _start(last) + last.bytes == _start(segment)
        and sum(other.bytes for other in waiting) + segment.bytes <= block_bytes
    )


def _block(segments: Sequence[Segment]) -> Block:
    item = segments[0].piece.item
    return Block(
        path=item.path,
        etag=item.etag,
        offset_bytes=_start(segments[0]),
        bytes=sum(segment.bytes for segment in segments),
        segments=tuple(segments),
    )
