"""Archives from strangers: a payload in every place that could run it, damaged ZIPs, and fuzzing."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fleetpress_test_archive_members import (  # by this name conftest.py loads archive_members.py
    CONSTANTS_CONFIG,
    MODEL,
    PLAIN,
    WEIGHTS_CONFIG,
    X,
    edit,
    packed,
    unpacked,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.storage.archive import clean_archive, write_archive
from fleetpress.storage.errors import InvalidModelFile, UnsafeModelFile
from fleetpress.storage.programs import load_program


def test_a_clean_archive_has_no_pickle_and_runs_the_same() -> None:
    clean = clean_archive(PLAIN)
    members = unpacked(clean)
    assert members["data/sample_inputs/model.pt"] == b""
    assert not any(data.startswith((b"\x80", b"PK")) for data in members.values())
    assert b"stack_trace" not in members[MODEL]
    assert b".py" not in members[MODEL]
    plain = torch.export.load(io.BytesIO(PLAIN)).module()
    assert torch.equal(torch.export.load(io.BytesIO(clean)).module()(X), plain(X))
    assert clean_archive(clean) == clean


def test_without_weights() -> None:
    clean = clean_archive(PLAIN, weights=False)
    assert unpacked(clean)["data/weights/weight_0"] == bytes(4)
    state = load_program(clean).state_dict
    assert {name: tuple(t.shape) for name, t in state.items()} == {"layer.weight": (2, 3), "layer.bias": (2,)}


def zipped(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def all_with(name: str, data: bytes = b"") -> list[tuple[str, bytes]]:
    return [*((f"archive/{n}", d) for n, d in unpacked().items()), (name, data)]


def all_but(name: str) -> bytes:
    return packed({n: d for n, d in unpacked().items() if n != name})


def changed(name: str, data: bytes) -> bytes:
    return packed({**unpacked(), name: data})


def encrypted() -> bytes:
    data = bytearray(zipped(all_with("archive/extra/a", b"x")))
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


BAD_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"hello world" * 9, "no ZIP"),
    "truncated": (lambda: PLAIN[: len(PLAIN) // 2], "no ZIP"),
    "tail missing": (lambda: PLAIN[:-5], "no ZIP"),
    "duplicate": (lambda: zipped(all_with(f"archive/{MODEL}")), "twice"),
    "absolute": (lambda: zipped(all_with("/etc/passwd")), "one folder"),
    "parent": (lambda: zipped(all_with("archive/../evil")), "one folder"),
    "backslash": (lambda: zipped(all_with("archive/..\\evil")), "one folder"),
    "two roots": (lambda: zipped(all_with("other/evil")), "one folder"),
    "control character": (lambda: zipped(all_with("archive/a\nb")), "one folder"),
    "unknown member": (lambda: zipped(all_with("archive/evil.bin")), "evil.bin"),
    "bomb": (lambda: zipped(all_with("archive/extra/a", bytes(70 << 20)), zipfile.ZIP_DEFLATED), "bomb"),
    "method": (lambda: zipped(all_with("archive/extra/a", b"a"), zipfile.ZIP_LZMA), "method"),
    "encrypted": (encrypted, "encrypted"),
    "no graph": (lambda: all_but(MODEL), MODEL),
    "no weights config": (lambda: all_but(WEIGHTS_CONFIG), WEIGHTS_CONFIG),
    "no weight": (lambda: all_but("data/weights/weight_0"), "layer.weight"),
    "short weight": (lambda: changed("data/weights/weight_0", bytes(20)), "layer.weight.*needs 24"),
    "odd weight": (lambda: changed("data/weights/weight_0", bytes(26)), "layer.weight"),
    "format": (lambda: changed("archive_format", b"pt3"), "archive_format"),
    "big endian": (lambda: changed("byteorder", b"big"), "byteorder"),
    "graph no JSON": (lambda: changed(MODEL, b"{"), "JSON"),
    "graph deep": (lambda: changed(MODEL, b"[" * 100_000), "JSON"),
    "graph a list": (lambda: changed(MODEL, b"[]"), "ExportedProgram"),
    "graph empty": (lambda: changed(MODEL, b"{}"), "schema version"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name: str) -> None:
    make, message = BAD_FILES[name]
    with pytest.raises(InvalidModelFile, match=message) as raised:
        load_program(make())
    assert "save" in str(raised.value) or "export" in str(raised.value)


def test_a_weight_on_another_device_is_no_attack() -> None:
    members = unpacked()
    edit(
        members,
        WEIGHTS_CONFIG,
        lambda v: v["config"]["layer.weight"]["tensor_meta"]["device"].update(type="cuda"),
    )
    with pytest.raises(InvalidModelFile, match="move the model to the CPU") as raised:
        load_program(packed(members))
    assert not isinstance(raised.value, UnsafeModelFile)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(PLAIN) - 1), st.integers(0, 7))
def test_flipped_bits_of_the_file(position: int, bit: int) -> None:
    data = bytearray(PLAIN)
    data[position] ^= 1 << bit
    loads_or_is_invalid(bytes(data))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([MODEL, WEIGHTS_CONFIG, CONSTANTS_CONFIG]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 127),
)
def test_changed_bytes_behind_an_intact_checksum(name: str, where: float, value: int) -> None:
    members = unpacked(clean_archive(PLAIN))
    data = bytearray(members[name])
    data[int(where * len(data))] = value
    loads_or_is_invalid(packed({**members, name: bytes(data)}))


ODD = st.sampled_from(
    [None, True, -1, 0, 2**63, 1e300, "", "x", "Infinity", [], {}, [[]], {"as_int": -5}, {"as_none": True}]
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([MODEL, WEIGHTS_CONFIG]), st.randoms(use_true_random=False), ODD)
def test_odd_values_anywhere_in_the_json(name: str, random: Any, odd: Any) -> None:
    members = unpacked(clean_archive(PLAIN))
    value = json.loads(members[name])
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = random.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or random.random() < 0.1:
            node[key] = odd
            break
        node = node[key]
    loads_or_is_invalid(packed({**members, name: json.dumps(value).encode()}))


def loads_or_is_invalid(data: bytes) -> None:
    try:
        load_program(data)
    except InvalidModelFile as error:
        assert str(error)  # noqa: PT017 - both outcomes are right, any other error is not


def test_archives_are_a_function_of_their_members() -> None:
    members = {"a/b": bytes(1000), "a/c": b"xyz"}
    data = write_archive(members, compress=True)
    assert data == write_archive(dict(reversed(members.items())), compress=True)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert [i.compress_type for i in archive.infolist()] == [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED]
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {name: archive.read(name) for name in archive.namelist()} == members
