"""Where every byte of a compressed checkpoint will lie, and which task makes it: told from shapes, before any is read.

A shard is header, body, tail. The body holds the weights in the order of the source, so that a task is one run of
source bytes and one run of parts of the shard's upload. The tail holds what is too small for parts of its own, or is
made by several tasks (the scales of a tensor that is cut): tasks leave these crumbs for the one that ends the shard.
All of it depends on names, shapes and recipe alone, never on the number of workers or their memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fleetpress.compression.checkpoint.convert import geometry, needs_torch
from fleetpress.compression.checkpoint.tiles import Geometry
from fleetpress.compression.treatment import KEPT, ZERO_POINT, Stored, Treatment, stored, words
from fleetpress.storage.checkpoint import TensorLocation
from fleetpress.storage.safetensors_layout import header_of_file, size_of
from fleetpress.storage.sources import WEIGHTS
from fleetpress.storage.streams import PART_BYTES, part_sizes

SHARD_BYTES = 5_000_000_000  # of an output shard at most; a larger tensor has one of its own
TASK_BYTES = 128 << 20  # of the source, that one task works on
BLOCK_BYTES = 8 << 20  # of the source, that one request reads
_SMALL_BYTES = 64 << 10  # tensors below are crumbs
_MOST_PARTS = 5_000  # of a shard: half of what S3 allows, because tasks round up
_ALIGNED_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Item:
    """A tensor of the source, or a matrix within one, and what is done to it; `etag` pins the file at `path`.

    `layer` is the name that metrics know it by, if it is a layer's weight; `check` says that it must be finite.
    """

    name: str
    path: str
    etag: str
    offset_bytes: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]
    treatment: Treatment
    layer: str | None = None
    check: bool = False

    @cached_property
    def geometry(self) -> Geometry:
        """How it is cut."""
        return geometry(self.dtype, self.shape, self.size_bytes, self.treatment)

    @property
    def needs_torch(self) -> bool:
        """Whether its treatment is one that only torch does."""
        return needs_torch(self.dtype, self.shape, self.treatment)

    @cached_property
    def stored(self) -> tuple[Stored, ...]:
        """What stands for it in the shard."""
        return stored(self.name, self.dtype, self.shape, self.treatment)


def item_at(
    name: str,
    at: TensorLocation,
    treatment: Treatment = KEPT,
    *,
    layer: str | None = None,
    check: bool = False,
) -> Item:
    """The tensor, or matrix, `name` at its place in the source."""
    return Item(
        name=name,
        path=at.file.path,
        etag=at.file.etag,
        offset_bytes=at.info.offset_bytes,
        size_bytes=at.info.size_bytes,
        dtype=at.info.dtype,
        shape=at.info.shape,
        treatment=treatment,
        layer=layer,
        check=check,
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows `first_row` to `first_row + rows` of an item; `in_tail` says of each stored tensor where its bytes go."""

    item: Item
    first_row: int
    rows: int
    in_tail: tuple[bool, ...]

    @property
    def is_last(self) -> bool:
        """Whether the item ends here."""
        return self.first_row + self.rows == self.item.geometry.rows

    @property
    def source_bytes(self) -> int:
        """What is read of it."""
        return self.rows * self.item.geometry.row_bytes


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """One run of pieces. It writes parts `first_part`, ... of the sizes `parts`, from `offset_bytes` of the shard on.

    `crumbs` are its bytes in the tail: (class, bytes), classes in the order of the tail.
    """

    pieces: tuple[Piece, ...]
    offset_bytes: int
    first_part: int
    parts: tuple[int, ...]
    crumbs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """One output file: its exact header, size and tensors (in the order of their bytes), and the tasks that make it.

    With several tasks `tail_parts` are the parts that the crumbs make, from number `first_tail_part` on.
    """

    path: str
    header: bytes
    size_bytes: int
    tensors: tuple[Stored, ...]
    offsets: tuple[int, ...]
    tasks: tuple[PlannedTask, ...]
    first_tail_part: int
    tail_parts: tuple[int, ...]


def plan_shards(items: Sequence[Item]) -> tuple[PlannedShard, ...]:
    """Shards of the items, which are in the order of the source."""
    runs = _shard_runs(items)
    return tuple(_planned(run, shard_file(index, len(runs))) for index, run in enumerate(runs))


def shard_file(index: int, count: int) -> str:
    """The conventional name of the `index`-th of `count` shards."""
    return WEIGHTS if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def stored_bytes(tensor: Stored) -> int:
    """Bytes of a stored tensor."""
    return size_of(tensor.dtype, tensor.shape)


def _shard_runs(items: Sequence[Item]) -> list[list[Item]]:
    """A shard for each of the source's, so that many are finished at once; two where one would be too large."""
    runs: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        size = sum(map(stored_bytes, item.stored))
        if runs[-1] and (item.path != runs[-1][-1].path or filled + size > SHARD_BYTES):
            runs.append([])
            filled = 0
        runs[-1].append(item)
        filled += size
    return runs


@dataclass
class _Draft:
    """A task while its pieces are being collected."""

    pieces: list[Piece] = field(default_factory=list)
    source_bytes: int = 0
    body_bytes: int = 0

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.source_bytes += piece.source_bytes
        self.body_bytes += _body_bytes(piece)


def _planned(items: Sequence[Item], path: str) -> PlannedShard:
    # What is no multiple of eight bytes long would push all that follows out of its place in memory.
    ordered = sorted(items, key=_is_ragged)
    tasks = _task_runs(ordered)
    body: list[Stored] = []
    tail: list[tuple[int, int, Stored]] = []
    for piece in (piece for task in tasks for piece in task.pieces):
        for index, tensor in enumerate(piece.item.stored):
            if piece.in_tail[index]:
                if piece.is_last:
                    tail.append((_crumb_class(tensor, index), len(tail), tensor))
            elif piece.first_row == 0:
                body.append(tensor)
    tensors = (*body, *(tensor for _, _, tensor in sorted(tail, key=lambda entry: entry[:2])))
    header, offsets, size_bytes = header_of_file([(t.name, t.dtype, t.shape) for t in tensors])
    part_bytes = max(PART_BYTES, -(-size_bytes // _MOST_PARTS))
    planned: list[PlannedTask] = []
    offset, number = 0, 1
    for task in tasks:
        region = task.body_bytes + (0 if planned else len(header))
        crumbs = _crumbs(task.pieces)
        if len(tasks) == 1:
            region += sum(size for _, size in crumbs)
        parts = tuple(part_sizes(region, part_bytes))
        planned.append(
            PlannedTask(
                pieces=tuple(task.pieces), offset_bytes=offset, first_part=number, parts=parts, crumbs=crumbs
            )
        )
        offset += region
        number += len(parts)
    left = size_bytes - offset
    return PlannedShard(
        path=path,
        header=header,
        size_bytes=size_bytes,
        tensors=tensors,
        offsets=tuple(offsets),
        tasks=tuple(planned),
        first_tail_part=number,
        tail_parts=tuple(part_sizes(left, part_bytes)) if left else (),
    )


def _task_runs(items: Sequence[Item]) -> list[_Draft]:
    """Pieces in runs of about TASK_BYTES of source, each with enough for a part of its own."""
    drafts = [_Draft()]
    for piece in (piece for item in items for piece in _pieces(item)):
        now = drafts[-1]
        if now.source_bytes + piece.source_bytes > TASK_BYTES and now.body_bytes >= PART_BYTES:
            drafts.append(_Draft())
        drafts[-1].add(piece)
    if len(drafts) > 1 and drafts[-1].body_bytes < PART_BYTES:
        last = drafts.pop()
        for piece in last.pieces:
            drafts[-1].add(piece)
    return drafts


def _pieces(item: Item) -> Iterator[Piece]:
    """The item in runs of whole tiles of at most TASK_BYTES; one run if it has to be read several times."""
    cut = item.geometry
    tile_bytes = cut.tile_rows * cut.row_bytes
    step = cut.rows
    if not cut.passes and not cut.whole and item.size_bytes > TASK_BYTES:
        count = -(-item.size_bytes // TASK_BYTES)
        step = max(1, -(-item.size_bytes // count // tile_bytes)) * cut.tile_rows
    in_tail = _tail_places(item, cut=step < cut.rows)
    for first in range(0, max(1, cut.rows), max(1, step)):
        yield Piece(item=item, first_row=first, rows=min(step, cut.rows - first), in_tail=in_tail)


def _tail_places(item: Item, *, cut: bool) -> tuple[bool, ...]:
    main, *sides = map(stored_bytes, item.stored)
    if main < _SMALL_BYTES:
        return (True,) * (1 + len(sides))
    return (False, *(cut or size % _ALIGNED_BYTES != 0 for size in sides))


def _is_ragged(item: Item) -> bool:
    return stored_bytes(item.stored[0]) % _ALIGNED_BYTES != 0


def _crumb_class(tensor: Stored, index: int) -> int:
    """Tail tensors lie by falling size of their entries, so each is aligned; then by their place in the item."""
    return 100 * (8 - tensor.item_bytes) + index


def _body_bytes(piece: Piece) -> int:
    return sum(size for size, tail in zip(piece_bytes(piece), piece.in_tail, strict=True) if not tail)


def _crumbs(pieces: Sequence[Piece]) -> tuple[tuple[int, int], ...]:
    found: dict[int, int] = {}
    for piece in pieces:
        sizes = piece_bytes(piece)
        for index, tensor in enumerate(piece.item.stored):
            if piece.in_tail[index]:
                kind = _crumb_class(tensor, index)
                found[kind] = found.get(kind, 0) + sizes[index]
    return tuple(sorted((kind, size) for kind, size in found.items() if size))


def crumb_classes(piece: Piece) -> tuple[int | None, ...]:
    """For each stored tensor of a piece its class in the tail, None for what lies in the body."""
    return tuple(
        _crumb_class(tensor, index) if piece.in_tail[index] else None
        for index, tensor in enumerate(piece.item.stored)
    )


def piece_bytes(piece: Piece) -> tuple[int, ...]:
    """Bytes that a piece adds to each of its item's stored tensors: those of its rows; the last adds what has none."""
    end = piece.first_row + piece.rows
    return tuple(
        bytes_until(tensor, piece.item, end) - bytes_until(tensor, piece.item, piece.first_row)
        for tensor in piece.item.stored
    )


def bytes_until(tensor: Stored, item: Item, row: int) -> int:
    """Bytes of a stored tensor that belong to the rows before `row`, the end of a tile."""
    size_bytes, rows = stored_bytes(tensor), item.geometry.rows
    if row == rows:
        return size_bytes if rows else 0
    if tensor.shape in ((1,), (2,)):  # one scale for all rows, or their shape
        return 0
    if tensor.name.endswith(ZERO_POINT) and tensor.dtype == "I32":
        assert item.treatment.scheme is not None
        return words(row, item.treatment.scheme.num_bits) * (size_bytes // tensor.shape[0])
    return size_bytes // rows * row
