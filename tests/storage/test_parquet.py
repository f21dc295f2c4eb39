"""Parquet files whose footer lies, that unpack to much more than they are, or that would have code called."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.storage.errors import InvalidData
from fleetpress.storage.parquet import read_parquet
from fleetpress.storage.parquet_pages import (
    Chunk,
    Page,
    RowGroup,
    file_around,
    footer_of,
    needed_of,
    pages,
    row_groups,
)
from fleetpress.storage.parquet_thrift import PagesError

ROWS = 5000
RANDOM = np.random.default_rng(0)
TABLE = pa.table(
    {
        "inputs": pa.array(list(RANDOM.random((ROWS, 6), dtype=np.float32)), pa.list_(pa.float32(), 6)),
        "targets": RANDOM.integers(0, 10, ROWS),
        "flags": RANDOM.random(ROWS) < 0.5,
        "half": RANDOM.random(ROWS).astype(np.float16),
        "bytes": RANDOM.integers(0, 255, ROWS).astype(np.uint8),
    }
)


def written(table: pa.Table = TABLE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def column_pages(data: bytes, column: int = 0, group: int = 0) -> list[Page]:
    chunk = row_groups(footer_of(data))[group].chunks[column]
    return list(pages(data, chunk.start, chunk.size_bytes))


def groups_by_arrow(data: bytes) -> list[RowGroup]:
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [
        RowGroup(
            rows=group.num_rows, chunks=tuple(_chunk(group.column(at)) for at in range(group.num_columns))
        )
        for group in groups
    ]


def _chunk(column: Any) -> Chunk:
    start = column.dictionary_page_offset or column.data_page_offset
    return Chunk(values=column.num_values, start=start, size_bytes=column.total_compressed_size)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "gzip"},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"use_dictionary": False, "column_encoding": {"targets": "DELTA_BINARY_PACKED"}},
        {"data_page_size": 1000, "write_page_index": True, "write_page_checksum": True},
        {"row_group_size": 700, "store_schema": False, "version": "1.0"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_whatever_wrote_it_the_pages_hold_what_is_read(options: dict[str, Any]) -> None:
    data = written(**options)
    arrays = read_parquet(data, "a.parquet")
    for name, array in arrays.items():
        expected = TABLE[name].combine_chunks()
        flat = expected.flatten() if name == "inputs" else expected
        assert np.array_equal(array.ravel(), flat.to_numpy(zero_copy_only=False))
        assert array.dtype == flat.to_numpy(zero_copy_only=False).dtype
    assert arrays["inputs"].shape == (ROWS, 6)
    assert row_groups(footer_of(data)) == groups_by_arrow(data)
    groups = range(len(groups_by_arrow(data)))
    told = [page for group in groups for page in column_pages(data, 0, group) if not page.is_dictionary]
    assert sum(page.values for page in told) == ROWS * 6


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.int64())])
def test_a_table_without_rows(kind: pa.DataType) -> None:
    data = written(pa.table({"a": pa.array([], kind)}))
    assert len(read_parquet(data, "a.parquet")["a"]) == 0


class Marked(pa.ExtensionType):  # type: ignore[misc]
    """A registered type: Arrow calls its code for whatever a file says about it."""

    called: list[bytes] = []

    def __init__(self) -> None:
        super().__init__(pa.int64(), "fleetpress.tests.marked")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"from the file"

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage: pa.DataType, serialized: bytes) -> "Marked":
        cls.called.append(serialized)
        return cls()


@pytest.fixture
def registered() -> Iterator[None]:
    pa.register_extension_type(Marked())
    yield
    pa.unregister_extension_type("fleetpress.tests.marked")


@pytest.mark.usefixtures("registered")
def test_no_code_of_a_type_that_a_file_names_is_called() -> None:
    """Ray registers types for Arrow; in some of its releases they unpickle what the file says."""
    data = written(pa.table({"a": pa.ExtensionArray.from_storage(Marked(), pa.array([1, 2]))}))
    Marked.called.clear()
    assert read_parquet(data, "a.parquet")["a"].tolist() == [1, 2]
    assert not Marked.called
    pq.read_table(pa.BufferReader(data))
    assert Marked.called


# ---- lies. A footer is changed in place: numbers of the same length are found by their value.


def varint(value: int) -> bytes:
    """Thrift's zigzag integer."""
    value, encoded = value << 1, bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


REPEATED = written(pa.table({"a": pa.array([[7] * 3000], pa.list_(pa.int32()))}), compression="none")
CONSTANT = written(pa.table({"a": np.zeros(3000, np.int32)}))


def with_footer(data: bytes, old: int, new: int) -> bytes:
    footer = footer_of(data)
    assert len(varint(old)) == len(varint(new))
    changed = footer.replace(varint(old), varint(new))
    assert changed != footer
    return data[: -len(footer) - 8] + file_around(changed)[4:]


def with_pages(data: bytes, old: int, new: int) -> bytes:
    """The first page headers with a number replaced; the footer is as it was."""
    end = len(data) - len(footer_of(data)) - 8
    changed = data[:end].replace(varint(old), varint(new))
    assert changed != data[:end]
    return changed + data[end:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_footer(CONSTANT, 3000, 8000), "states 8000 values, and its pages 3000"),
        (with_footer(REPEATED, 3000, 8000), "states 8000 values, and its pages 3000"),
        (with_pages(REPEATED, 3000, 8000), "states 3000 values, and its pages 8000"),
        (CONSTANT[4:], "PAR1"),
        (b"PAR1" + b"\0" * 100 + (90).to_bytes(4, "little") + b"PAR1", "no intact"),
        (b"PAR1" + (2**31).to_bytes(4, "little") + b"PAR1", "footer of 2147483648 bytes"),
        (b"PAR1" + bytes(5 << 20) + (5 << 20).to_bytes(4, "little") + b"PAR1", "more than 4194304"),
    ],
    ids=["rows", "values", "pages", "magic", "zeros", "long", "huge"],
)
def test_a_footer_that_lies_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        read_parquet(data, "a.parquet")


# One row group of one column, in Thrift's compact protocol: a byte of field and kind, then the value.
I32, I64, PLAIN_COLUMN = 5, 6, ((5, 6, 3), (7, 6, 70), (9, 6, 40), (11, 6, 4))


def stated(column: tuple[tuple[int, int, int], ...], rows: int = 3, all_rows: int = 3) -> bytes:
    """A footer whose only column has these fields, each as (number, kind, value)."""
    fields, last = b"", 0
    for number, kind, value in column:
        step = bytes([(number - last) << 4 | kind]) if number > last else bytes([kind]) + varint(number)
        fields, last = fields + step + varint(value), number
    group = b"\x19\x1c" + b"\x3c" + fields + b"\0\0" + b"\x26" + varint(rows) + b"\0"
    return b"\x36" + varint(all_rows) + b"\x19\x1c" + group + b"\0"


def test_a_footer_of_millions_of_nothing() -> None:
    size = 2_000_000
    with pytest.raises(PagesError, match="lists 2000000 things"):
        needed_of(b"\x49\xfc" + varint(size // 2) + bytes(size + 1))


def test_what_a_footer_states() -> None:
    (group,) = row_groups(stated(PLAIN_COLUMN))
    assert group == RowGroup(rows=3, chunks=(Chunk(values=3, start=4, size_bytes=70),))
    (group,) = row_groups(stated(PLAIN_COLUMN[:3]))
    assert group.chunks[0].start == 40


@pytest.mark.parametrize(
    ("footer", "message"),
    [
        (stated((*PLAIN_COLUMN, (11, I64, 8))), "field 11 twice"),
        (stated((*PLAIN_COLUMN[:3], (11, I32, 4))), "field of kind 5 where one of kind 6 belongs"),
        (stated(PLAIN_COLUMN[1:]), "no valid number of values, bytes or place"),
        (stated(PLAIN_COLUMN, rows=2), "it states 3 rows, and its parts 2"),
        (stated(PLAIN_COLUMN)[:-9], "cut short"),
    ],
    ids=["twice", "kind", "missing", "rows", "short"],
)
def test_a_footer_that_readers_could_read_differently(footer: bytes, message: str) -> None:
    """Arrow passes over a place of another kind and merges what stands twice: the pages it reads would be others."""
    with pytest.raises(PagesError, match=message):
        row_groups(footer)


def test_arrow_is_given_nothing_but_what_it_takes_to_read() -> None:
    """No statistics: pyarrow 26.0.1 ends the process when it looks at wrong ones. No notes of other programs."""
    data = written(write_page_index=True)
    assert pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1).statistics
    needed = pq.ParquetFile(io.BytesIO(file_around(needed_of(footer_of(data))))).metadata
    assert needed.metadata is None
    column = needed.row_group(0).column(1)
    assert column.statistics is None
    assert not column.has_column_index
    assert needed.created_by.startswith("parquet-cpp-arrow")
    assert needed_of(needed_of(footer_of(data))) == needed_of(footer_of(data))


def test_what_arrow_would_read_differently_is_refused() -> None:
    """Arrow takes the items of a list for what they should be, whatever the list says that they are."""
    data = written(pa.table({"a": [1.0, 2.0]}))
    at = data.rindex(b"\x15\x04\x19\x2c")
    lie = data[: at + 3] + b"\x21" + data[at + 4 :]
    assert pq.read_table(pa.BufferReader(lie)).to_pydict() == {"a": [1.0, 2.0]}
    with pytest.raises(InvalidData, match="items of kind 1 where 12 belongs"):
        read_parquet(lie, "a.parquet")


def test_a_footer_that_says_how_it_is_encrypted() -> None:
    """Arrow (26.0.1) has been seen to end the process over one."""
    footer = footer_of(CONSTANT)
    algorithm = b"\x0c\x10\x1c\0\0"  # field 8, in full: a union of a struct
    encrypted = CONSTANT[: -len(footer) - 8] + file_around(footer[:-1] + algorithm + b"\0")[4:]
    with pytest.raises(InvalidData, match="encrypted"):
        read_parquet(encrypted, "a.parquet")


def test_one_number_billions_of_times_is_a_bomb() -> None:
    """Truthful as it is: a run of equal numbers is a few bytes, whatever its length."""
    buffer = io.BytesIO()
    part = pa.table({"a": np.zeros(1 << 20)})
    with pq.ParquetWriter(buffer, part.schema) as writer:
        for _ in range(40):
            writer.write_table(part)
    with pytest.raises(InvalidData, match="bomb"):
        read_parquet(buffer.getvalue(), "a.parquet")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_pages_or_refused(data: bytes) -> None:
    try:
        assert all(page.values >= 0 for page in pages(b"PAR1" + data, 4, len(data)))
    except PagesError as error:
        assert str(error).isprintable()  # noqa: PT017 - both outcomes are right


@pytest.mark.parametrize("nested", [b"\x1c" * 1000, b"\x19" * 1000, b"\x19\x19" * 500, b"\x1b" * 100])
def test_headers_nested_without_end(nested: bytes) -> None:
    with pytest.raises(PagesError):
        list(pages(b"PAR1" + nested, 4, len(nested)))
