"""JSON from strangers: read as the standard library reads it, or refused in one short line, in time."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.storage.json_text import parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_any_value_comes_back(value: object, bom: bool) -> None:
    data = json.dumps(value).encode("utf-8-sig" if bom else "utf-8")
    assert parse_json(data) == value


@given(st.binary(max_size=64))
def test_any_bytes_give_a_value_or_one_line(data: bytes) -> None:
    try:
        parse_json(data)
    except ValueError as error:
        told = str(error)
    else:
        told = "a value"
    assert told.isprintable()
    assert 0 < len(told) < 250


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "digits"),
        (b'{"a": 1, "a": 2}', "'a' stands in it twice"),
        (b'{"a\\nb": 1, "a\\nb": 2}', r"'a\\nb' stands in it twice"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
    ],
    ids=["lists", "objects", "digits", "twice", "newline", "utf16", "not_utf8", "empty"],
)
def test_what_is_wrong_is_told(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_millions_of_values_are_counted_and_not_built() -> None:
    data = b"[" + b"[]," * 3_000_000 + b"[]]"
    with pytest.raises(ValueError, match="6000002 values and keys, more than 4000000"):
        parse_json(data)
    assert len(parse_json(data[:1_000_000] + b"[]]", most_signs=700_000)) == 333_334


def test_the_last_of_many_keys_twice_is_found_at_once() -> None:
    names = [f'"{number}":0' for number in range(200_000)]
    data = ("{" + ",".join([*names, names[-1]]) + "}").encode()
    with pytest.raises(
        ValueError, match="'199999' stands in it twice"
    ):  # every pair of names would take an hour
        parse_json(data)
