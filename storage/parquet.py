"""Parquet tables to arrays: one column is one array, nested lists of equal length are its further dimensions."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import InvalidData
from .parquet_pages import file_around, footer_of, needed_of, pages, row_groups
from .parquet_thrift import PagesError

_MOST_RATIO = 200
_ALWAYS_ALLOWED_BYTES = 256 << 20
_WIDEST_BYTES = 8
_MOST_DIMENSIONS = 64  # of NumPy

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def read_parquet(data: bytes, where: str) -> dict[str, Array]:
    """Every column as an array of shape (rows, ...). Raises InvalidData naming the column (text, nulls, ragged)."""
    try:
        footer = needed_of(footer_of(data))
        metadata = pq.ParquetFile(pa.BufferReader(file_around(footer))).metadata
        file = pq.ParquetFile(pa.BufferReader(data), metadata=metadata)
        _check_kinds(file.schema_arrow, where)
        _check_pages(data, footer)
        table = file.read()
    except MemoryError:  # also one of Arrow's; the sizes are proved, so it is about this machine
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InvalidData(f"{where} is no intact Parquet file ({str(error)[:200]}); write it again") from None
    return {name: _column(table[name].combine_chunks(), name, where) for name in table.column_names}


def _check_kinds(schema: pa.Schema, where: str) -> None:
    """Texts and binaries, which repeat without limit, are refused before one is read."""
    names = schema.names
    if len(set(names)) < len(names):
        raise InvalidData(f"{where} has a column twice; give each its own name")
    for field in schema:
        kind, dimensions = field.type, 1
        while _is_list(kind):
            kind, dimensions = kind.value_type, dimensions + 1
        if not _is_number(kind):
            raise InvalidData(f"{where}: column {field.name!r} holds {kind}; write numbers")
        if dimensions > _MOST_DIMENSIONS:
            raise InvalidData(f"{where}: column {field.name!r} has {dimensions} dimensions; write fewer")


def _check_pages(data: bytes, footer: bytes) -> None:
    """The columns hold the values that the footer states, and no bomb: repeating a value costs a file nothing."""
    left_bytes = max(_ALWAYS_ALLOWED_BYTES, _MOST_RATIO * len(data))
    for group in row_groups(footer):
        for chunk in group.chunks:
            if group.rows == chunk.values == 0:  # without a page, it lies nowhere
                continue
            values = 0
            for page in pages(data, chunk.start, chunk.size_bytes):
                values += 0 if page.is_dictionary else page.values
                left_bytes -= page.unpacked_bytes + page.values * _WIDEST_BYTES
                if left_bytes < 0:
                    raise PagesError("it unpacks to so much more than it has bytes that it is a likely bomb")
            if values != chunk.values or group.rows > values:
                raise PagesError(f"a column states {chunk.values} values, and its pages {values}")


def _column(values: pa.Array, name: str, where: str) -> Array:
    shape = [len(values)]
    while _is_list(values.type):
        _refuse_nulls(values, name, where)
        lengths = set(pc.unique(pc.list_value_length(values)).to_pylist())
        if len(lengths) > 1:
            raise InvalidData(
                f"{where}: column {name!r} is ragged (lengths {sorted(lengths)[:5]}); pad its lists"
            )
        shape.append(lengths.pop() if lengths else 0)
        values = values.flatten()
    _refuse_nulls(values, name, where)
    array: Array = values.to_numpy(zero_copy_only=False).reshape(shape)
    return array


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _refuse_nulls(values: pa.Array, name: str, where: str) -> None:
    if values.null_count:
        raise InvalidData(f"{where}: column {name!r} has {values.null_count} empty cells; fill them")
