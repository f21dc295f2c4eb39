"""ZIP files that lie about what they hold: no more is unpacked than they state, nor stated than is allowed."""

import io
import struct
import tracemalloc
import zipfile
import zlib

import pytest

from fleetpress.storage.zip_files import ZipError, ZipReader, ends_plainly


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def patched(data: bytes, field: int, form: str, value: int) -> bytes:
    """The first entry of the table of contents with the number at byte `field` of it replaced."""
    at = data.index(b"PK\1\2") + field
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def read_all(data: bytes) -> dict[str, bytes]:
    reader = ZipReader(io.BytesIO(data), len(data))
    return {info.filename: reader.read(info) for info in reader.infos}


MEMBERS = {"a": b"", "b": b"x" * 100_000, "c/d": bytes(range(256))}
PLAIN = zipped(MEMBERS)
SIZE, CRC, OFFSET, METHOD, FLAGS = 24, 16, 42, 10, 8


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_was_written_is_read(method: int) -> None:
    assert read_all(zipped(MEMBERS, method)) == MEMBERS


def test_a_member_that_unpacks_to_more_than_it_states_takes_no_more_memory() -> None:
    """zipfile's own read() would unpack all of it before it cuts off what is too much."""
    zeros = bytes(64 << 20)
    data = patched(zipped({"a": zeros}), SIZE, "<L", 1000)
    data = patched(data, CRC, "<L", zlib.crc32(zeros[:1000]))
    del zeros
    tracemalloc.start()
    assert read_all(data) == {"a": bytes(1000)}
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no ZIP"),
        (b"text", "no ZIP"),
        (PLAIN[:-10], "no ZIP"),
        (patched(zipped({"b": b"x" * 50}), SIZE, "<L", 51), "of 50 bytes that states 51|damaged"),
        (patched(zipped({"b": b"x" * 50}, zipfile.ZIP_STORED), SIZE, "<L", 51), "two sizes"),
        (patched(zipped({"b": b"x" * 50}), CRC, "<L", 1), "damaged member 'b'"),
        (patched(PLAIN, OFFSET, "<L", 2**31), "outside of the file"),
        (patched(PLAIN, METHOD, "<H", zipfile.ZIP_LZMA), "method 14"),
        (patched(PLAIN, FLAGS, "<H", 1), "encrypted"),
        (zipped({"a": bytes(65 << 20)}), "bomb"),
        (patched(PLAIN, SIZE, "<L", 2**32 - 2), "bomb"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_lies_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ZipError, match=message):
        read_all(data)


def test_a_table_of_contents_that_is_most_of_the_file() -> None:
    entry = b"PK\1\2" + bytes(42)
    table = entry * ((65 << 20) // len(entry))
    data = table + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(table), 0, 0)
    with pytest.raises(ZipError, match="table of contents of"):
        read_all(data)


def test_the_allowance_can_be_raised() -> None:
    data = zipped({"a": bytes(65 << 20)})
    assert ZipReader(io.BytesIO(data), len(data), always_allowed_bytes=66 << 20).infos


def test_what_stands_behind_the_end_is_seen() -> None:
    assert ends_plainly(PLAIN)
    assert not ends_plainly(PLAIN + b"\0")
    assert not ends_plainly(b"")
