"""Headers written before there are tensors are those that the safetensors library and our own reader understand."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from fleetpress.storage.safetensors_header import BITS_BY_DTYPE, LENGTH_BYTES, header_of
from fleetpress.storage.safetensors_layout import framed, header_of_file, size_of

Tensors = list[tuple[str, str, list[int]]]
WHOLE_BYTES = sorted(name for name, bits in BITS_BY_DTYPE.items() if bits % 8 == 0)
# What both torch and the library's Python side know.
TORCH = ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "I16", "F16", "BF16", "I32", "F32", "I64", "F64", "C64"]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda n: n != "__metadata__")


def some_tensors(dtypes: list[str]) -> st.SearchStrategy[Tensors]:
    """Names, dtypes and shapes, scalars and empty tensors among them."""
    shapes = st.lists(st.integers(0, 6), max_size=3)
    entries = st.tuples(NAMES, st.sampled_from(dtypes), shapes)
    return st.lists(entries, max_size=6, unique_by=lambda entry: entry[0])


@settings(max_examples=150, deadline=None)
@given(some_tensors(WHOLE_BYTES))
def test_our_reader_finds_every_tensor_where_it_was_planned(tensors: Tensors) -> None:
    header, offsets, size_bytes = header_of_file(tensors)
    found = header_of(header + bytes(size_bytes - len(header)), "here")
    assert found.data_start == len(header)
    assert len(header) % 8 == 0
    assert dict(found.metadata) == {"format": "pt"}
    assert found.tensors.keys() == {name for name, _, _ in tensors}
    end = len(header)
    for (name, dtype, shape), offset in zip(tensors, offsets, strict=True):
        info = found.tensors[name]
        assert (info.dtype, list(info.shape), info.size_bytes) == (dtype, shape, size_of(dtype, shape))
        assert info.offset_bytes == offset == end, "one after the other, in the order given"
        end += info.size_bytes
    assert end == size_bytes


@settings(max_examples=80, deadline=None)
@given(some_tensors(TORCH))
def test_the_library_reads_the_same_bytes(tensors: Tensors) -> None:
    header, offsets, size_bytes = header_of_file(tensors)
    body = bytes(index % 2 for index in range(size_bytes - len(header)))  # a bool is 0 or 1
    file = header + body
    found = load(file)
    assert found.keys() == {name for name, _, _ in tensors}
    for (name, dtype, shape), offset in zip(tensors, offsets, strict=True):
        value = found[name]
        assert list(value.shape) == shape
        assert value.nbytes == size_of(dtype, shape)
        own = header_of(save({"x": value}), "there").tensors["x"]
        assert own.dtype == dtype
        if value.numel():
            data = bytes(value.reshape(-1).view(torch.uint8).tolist())
            assert data == file[offset : offset + value.nbytes]


def test_a_file_on_disk_opens_with_its_metadata(tmp_path: Path) -> None:
    """transformers refuses files whose metadata name no format."""
    header, _, size_bytes = header_of_file([("a.weight", "BF16", (2, 3)), ("ünï.重み", "I64", (2,))])
    (tmp_path / "a.safetensors").write_bytes(header + bytes(size_bytes - len(header)))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == ["a.weight", "ünï.重み"]
        assert file.get_tensor("ünï.重み").tolist() == [0, 0]


def test_names_are_text_and_not_escapes() -> None:
    header, _, _ = header_of_file([("重み", "F32", ())])
    assert "重み".encode() in header
    assert int.from_bytes(header[:LENGTH_BYTES], "little") == len(header) - LENGTH_BYTES
    entries = json.loads(header[LENGTH_BYTES:])
    assert entries["重み"] == {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}


def test_a_file_of_no_tensors_is_a_header() -> None:
    header, offsets, size_bytes = header_of_file([])
    assert (offsets, size_bytes) == ([], len(header))
    assert load(header) == {}


@pytest.mark.parametrize("text", ["", "{}", "{} ", '{"重み": 1}'])
def test_a_text_is_framed_by_its_length_in_bytes(text: str) -> None:
    data = framed(text)
    assert int.from_bytes(data[:8], "little") == len(text.encode())
    assert data[8:].decode() == text


@pytest.mark.parametrize(
    ("dtype", "shape", "size_bytes"),
    [("F32", (), 4), ("F32", (0, 7), 0), ("BF16", (3, 5), 30), ("F4", (4, 2), 4), ("F6_E2M3", (4,), 3)],
)
def test_sizes(dtype: str, shape: tuple[int, ...], size_bytes: int) -> None:
    assert size_of(dtype, shape) == size_bytes
