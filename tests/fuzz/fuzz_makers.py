"""Cases that would be large as files, or that a library writes best: named makers of bytes, `target/name` -> maker.

Pickles leave a file `fleetpress-mark` in the working directory if they are ever run.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

MARK = "fleetpress-mark"
_MODEL = "archive/models/model.json"
_WEIGHTS = "archive/data/weights/model_weights_config.json"
_CONSTANTS = "archive/data/constants/model_constants_config.json"
Members = dict[str, bytes]
_QUICK = 1  # level of compression: a bomb of zeros is no worse when it took longer to make


class Payload:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (MARK, "w")


def zipped(members: Members, *, deflate: bool = False) -> bytes:
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", how, compresslevel=_QUICK) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def unzipped(data: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zeros_zipped(name: str, head: bytes, zeros: int) -> bytes:
    """A small ZIP whose one member unpacks to `zeros` more bytes than `head`."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=_QUICK) as archive,
        archive.open(name, "w") as member,
    ):
        member.write(head)
        for _ in range(zeros >> 24):
            member.write(bytes(1 << 24))
    return buffer.getvalue()


# ---- programs


@cache
def program() -> bytes:
    """A small program as torch saves it."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + torch.tensor([1.0, 2.0])

    torch.manual_seed(0)
    batch = {0: torch.export.Dim("batch")}
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Net().eval(), (torch.ones(4, 3),), dynamic_shapes=(batch,)), buffer)
    return buffer.getvalue()


def members() -> Members:
    found = unzipped(program())
    root = next(iter(found)).split("/")[0]
    return {name.replace(root, "archive", 1): data for name, data in found.items()}


def with_member(name: str, data: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: zipped({**members(), name: data()}, deflate=True)


def edited(name: str, change: Callable[[Any], object]) -> Callable[[], bytes]:
    """The program with one of its JSON members changed."""

    def make() -> bytes:
        found = members()
        value = json.loads(found[name])
        change(value)
        return zipped({**found, name: json.dumps(value).encode()})

    return make


def _weight(value: Any) -> Any:
    return value["config"]["layer.weight"]


def _node(value: Any) -> Any:
    return value["graph_module"]["graph"]["nodes"][0]


def torch_pickle() -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    return buffer.getvalue()


def sizes(*shape: int) -> list[dict[str, int]]:
    return [{"as_int": size} for size in shape]


PROGRAMS: dict[str, Callable[[], bytes]] = {
    "accepted-plain": program,
    "bomb-in-a-weight": with_member("archive/data/weights/weight_0", lambda: bytes(256 << 20)),
    "bomb-in-a-dropped-member": with_member("archive/extra/x", lambda: bytes(256 << 20)),
    "bomb-in-the-graph": with_member(_MODEL, lambda: b" " * (128 << 20)),
    "graph-nested-deeply": with_member(_MODEL, lambda: b"[" * 200_000),
    "graph-of-a-huge-integer": with_member(_MODEL, lambda: b'{"a": ' + b"9" * 5000 + b"}"),
    "graph-not-utf8": with_member(_MODEL, lambda: b'{"a": "\xff"}'),
    "graph-is-a-list": with_member(_MODEL, lambda: b"[]"),
    "graph-is-empty": with_member(_MODEL, lambda: b""),
    "pickled-sample-inputs-accepted": with_member("archive/data/sample_inputs/model.pt", torch_pickle),
    "pickled-object": with_member("archive/data/constants/custom_obj_0", lambda: pickle.dumps(Payload())),
    "pickled-old-format": with_member("archive/data.pkl", lambda: pickle.dumps(Payload())),
    "pickled-weight": edited(_WEIGHTS, lambda v: _weight(v).update(use_pickle=True)),
    "member-outside-of-the-folder": with_member("../evil.py", lambda: b"x"),
    "member-with-dots": with_member("archive/../../evil.py", lambda: b"x"),
    "member-absolute": with_member("/etc/passwd", lambda: b"x"),
    "compiled-code": with_member("archive/data/aotinductor/model/a.so", lambda: b"\x7fELF"),
    "weight-member-leaves-the-folder": edited(_WEIGHTS, lambda v: _weight(v).update(path_name="../../x")),
    "weight-shape-overflows": edited(
        _WEIGHTS, lambda v: _weight(v)["tensor_meta"].update(sizes=sizes(2**62, 2**62))
    ),
    "weight-shape-negative": edited(_WEIGHTS, lambda v: _weight(v)["tensor_meta"].update(sizes=sizes(-2, 3))),
    "weight-offset-negative": edited(
        _WEIGHTS, lambda v: _weight(v)["tensor_meta"].update(storage_offset={"as_int": -8})
    ),
    "weight-of-strides-zero-and-2-to-the-62-elements": edited(
        _WEIGHTS, lambda v: _weight(v)["tensor_meta"].update(sizes=sizes(2**31, 2**31), strides=sizes(0, 0))
    ),
    "weight-dtype-lies": edited(_WEIGHTS, lambda v: _weight(v)["tensor_meta"].update(dtype=8)),
    "weight-dtype-unknown": edited(_WEIGHTS, lambda v: _weight(v)["tensor_meta"].update(dtype=999)),
    "weight-without-meta": edited(_WEIGHTS, lambda v: _weight(v).pop("tensor_meta")),
    "weight-on-a-gpu": edited(_WEIGHTS, lambda v: _weight(v)["tensor_meta"]["device"].update(type="cuda")),
    "weights-are-a-list": edited(_WEIGHTS, lambda v: v.update(config=[1])),
    "weights-are-none": edited(_WEIGHTS, lambda v: v.clear()),
    "constants-are-none": edited(_CONSTANTS, lambda v: v.clear()),
    "node-calls-system": edited(_MODEL, lambda v: _node(v).update(target="os.system")),
    "node-calls-a-private-name": edited(_MODEL, lambda v: _node(v).update(target="torch.ops.aten.__class__")),
    "node-inputs-null": edited(_MODEL, lambda v: _node(v).update(inputs=None)),
    "node-inputs-none": edited(_MODEL, lambda v: _node(v).update(inputs=[])),
    "node-outputs-none": edited(_MODEL, lambda v: _node(v).update(outputs=[])),
    "nodes-none": edited(_MODEL, lambda v: v["graph_module"]["graph"].update(nodes=[])),
    "no-graph": edited(_MODEL, lambda v: v.pop("graph_module")),
    "no-inputs": edited(_MODEL, lambda v: v["graph_module"]["graph"].update(inputs=[])),
    "range-is-code": edited(
        _MODEL, lambda v: v.update(range_constraints={"__import__('os')": {"min_val": 0, "max_val": 1}})
    ),
    "range-backwards": edited(
        _MODEL, lambda v: [r.update(min_val=9, max_val=1) for r in v["range_constraints"].values()]
    ),
    "schema-of-tomorrow": edited(_MODEL, lambda v: v["schema_version"].update(major=99)),
    "schema-is-a-list": edited(_MODEL, lambda v: v.update(schema_version=[8, 1])),
    "float-of-400-digits": edited(
        _MODEL, lambda v: _node(v)["inputs"].append({"name": "x", "arg": {"as_float": 10**400}, "kind": 1})
    ),
}

# ---- data


def npy_head(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def npz_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.array([Payload()], dtype=object))
    return buffer.getvalue()


def table(make: Callable[[], Any], **options: Any) -> Callable[[], bytes]:
    """A Parquet file of what `make` gives."""

    def written() -> bytes:
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        pq.write_table(make(), buffer, **options)
        return buffer.getvalue()

    return written


def _pyarrow() -> Any:
    import pyarrow as pa

    return pa


def _column(values: Any, kind: Any = None) -> Any:
    import pyarrow as pa

    return pa.table({"inputs": pa.array(values, kind)})


def repeated_parquet(groups: int, rows: int) -> bytes:
    """Gigabytes of one number: a dictionary of one entry and a run of it, group after group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    part = pa.table({"inputs": np.zeros(rows)})
    with pq.ParquetWriter(buffer, part.schema, compression="zstd") as writer:
        for _ in range(groups):
            writer.write_table(part, row_group_size=rows)
    return buffer.getvalue()


def pandas_metadata() -> bytes:
    import pyarrow as pa

    mark = pickle.dumps(Payload()).decode("latin1")
    fields = {"pandas": json.dumps({"columns": [{"name": "inputs", "pandas_type": mark}]})}
    return table(lambda: pa.table({"inputs": [1.0]}).replace_schema_metadata(fields))()


def extension_type() -> bytes:
    import pyarrow as pa

    field = pa.field(
        "inputs",
        pa.int64(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Payload()),
        },
    )
    return table(lambda: pa.Table.from_arrays([pa.array([1])], schema=pa.schema([field])))()


DATA: dict[str, Callable[[], bytes]] = {
    "npz/bomb-of-a-gigabyte": lambda: zeros_zipped("inputs.npy", npy_head((1 << 30,)), 1 << 30),
    "npz/bomb-of-many-members": lambda: zipped(
        {f"{i}.npy": bytes(1 << 22) for i in range(128)}, deflate=True
    ),
    "npz/pickled-objects": npz_objects,
    "parquet/accepted-plain": table(lambda: _column([[1.0, 2.0], [3.0, 4.0]])),
    "parquet/accepted-pandas-metadata-with-a-pickle": pandas_metadata,
    "parquet/accepted-pickled-extension-type": extension_type,
    "parquet/bomb-of-one-number": lambda: repeated_parquet(150, 1 << 20),
    "parquet/bomb-of-one-text": table(lambda: _column(["x" * (1 << 20)] * 64)),
    "parquet/text": table(lambda: _column(["a"])),
    "parquet/empty-cells": table(lambda: _column([1, None])),
    "parquet/ragged": table(lambda: _column([[1], [1, 2]])),
    "parquet/struct": table(lambda: _column([{"a": 1}])),
    "parquet/decimals": table(lambda: _column([1], _pyarrow().decimal128(5, 2))),
    "parquet/cut-short": lambda: table(lambda: _column([1.0] * 100))()[:-40],
    "parquet/no-columns": table(lambda: _pyarrow().table({})),
    "parquet/column-twice": table(
        lambda: _pyarrow().Table.from_arrays([_pyarrow().array([1])] * 2, names=["inputs", "inputs"])
    ),
    "parquet/deep-lists": table(lambda: _column([_nested(90)])),
    "parquet/newline-in-a-name": table(lambda: _pyarrow().table({"a\nb": ["x"]})),
    "state_dict/bomb-of-a-gigabyte": lambda: zeros_zipped("archive/data/0", b"", 1 << 30),
    "state_dict/bomb-in-the-pickle": lambda: zeros_zipped("archive/data.pkl", b"\x80\x02", 1 << 30),
    "state_dict/pickle-that-leaves-a-mark": torch_pickle,
}


def _nested(depth: int) -> Any:
    return [_nested(depth - 1)] if depth else 1.0


MADE: dict[str, Callable[[], bytes]] = {f"program/{name}": make for name, make in PROGRAMS.items()} | DATA
