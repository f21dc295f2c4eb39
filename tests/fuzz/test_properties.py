"""Valid files of every kind, changed at random in structure or bytes: accepted, or refused in clear words."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from fuzz_bombs import header, saved
from fuzz_makers import members, program, zipped
from fuzz_replay import bytes_of
from fuzz_targets import INDEX, MANIFEST, METRICS, POINTER, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

MODEL = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"


def quick(examples: int) -> Any:
    """The same examples at every run: what is found stays found, and is put into the corpus."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def keeps_its_promises(target: str, data: bytes) -> None:
    found = verdict(target, data)
    assert not found.failure, found.failure


# ---- JSON whose values are swapped

ODD = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, -(2**200)]),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e308, 0.5]),
    st.sampled_from(
        ["", "x", "a\nb", "\0", "\ud800", "\u2028", "../x", "/etc/passwd", "s3://a", "é" * 400, "1e9"]
    ),
    st.sampled_from([[], {}, [[]], [None], {"": {}}, [0] * 100, {"as_int": -5}, "[" * 2000]),
    st.text(max_size=8),
    st.integers(),
)


def _json_targets() -> dict[str, tuple[bytes, Callable[[Any], bytes]]]:
    """A valid value of each target that is JSON or holds it, and how it is written."""

    def plain(value: Any) -> bytes:
        return json.dumps(value).encode()

    def with_header(data: bytes) -> Callable[[Any], bytes]:
        return lambda value: header(json.dumps(value), data)

    def member(name: str) -> Callable[[Any], bytes]:
        return lambda value: zipped({**members(), name: json.dumps(value).encode()})

    tensors = (
        b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}'
    )
    rows = (
        b'{"inputs":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"targets":{"dtype":"I8","shape":[2],"data_offsets":[24,26]}}'
    )
    config = (
        b'{"model_type":"llama","quantization_config":'
        b'{"quant_method":"x","config_groups":{"a":{"targets":["b"]}}}}'
    )
    spec = (
        b'{"version":1,"name":"n","output":"/tmp/o","models":[{"name":"a","source":"/tmp/a.pt2","recipe":"r",'
        b'"data":"d","factory":"a.b:c","inputs":{"x":{"shape":["batch",3],"dtype":"int64"}}}],"data":{"d":{"train":'
        b'["/tmp/a-*.npz"],"eval":"/tmp/b.npz","loss":"mse","metric":"r2"}},"recipes":{"r":{"train":{"epochs":1,'
        b'"lr":0.1},"prune":{"method":"magnitude","sparsity":0.5,"targets":["re:a.*"]},"quantize":{"scheme":"W4A16",'
        b'"group_size":64,"ignore":["lm_head"]},"validate":{"max_drop":"1%"}}},"resources":{"workers":2,'
        b'"memory_per_task":"2GiB","time_per_task":"1h"},"seed":3}'
    )
    return {
        "spec": (spec, plain),  # JSON is YAML
        "safetensors_header": (tensors, with_header(bytes(26))),
        "checkpoint_shard": (tensors, with_header(bytes(26))),
        "safetensors_data": (rows, with_header(bytes(26))),
        "safetensors_index": (INDEX, plain),
        "checkpoint_config": (config, plain),
        "manifest": (
            MANIFEST.replace(b'"files":[]', b'"files":[{"path":"a","bytes":1,"sha256":"0"}]'),
            plain,
        ),
        "metrics": (METRICS, plain),
        "pointer": (POINTER, plain),
        "summary": (bytes_of("summary/accepted-plain"), plain),
        "record": (bytes_of("record/accepted-plain"), plain),
        "program": (members()[MODEL], member(MODEL)),
        "program of other weights": (members()[WEIGHTS], member(WEIGHTS)),
    }


JSON_TARGETS = _json_targets()


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key of it."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        keys: Any = list(node) if isinstance(node, dict) else range(len(node))
        found += [(node, key) for key in keys]
        todo += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found


def change(draw: Any, value: Any) -> None:
    """One value replaced, removed, doubled or exchanged with another."""
    found = places(value)
    if not found:
        return
    node, key = draw(st.sampled_from(found))
    how = draw(st.sampled_from(["replace", "replace", "remove", "double", "exchange", "rename"]))
    if how == "replace":
        node[key] = draw(ODD)
    elif how == "remove":
        del node[key]
    elif how == "double" and isinstance(node, list):
        node.append(node[key])
    elif how == "rename" and isinstance(node, dict):
        node[draw(st.sampled_from(["", "x", "a\nb", "\ud800", "__class__", "é" * 600, "__metadata__"]))] = (
            node.pop(key)
        )
    else:
        other, place = draw(st.sampled_from(found))
        taken = json.dumps(other[place])  # a copy: no value may hold itself
        node[key] = json.loads(taken)


@pytest.mark.parametrize("name", JSON_TARGETS)
def test_values_that_are_swapped(name: str) -> None:
    seed, write = JSON_TARGETS[name]
    target = name.split(maxsplit=1)[0]
    assert not verdict(target, write(json.loads(seed))).failure

    @quick(25 if target == "program" else 120)
    @given(st.data())
    def changed(data: st.DataObject) -> None:
        value = json.loads(seed)
        for _ in range(data.draw(st.integers(1, 3))):
            change(data.draw, value)
        keeps_its_promises(target, write(value))

    changed()


# ---- bytes that are flipped, cut out, doubled or put in

_BINARY: dict[str, list[Callable[[], bytes]]] = {
    "spec": [lambda: bytes_of("spec/accepted-plain")],
    "safetensors_header": [lambda: bytes_of("safetensors_header/accepted-plain")],
    "checkpoint_shard": [lambda: bytes_of("checkpoint_shard/accepted-plain")],
    "safetensors_data": [lambda: bytes_of("safetensors_data/accepted-plain")],
    "npz": [lambda: bytes_of("npz/accepted-plain")],
    "parquet": [lambda: bytes_of("parquet/accepted-plain")],
    "program": [program],
    "state_dict": [
        lambda: saved(lambda torch: {"w": torch.ones(2, 3), "b": torch.ones(1)}),
        lambda: saved(lambda torch: {"w": torch.ones(2, 3)}, _use_new_zipfile_serialization=False),
    ],
    "summary": [lambda: bytes_of("summary/accepted-plain")],
    "record": [lambda: bytes_of("record/accepted-plain")],
    "uri": [lambda: b"s3://bucket/a/*/model.pt2", lambda: b"file:///a/b%20c/[x]?.pt2"],
    "key": [lambda: b"models/a/model.safetensors"],
}
INSERTED = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [b"\0" * 16, b"\xff" * 8, b"[" * 3000, b"PK\5\6" + bytes(18), b"PAR1", b"\n", b"../", b"9" * 5000]
    ),
)


@pytest.mark.parametrize("target", _BINARY)
def test_bytes_that_are_changed(target: str) -> None:
    seeds = [make() for make in _BINARY[target]]

    @quick(15 if target == "program" else 150)
    @given(st.sampled_from(seeds), st.data())
    def changed(seed: bytes, data: st.DataObject) -> None:
        found = bytearray(seed)
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(found)))
            end = data.draw(st.integers(start, min(len(found), start + 64)))
            found[start:end] = data.draw(st.one_of(INSERTED, st.just(bytes(found[end : end + 32]))))
        keeps_its_promises(target, bytes(found))

    changed()


@pytest.mark.parametrize("target", [name for name in _BINARY if name not in ("uri", "key", "program")])
def test_files_that_are_cut_short(target: str) -> None:
    for make in _BINARY[target]:
        seed = make()
        for size in {*range(0, len(seed), max(1, len(seed) // 40)), len(seed) - 1}:
            keeps_its_promises(target, seed[:size])


@quick(300)
@given(
    st.sampled_from(["uri", "key"]),
    st.text(st.sampled_from("ab/.\\*?[]:%20\n\0~@é\ud800\u2028s3file"), max_size=30),
)
def test_names_of_any_letters(target: str, text: str) -> None:
    keeps_its_promises(target, text.encode("utf-8", "surrogatepass"))
