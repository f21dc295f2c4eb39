"""Checkpoints: golden headers, lying headers, shards, and tensors by one range each."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.storage.checkpoint import open_checkpoint, read_tensor
from fleetpress.storage.errors import AccessDenied, InvalidModelFile, ObjectNotFound, SourceChanged
from fleetpress.storage.safetensors_header import header_of, read_header
from fleetpress.storage.store import ObjectInfo, ObjectStore, open_store
from fleetpress.storage.uri import join

FP8 = torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn)
TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.int64),
    "d": torch.ones(2, 2, dtype=torch.float16),
    "e": FP8,
    "f": torch.empty(0, 3),
    "g": torch.tensor([True, False]),
    "h": torch.tensor([1.0, 2.0], dtype=torch.float64),
}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.double(), other.double())


def test_a_file_tensor_by_tensor(store: ObjectStore) -> None:
    store.put("m.safetensors", safetensors.torch.save(TENSORS, {"format": "pt"}))
    checkpoint = open_checkpoint(join(store.uri, "m.safetensors"))
    assert sorted(checkpoint.tensors) == sorted(TENSORS)
    assert checkpoint.config is None
    assert checkpoint.quantized_by is None
    for name, tensor in TENSORS.items():
        assert same(read_tensor(checkpoint, name), tensor)
    with pytest.raises(InvalidModelFile, match="no tensor 'z'"):
        read_tensor(checkpoint, "z")


@pytest.mark.parametrize("target", ["private", "private/key"])
def test_a_link_out_of_the_folder_is_refused_before_any_weight_is_read(tmp_path: Path, target: str) -> None:
    folder = open_store(str(tmp_path / "net"))
    folder.put("config.json", b'{"model_type": "net"}')
    folder.put("model.safetensors", safetensors.torch.save(TENSORS))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_bytes(b"secret")
    (tmp_path / "net" / "extra").symlink_to(tmp_path / target)
    with pytest.raises(AccessDenied, match="extra is a link that leads out of"):
        open_checkpoint(folder.uri)


def test_a_file_that_changes_while_it_is_read(store: ObjectStore) -> None:
    store.put("m.safetensors", safetensors.torch.save(TENSORS))
    checkpoint = open_checkpoint(join(store.uri, "m.safetensors"))
    store.put("m.safetensors", safetensors.torch.save({**TENSORS, "b": TENSORS["b"] * 2}))
    with pytest.raises(SourceChanged):
        read_tensor(checkpoint, "b")


def file_of(entries: Any, data: bytes, length: int | None = None) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOLDEN = file_of(
    b'{"__metadata__":{"k":"v"},"y":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]},'
    b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   ',
    struct.pack("<ffH", 1.0, 2.0, 0x3F80),
)


def test_golden_bytes() -> None:
    header = header_of(GOLDEN, "golden")
    assert list(header.tensors) == ["x", "y"]
    assert header.metadata == {"k": "v"}
    x, y = header.tensors["x"], header.tensors["y"]
    assert (x.dtype, x.shape, x.offset_bytes, x.size_bytes) == ("F32", (2,), header.data_start, 8)
    assert (y.dtype, y.shape, y.offset_bytes, y.size_bytes) == ("BF16", (1,), header.data_start + 8, 2)
    assert header.data_start == len(GOLDEN) - 10
    assert set(safetensors.torch.load(GOLDEN)) == {"x", "y"}


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "short": (b"1234567", "too few"),
    "huge header": (struct.pack("<Q", 2**40) + b"{}", "no safetensors file"),
    "header cut": (file_of({}, b"", length=50), "cut short"),
    "no JSON": (file_of(b"{", b""), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff":1}', b""), "not valid JSON"),
    "deep JSON": (file_of(b'{"a":' * 50_000, b""), "not valid JSON"),
    "a list": (file_of([], b""), "no JSON object"),
    "duplicate": (
        file_of(b'{"x":%s,"x":%s}' % ((json.dumps(entry("U8", [1], 0, 1)).encode(),) * 2), b"1"),
        "'x' stands in it twice",
    ),
    "metadata": (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "no entry": (file_of({"x": 3}, b""), "'x' needs"),
    "dtype": (file_of({"x": entry("F99", [1], 0, 1)}, b"1"), "'x' has the unknown dtype"),
    "negative shape": (file_of({"x": entry("U8", [-1], 0, 1)}, b"1"), "'x' has a wrong shape"),
    "text shape": (file_of({"x": entry("U8", ["1"], 0, 1)}, b"1"), "'x' has a wrong shape"),
    "bool shape": (file_of({"x": entry("U8", [True], 0, 1)}, b"1"), "'x' has a wrong shape"),
    "size": (file_of({"x": entry("F32", [2], 0, 4)}, b"1234"), "'x' has 4 bytes, but F32"),
    "overflow": (file_of({"x": entry("F32", [2**62, 2**62], 0, 4)}, b"1234"), "'x' has 4 bytes"),
    "backwards": (file_of({"x": entry("U8", [1], 1, 0)}, b"1"), "'x' has a wrong shape"),
    "outside": (file_of({"x": entry("U8", [9], 0, 9)}, b"1"), "'x' ends at"),
    "overlap": (file_of({"x": entry("U8", [2], 0, 2), "y": entry("U8", [2], 1, 3)}, b"123"), "'y' overlaps"),
    "gap": (file_of({"x": entry("U8", [1], 0, 1), "y": entry("U8", [1], 2, 3)}, b"123"), "'y' leaves a gap"),
    "half a letter": (
        file_of(b'{"\\ud800":%s}' % json.dumps(entry("U8", [1], 0, 1)).encode(), b"1"),
        "no text",
    ),
    "rest": (file_of({"x": entry("U8", [1], 0, 1)}, b"123"), "2 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_lying_headers_are_named(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(InvalidModelFile, match=message) as raised:
        open_checkpoint(str(tmp_path / "m.safetensors"))
    assert "m.safetensors" in str(raised.value)
    with pytest.raises((safetensors.SafetensorError, ValueError)):
        # the library itself takes duplicate names and boolean sizes; we do not
        safetensors.torch.load(data if name not in ("duplicate", "bool shape") else b"")


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).filter(
    lambda n: n != "__metadata__"
)
DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64, torch.bool]
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(DTYPES, st.lists(st.integers(0, 3), max_size=3)), max_size=5))
def test_every_header_of_the_library_is_read(tensors: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    data = safetensors.torch.save(
        {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    )
    header = header_of(data, "file")
    assert {name: info.shape for name, info in header.tensors.items()} == {
        n: tuple(s) for n, (_, s) in tensors.items()
    }


WHOLE = safetensors.torch.save(TENSORS)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 7))
def test_flipped_bits(position: int, bit: int) -> None:
    data = bytearray(WHOLE)
    data[position] ^= 1 << bit
    try:
        header = header_of(bytes(data), "file")
    except InvalidModelFile as error:
        assert "file" in str(error)  # noqa: PT017 - both outcomes are right, any other error is not
    else:
        assert sum(info.size_bytes for info in header.tensors.values()) == len(data) - header.data_start


def sharded(store: ObjectStore, change: Callable[[dict[str, Any]], None] = lambda index: None) -> None:
    store.put("config.json", json.dumps({"model_type": "toy"}).encode())
    store.put("one.safetensors", safetensors.torch.save({"a": torch.ones(2), "b": torch.zeros(3)}))
    store.put("two.safetensors", safetensors.torch.save({"c": torch.full((2,), 7.0)}))
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    change(index)
    store.put("model.safetensors.index.json", json.dumps(index).encode())


def test_a_sharded_folder(store: ObjectStore) -> None:
    sharded(store)
    for other in ("tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", "model.onnx", ".cache/x"):
        store.put(other, b"{}")
    checkpoint = open_checkpoint(store.uri)
    assert checkpoint.config == {"model_type": "toy"}
    assert [file.path for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert [file.path for file in checkpoint.other_files] == [
        "1_Pooling/config.json",
        "config.json",
        "tokenizer.json",
    ]
    assert same(read_tensor(checkpoint, "c"), torch.full((2,), 7.0))


def point_at(shard: object, name: str = "c") -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update({name: shard})


BAD_INDEX: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing shard": (point_at("three.safetensors"), r"three\.safetensors is missing.*'c'"),
    "missing tensor": (point_at("two.safetensors", "d"), r"two\.safetensors has no tensor 'd'"),
    "absolute": (point_at("/etc/two.safetensors"), "no shard of this folder"),
    "parent": (point_at("../two.safetensors"), "no shard of this folder"),
    "another type": (point_at("config.json"), "no shard of this folder"),
    "number": (point_at(3), "no shard of this folder"),
    "no map": (lambda index: index.clear(), "weight_map"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_a_wrong_index_is_named(name: str, tmp_path: Path) -> None:
    change, message = BAD_INDEX[name]
    sharded(open_store(str(tmp_path)), change)
    with pytest.raises(InvalidModelFile, match=message):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
    ],
)
def test_weights_that_are_quantized_already(
    config: dict[str, Any], method: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    assert open_checkpoint(str(tmp_path)).quantized_by == method


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    with pytest.raises(ObjectNotFound, match=r"needs config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidModelFile, match=r"config\.json is not valid JSON"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(ObjectNotFound):
        open_checkpoint(str(tmp_path / "none.safetensors"))


class Spy:
    """A store that notes the ranges it gives out."""

    def __init__(self, store: ObjectStore) -> None:
        self.uri = store.uri
        self.ranges: list[tuple[str, int, int]] = []
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def head(self, key: str) -> ObjectInfo:
        self.ranges.append((key, 0, 0))
        return self._store.head(key)

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        self.ranges.append((key, start, length))
        return self._store.get_range(key, start, length, etag=etag)


@pytest.mark.parametrize("tensors", [1, 3000])
def test_a_header_costs_one_range_or_two(store: ObjectStore, tensors: int) -> None:
    data = safetensors.torch.save({f"x{n}": torch.zeros(100) for n in range(tensors)})
    info = store.put("m.safetensors", data)
    spy = Spy(store)
    header = read_header(spy, "m.safetensors", info.etag, size_bytes=len(data))  # type: ignore[arg-type]
    assert header == header_of(data, "m.safetensors")
    if tensors == 1:
        assert spy.ranges == [("m.safetensors", 0, len(data))]
    else:
        first = 128 << 10
        assert spy.ranges == [
            ("m.safetensors", 0, first),
            ("m.safetensors", first, header.data_start - first),
        ]
    assert read_header(store, "m.safetensors") == header


def test_a_header_of_another_version(store: ObjectStore) -> None:
    old = store.put("m.safetensors", WHOLE)
    store.put("m.safetensors", safetensors.torch.save({**TENSORS, "b": TENSORS["b"] * 2}))
    with pytest.raises(SourceChanged):
        read_header(store, "m.safetensors", old.etag, size_bytes=old.size_bytes)


def many_shards(store: ObjectStore, count: int) -> None:
    store.put("config.json", b"{}")
    weight_map = {}
    for number in range(count):
        shard = f"model-{number:05}.safetensors"
        store.put(shard, safetensors.torch.save({f"t{number}": torch.full((2,), float(number))}))
        weight_map[f"t{number}"] = shard
    backwards = dict(reversed(weight_map.items()))
    store.put("model.safetensors.index.json", json.dumps({"weight_map": backwards}).encode())


def test_every_shard_costs_one_range(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    many_shards(store, 20)
    spy = Spy(store)
    monkeypatch.setattr("fleetpress.storage.checkpoint.open_store", lambda _: spy)
    checkpoint = open_checkpoint(store.uri)
    assert list(checkpoint.tensors) == [f"t{number}" for number in reversed(range(20))]
    assert [file.path for file in checkpoint.files] == [
        f"model-{number:05}.safetensors" for number in range(20)
    ]
    assert len(spy.ranges) == 20  # config and index are read whole
    assert same(read_tensor(checkpoint, "t7"), torch.full((2,), 7.0))


def test_the_first_wrong_shard_is_named(tmp_path: Path) -> None:
    many_shards(open_store(str(tmp_path)), 20)
    for number in (17, 3, 11):
        (tmp_path / f"model-{number:05}.safetensors").write_bytes(b"short")
    for _ in range(5):
        with pytest.raises(InvalidModelFile, match=r"model-00003\.safetensors has 5 bytes"):
            open_checkpoint(str(tmp_path))
