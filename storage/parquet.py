"""Parquet tables to arrays: one column is one array, nested lists of equal length are its further dimensions."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import InvalidData

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def read_parquet(data: bytes, where: str) -> dict[str, Array]:
    """Every column as an array of shape (rows, ...). Raises InvalidData naming the column (text, nulls, ragged)."""
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidData(f"{where} is no intact Parquet file ({str(error)[:200]}); write it again") from None
    return {name: _column(table[name].combine_chunks(), name, where) for name in table.column_names}


def _column(values: pa.Array, name: str, where: str) -> Array:
    shape = [len(values)]
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or _is_fixed(values.type):
        _refuse_nulls(values, name, where)
        lengths = (
            {values.type.list_size}
            if _is_fixed(values.type)
            else set(pc.unique(pc.list_value_length(values)).to_pylist())
        )
        if len(lengths) > 1:
            raise InvalidData(
                f"{where}: column {name!r} is ragged (lengths {sorted(lengths)[:5]}); pad its lists"
            )
        shape.append(lengths.pop() if lengths else 0)
        values = values.flatten()
    _refuse_nulls(values, name, where)
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InvalidData(f"{where}: column {name!r} holds {kind}; write numbers")
    array: Array = values.to_numpy(zero_copy_only=False).reshape(shape)
    return array


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))


def _refuse_nulls(values: pa.Array, name: str, where: str) -> None:
    if values.null_count:
        raise InvalidData(f"{where}: column {name!r} has {values.null_count} empty cells; fill them")
