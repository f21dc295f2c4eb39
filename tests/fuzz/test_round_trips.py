"""What fleetpress, torch, NumPy and Arrow write is read again as it was: random values, the same ones at every run."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzz_bombs import saved
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleetpress.jobs.runs.results import (
    FleetResult,
    ModelResult,
    read_result,
    write_summary,
)
from fleetpress.jobs.tasks import Output, TaskRecord, record_from_json, to_json
from fleetpress.storage.artifact import (
    point_latest,
    publish_manifest,
    read_manifest,
    resolve,
    verify_files,
    write_artifact,
)
from fleetpress.storage.canonical_json import dumps, loads
from fleetpress.storage.checkpoint import open_checkpoint, read_tensor
from fleetpress.storage.data import find_shards, read_shard
from fleetpress.storage.parquet import read_parquet
from fleetpress.storage.safetensors_header import header_of
from fleetpress.storage.safetensors_layout import header_of_file, size_of
from fleetpress.storage.state_dicts import load_state_dict
from fleetpress.storage.store import open_store
from fleetpress.storage.uri import join, normalize, split


def quick(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


SHAPES = st.lists(st.integers(0, 4), max_size=3)
DTYPES = st.sampled_from(["F32", "BF16", "I8", "BOOL", "F64", "F8_E4M3"])


@quick(100)
@given(
    st.lists(st.tuples(st.text(max_size=5), DTYPES, SHAPES), unique_by=lambda tensor: tensor[0], max_size=5)
)
def test_headers_come_back(tensors: list[tuple[str, str, list[int]]]) -> None:
    tensors = [tensor for tensor in tensors if tensor[0] != "__metadata__"]
    head, offsets, size_bytes = header_of_file(tensors)
    found = header_of(head + bytes(size_bytes - len(head)), "x")
    assert {(info.name, info.dtype, info.shape) for info in found.tensors.values()} == {
        (name, dtype, tuple(shape)) for name, dtype, shape in tensors
    }
    assert [found.tensors[name].offset_bytes for name, _, _ in tensors] == offsets
    assert [found.tensors[name].size_bytes for name, _, _ in tensors] == [
        size_of(d, s) for _, d, s in tensors
    ]


@quick(60)
@given(
    dtype=st.sampled_from(["<f4", ">f4", "<i8", "|u1", "|b1", "<f2", "<c8"]),
    shape=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    fortran=st.booleans(),
    deflate=st.booleans(),
)
@example(dtype="<f4", shape=[0, 3], fortran=True, deflate=True)
def test_arrays_come_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int], fortran: bool, deflate: bool
) -> None:
    array = (np.arange(np.prod(shape)) % 2).reshape(shape).astype(dtype, order="F" if fortran else "C")
    buffer = io.BytesIO()
    (np.savez_compressed if deflate else np.savez)(buffer, inputs=array)
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.npz").write_bytes(buffer.getvalue())
    (file,) = find_shards(f"{folder}/a.npz")
    found = read_shard(open_store(str(folder)), file)["inputs"]
    assert found.shape == array.shape
    assert found.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(found, array)


NAMES = st.text(st.sampled_from("abé.-_ 1[*"), min_size=1, max_size=10).filter(
    lambda name: name not in (".", "..")
)


@quick(100)
@given(
    st.sampled_from(["s3://bucket", "s3://bucket/a b", "/a", "/", "a/b"]),
    st.lists(NAMES, min_size=1, max_size=4),
)
def test_places_come_apart_as_they_were_joined(root: str, names: list[str]) -> None:
    place = join(root, *names)
    assert normalize(place) == place
    assert split(place) == (join(root, *names[:-1]) if names[1:] else normalize(root), names[-1])


@quick(60)
@given(st.lists(NAMES, max_size=3), st.floats(0, 1e6), st.dictionaries(st.text(max_size=5), st.integers()))
def test_records_come_back(keys: list[str], seconds: float, result: dict[str, int]) -> None:
    outputs = tuple(Output(key=key, bytes=3, sha256="0" * 64) for key in keys)
    record = TaskRecord(
        task="t",
        model="m",
        kind="k",
        digest="d",
        outputs=outputs,
        result=result,
        seconds=seconds,
        fleetpress_version="1",
    )
    assert record_from_json(loads(dumps(to_json(record)))) == record


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=3)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@quick(40)
@given(st.dictionaries(PATHS, st.binary(max_size=20), max_size=4), OBJECTS)
def test_artifacts_come_back(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], source: dict[str, Any]
) -> None:
    """Manifest and pointer; and every file is found to be as the manifest says."""
    names = [*files]
    if any(other.startswith(f"{name}/") for name in names for other in names):
        return  # a folder has no file and folder of one name
    store = open_store(str(tmp_path_factory.mktemp("output")))
    written = write_artifact(store, "m", "d", files)
    publish_manifest(store, "m", "d", {"source": source}, written)
    point_latest(store, "m", "d", "r")
    model = f"{store.uri}/models/m"
    assert resolve(model) == f"{model}/d"
    assert read_manifest(model) == {"files": [file.as_dict() for file in written], "source": source}
    assert verify_files(model) == []


ROWS = st.builds(
    ModelResult,
    name=TEXT,
    state=st.sampled_from(["pending", "running", "published", "unchanged", "rejected", "failed"]),
    reason=st.none() | TEXT,
    digest=st.none() | TEXT,
    before=st.none() | OBJECTS,
    after=st.none() | OBJECTS,
    compression_ratio=st.none() | st.floats(0, 100),
    bits_per_weight=st.none() | st.floats(0, 100),
)


@quick(60)
@given(
    st.lists(ROWS, max_size=4),
    st.sampled_from(["running", "done", "interrupted"]),
    st.lists(TEXT, max_size=2),
)
def test_summaries_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[ModelResult], state: Any, warnings: list[str]
) -> None:
    store = open_store(str(tmp_path_factory.getbasetemp() / "runs"))
    result = FleetResult(
        run="r", state=state, name="n", output="o", models=tuple(rows), seconds=1.5, warnings=tuple(warnings)
    )
    write_summary(store, result)
    assert read_result(store, "r") == result


@quick(30)
@given(
    st.dictionaries(
        st.text(max_size=4).filter(lambda name: name != "__metadata__"), SHAPES, min_size=1, max_size=5
    ),
    st.data(),
)
def test_shards_and_their_index_come_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    shard_of = {name: data.draw(st.sampled_from(["a.safetensors", "b/c.safetensors"])) for name in shapes}
    values = {name: np.arange(np.prod(shape), dtype="<f4") + len(name) for name, shape in shapes.items()}
    for shard in set(shard_of.values()):
        names = [name for name in shapes if shard_of[name] == shard]
        head, _, _ = header_of_file([(name, "F32", shapes[name]) for name in names])
        (folder / shard).parent.mkdir(exist_ok=True)
        (folder / shard).write_bytes(head + b"".join(values[name].tobytes() for name in names))
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors.index.json").write_bytes(dumps({"weight_map": shard_of}))
    checkpoint = open_checkpoint(str(folder))
    assert {name: location.file.path for name, location in checkpoint.tensors.items()} == shard_of
    for name, shape in shapes.items():
        assert torch.equal(read_tensor(checkpoint, name), torch.from_numpy(values[name]).reshape(shape))


KINDS = st.sampled_from(["float32", "float64", "float16", "int64", "int8", "uint8", "bool"])
COLUMNS = st.dictionaries(
    st.text("abé ._", min_size=1, max_size=4),
    st.tuples(KINDS, st.lists(st.integers(1, 3), max_size=2)),
    min_size=1,
)


@quick(60)
@given(
    columns=COLUMNS,
    rows=st.integers(0, 20),
    compression=st.sampled_from(["none", "snappy", "gzip", "zstd"]),
    version=st.sampled_from(["1.0", "2.0"]),
    group=st.integers(1, 20),
)
def test_tables_come_back(
    columns: dict[str, tuple[str, list[int]]], rows: int, compression: str, version: str, group: int
) -> None:
    arrays = {
        name: (np.arange(rows * int(np.prod(shape))) % 7).astype(kind).reshape(rows, *shape)
        for name, (kind, shape) in columns.items()
    }
    buffer = io.BytesIO()
    table = pa.table({name: _nested(array) for name, array in arrays.items()})
    pq.write_table(table, buffer, compression=compression, data_page_version=version, row_group_size=group)
    found = read_parquet(buffer.getvalue(), "a.parquet")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert rows == 0 or np.array_equal(found[name], array)


def _nested(array: Any) -> pa.Array:
    values = pa.array(array.ravel())
    for size in reversed(array.shape[1:]):
        values = pa.ListArray.from_arrays(np.arange(len(values) // size + 1, dtype=np.int32) * size, values)
    return values


DTYPES_OF_TORCH = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16])


@quick(60)
@given(
    st.dictionaries(st.text(max_size=5), st.tuples(DTYPES_OF_TORCH, SHAPES), min_size=1, max_size=4),
    st.booleans(),
)
def test_state_dicts_come_back(tensors: dict[str, tuple[torch.dtype, list[int]]], zipped: bool) -> None:
    state = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    found = load_state_dict(saved(lambda _: state, _use_new_zipfile_serialization=zipped))
    assert found.keys() == state.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in state.items()
    )
