"""Data shards: three formats, the same arrays; bad ones are refused with the file and array named."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from fleetpress.storage.data import Arrays, find_shards, read_shard, shards_root
from fleetpress.storage.errors import InvalidData, InvalidUri, ObjectNotFound, SourceChanged
from fleetpress.storage.memory import asked_bytes
from fleetpress.storage.store import open_store


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def parquet(**columns: pa.Array) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def read(folder: Path, name: str, data: bytes) -> Arrays:
    (folder / name).write_bytes(data)
    (file,) = find_shards(str(folder / name))
    return read_shard(open_store(str(folder)), file)


INPUTS = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
TARGETS = np.array([3, 1, 2, 0])


def fixed_lists() -> bytes:
    inner = pa.FixedSizeListArray.from_arrays(pa.array(INPUTS.reshape(-1)), 2)
    return parquet(inputs=pa.FixedSizeListArray.from_arrays(inner, 3), targets=pa.array(TARGETS))


GOOD = {
    "a.npz": npz(inputs=INPUTS, targets=TARGETS),
    "fortran.npz": npz(inputs=np.asfortranarray(INPUTS), targets=TARGETS),
    "big_endian.npz": npz(inputs=INPUTS.astype(">f4"), targets=TARGETS),
    "a.safetensors": safetensors.torch.save(
        {"inputs": torch.tensor(INPUTS), "targets": torch.tensor(TARGETS)}
    ),
    "bf16.safetensors": safetensors.torch.save(
        {"inputs": torch.tensor(INPUTS, dtype=torch.bfloat16), "targets": torch.tensor(TARGETS)}
    ),
    "fixed.parquet": fixed_lists(),
    "lists.parquet": parquet(
        inputs=pa.array(INPUTS.tolist(), pa.list_(pa.list_(pa.float32()))), targets=pa.array(TARGETS)
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_format_gives_the_same_arrays(name: str, tmp_path: Path) -> None:
    arrays = read(tmp_path, name, GOOD[name])
    assert sorted(arrays) == ["inputs", "targets"]
    assert arrays["inputs"].dtype == np.float32
    assert np.array_equal(arrays["inputs"], INPUTS)
    assert np.array_equal(arrays["targets"], TARGETS)


BAD = {
    "object.npz": (npz(inputs=np.array([{}, []], dtype=object)), "'inputs' holds Python objects"),
    "text.npz": (npz(inputs=np.array(["a", "b"])), "'inputs' holds"),
    "scalar.npz": (npz(inputs=np.float32(1)), "'inputs' is a single number"),
    "lengths.npz": (npz(inputs=INPUTS, targets=TARGETS[:2]), "different lengths"),
    "cut.npz": (npz(inputs=INPUTS)[:-30], "no intact .npz"),
    "text2.npz": (b"hello", "no intact .npz"),
    "empty.npz": (b"", "is empty"),
    "none.npz": (npz(), "holds no arrays"),
    "cut.safetensors": (GOOD["a.safetensors"][:-3], "cut short"),
    "fp8.safetensors": (
        safetensors.torch.save({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}),
        "'x' is F8_E4M3",
    ),
    "ragged.parquet": (parquet(inputs=pa.array([[1.0], [1.0, 2.0]])), "'inputs' is ragged"),
    "nulls.parquet": (parquet(inputs=pa.array([1.0, None])), "'inputs' has 1 empty"),
    "text.parquet": (parquet(inputs=pa.array(["a"])), "'inputs' holds string"),
    "cut.parquet": (fixed_lists()[:-10], "no intact Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shards_are_named(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    with pytest.raises(InvalidData, match=message) as raised:
        read(tmp_path, name, data)
    assert name in str(raised.value)


def test_a_pickled_array_does_not_run(tmp_path: Path) -> None:
    class Mark:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    with pytest.raises(InvalidData, match="unpickled"):
        read(tmp_path, "p.npz", npz(inputs=np.array([Mark()], dtype=object)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("compressed", "times"), [(False, 1), (True, 2)])
def test_an_array_that_does_not_fit_says_how_much_it_needs(
    compressed: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zlib only says that it has no room, and holds everything twice at its end."""

    def refuse(_member: object, _size: int) -> bytes:
        raise MemoryError("Unable to allocate output buffer.")

    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, inputs=np.zeros(1000, np.float32))
    monkeypatch.setattr(zipfile.ZipExtFile, "read", refuse)
    size = 4000 + 128  # with the header of the array
    with pytest.raises(
        MemoryError, match=f"tried to allocate {size * times} bytes to read 'inputs.npy'"
    ) as caught:
        read(tmp_path, "a.npz", buffer.getvalue())
    assert asked_bytes(caught.value) == size * times


def test_a_header_that_claims_more_than_the_file_has(tmp_path: Path) -> None:
    data = GOOD["a.npz"].replace(b"'shape': (4, 3, 2), }", b"'shape': (4, 3, 9), }")
    with pytest.raises(InvalidData):
        read(tmp_path, "lie.npz", data)


def test_shards_are_found_sorted_and_pinned(tmp_path: Path) -> None:
    for name in ("train-1.npz", "train-0.npz", "test.npz", ".train-2.npz"):
        (tmp_path / name).write_bytes(GOOD["a.npz"])
    pattern = f"{tmp_path}/train-*.npz"
    files = find_shards(pattern)
    assert [file.path for file in files] == ["train-0.npz", "train-1.npz"]
    (tmp_path / "train-0.npz").write_bytes(GOOD["fortran.npz"])
    with pytest.raises(SourceChanged):
        read_shard(open_store(shards_root(pattern)), files[0])


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"1,2")
    with pytest.raises(ObjectNotFound, match="matches no data"):
        find_shards(f"{tmp_path}/*.npz")
    with pytest.raises(InvalidData, match="csv"):
        find_shards(f"{tmp_path}/a.csv")
    with pytest.raises(InvalidUri, match=r"\*\*"):
        find_shards(f"{tmp_path}/**/a.npz")
