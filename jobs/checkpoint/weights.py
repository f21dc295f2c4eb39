"""Tensors of a source for the tasks that run it: whole ones, rows of one, and a block's with its new matrices in it."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fleetpress.compression.checkpoint.tiles import check_finite
from fleetpress.compression.quantization.compressed_tensors import loaded_rows
from fleetpress.compression.treatment import SCALE, SHAPE, ZERO_POINT
from fleetpress.storage.errors import InvalidModelFile
from fleetpress.storage.tensors import DTYPES

from ..handover import Payload, record
from .layout import Item
from .spill import read_parts

_ROWS_BYTES = 32 << 20  # of a matrix that is looked up in, read at once


class RangeReader(Protocol):
    """A store, or what looks at the bytes on their way from it."""

    def read_into(self, path: str, offset_bytes: int, view: memoryview, /, *, etag: str) -> None:
        """Fill the view from a file that is pinned by its etag."""
        ...


class SourceTensors:
    """Tensors of a source by name, read from the store; nothing is kept. Some of their matrices may be `renew`ed."""

    def __init__(self, store: RangeReader, items: Iterable[Item]) -> None:
        self._store = store
        self._items = {item.name: item for item in items}
        self._renewed: dict[str, list[Item]] = {}
        self._new: New | None = None

    @property
    def names(self) -> list[str]:
        """In the order of the source."""
        return list(self._items)

    def renew(self, items: Iterable[Item], new: "New") -> None:
        """From here on these matrices, or experts' matrices within tensors, read as what `new` makes of them."""
        self._new = new
        for item in items:
            owner = item.name if item.name in self._items else self._owner(item)
            self._renewed.setdefault(owner, []).append(item)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole tensors, in their own dtypes or, where they are renewed and cast, in the new ones."""
        return {name: self._read(name) for name in names}

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix, by numbers that rise; blocks of it without any of them are not read."""
        if name in self._renewed:
            return self._read(name)[rows]
        item = self._items[name]
        row_bytes = item.size_bytes // item.shape[0]
        step = max(1, _ROWS_BYTES // max(1, row_bytes))
        found = []
        for first in range(0, item.shape[0], step):
            stop = min(first + step, item.shape[0])
            mine = rows[(rows >= first) & (rows < stop)]
            if len(mine):
                data = _read(self._store, item, first * row_bytes, (stop - first) * row_bytes)
                found.append(data.view(DTYPES[item.dtype]).view(-1, *item.shape[1:])[mine - first])
        return torch.cat(found)

    def _read(self, name: str) -> Tensor:
        item, renewed, new = self._items[name], self._renewed.get(name, ()), self._new
        if renewed and renewed[0].name == name:
            assert new is not None
            return new(renewed[0]).view(item.shape)
        value = read_item(self._store, item)
        for one in renewed:
            assert new is not None
            start = (one.offset_bytes - item.offset_bytes) // value.element_size()
            part = value.view(-1)[start : start + math.prod(one.shape)]
            part.copy_(new(one).view(-1))
        return value

    def _owner(self, item: Item) -> str:
        """The tensor that the matrix lies in."""
        return next(
            name
            for name, other in self._items.items()
            if other.path == item.path
            and other.offset_bytes <= item.offset_bytes < other.offset_bytes + other.size_bytes
        )


New = Callable[[Item], Tensor]
"""The matrix that takes the place of one, in the dtype that it has then; what it was is not read."""


def read_item(store: RangeReader, item: Item) -> Tensor:
    """A tensor, or a matrix within one. Raises InvalidModelFile for dtypes that torch has not."""
    if item.dtype not in DTYPES:
        raise InvalidModelFile(
            f"tensor {item.name!r} is {item.dtype}, which torch cannot hold; convert the model"
        )
    data = _read(store, item, 0, item.size_bytes)
    if item.check:
        check_finite(item.name, item.dtype, data.numpy().data)
    return data.view(DTYPES[item.dtype]).view(item.shape)


def solved_matrix(payload: Payload, item: Item, digest: str) -> Tensor:
    """What the tensors that a solve task has stored for a matrix mean, in its dtype and shape."""
    parts = read_parts(payload, digest, record(payload, digest, proved=False).result["parts"][item.name])
    return matrix_of(item, parts)


def matrix_of(item: Item, parts: Sequence[bytes | bytearray]) -> Tensor:
    """What the bytes of the tensors that stand for a matrix mean, in the order of `item.stored`."""
    tensors = {
        stored.name.removeprefix(item.name): torch.frombuffer(bytearray(data), dtype=torch.uint8)
        .view(DTYPES[stored.dtype])
        .view(stored.shape)
        for stored, data in zip(item.stored, parts, strict=True)
    }
    main = next(iter(tensors.values()))
    if item.treatment.scheme is None:
        return main
    shape = item.shape[0], math.prod(item.shape[1:])
    sides = {suffix: value for suffix, value in tensors.items() if suffix != SHAPE}
    return loaded_rows(main, sides[SCALE], sides.get(ZERO_POINT), item.treatment, shape).dequantize()


def _read(store: RangeReader, item: Item, offset: int, size: int) -> Tensor:
    data = torch.empty(size, dtype=torch.uint8)
    if size:
        store.read_into(item.path, item.offset_bytes + offset, data.numpy().data, etag=item.etag)
    return data
