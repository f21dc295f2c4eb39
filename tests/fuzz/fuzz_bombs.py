"""Cases that cost their reader time or memory out of all proportion, and lies that only a second look finds."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

from fuzz_makers import MARK, edited, members, npy_head, sizes, unzipped, zeros_zipped, zipped

_MODEL = "archive/models/model.json"
_WEIGHTS = "archive/data/weights/model_weights_config.json"
_CONSTANTS = "archive/data/constants/model_constants_config.json"
_STATED_BYTES = 24  # where an entry of a table of contents states the size of its member


def restated(data: bytes, size: int, content: bytes) -> bytes:
    """A ZIP of one member that states another size than it unpacks to, with the checksum of `content`."""
    at = data.index(b"PK\1\2")
    crc = struct.pack("<L", zlib.crc32(content))
    data = data[: at + 16] + crc + data[at + 20 :]
    return data[: at + _STATED_BYTES] + struct.pack("<L", size) + data[at + _STATED_BYTES + 4 :]


def header(text: str, data: bytes = b"") -> bytes:
    """A `.safetensors` file with this header."""
    return struct.pack("<Q", len(text)) + text.encode() + data


# ---- pickles, as opcodes: what torch's restricted unpickler goes along with


def pickled(opcodes: bytes) -> bytes:
    return zipped({"archive/data.pkl": b"\x80\x02" + opcodes + b".", "archive/version": b"3\n"})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


def saved(value: Callable[[Any], Any], **options: Any) -> bytes:
    """What torch.save makes of `value(torch)`."""
    import torch

    buffer = io.BytesIO()
    torch.save(value(torch), buffer, **options)
    return buffer.getvalue()


def storage_larger_than_its_record() -> bytes:
    """Older torch reads beyond the end of the record."""
    found = unzipped(saved(lambda torch: {"w": torch.arange(4.0)}))
    changed = {name: data.replace(b"K\x04tq\x07Q", b"K\xfftq\x07Q") for name, data in found.items()}
    assert changed != found
    return zipped(changed)


def numbers_claimed_in_the_old_format() -> bytes:
    data = saved(lambda torch: {"w": torch.arange(4.0)}, _use_new_zipfile_serialization=False)
    claimed = b"\x8a\x06" + struct.pack("<Q", 1 << 44)[:6]
    return data.replace(b"K\x04Nt", claimed + b"Nt")


def one_number_repeated(**options: Any) -> bytes:
    return saved(lambda torch: {"w": torch.zeros(1).expand(1 << 40)}, **options)


STATE_DICTS: dict[str, Callable[[], bytes]] = {
    "bytearray-of-a-gigabyte": lambda: pickled(b"cbuiltins\nbytearray\nJ\0\0\0\x40\x85R"),
    "bytearray-of-a-gigabyte-in-the-old-format": lambda: (
        b"\x80\x02c__builtin__\nbytearray\nJ\0\0\0\x40\x85R."
    ),
    "punycode-of-a-long-text": lambda: pickled(
        b"c_codecs\nencode\n" + text("é" * 9999) + text("punycode") + b"\x86R"
    ),
    "tensor-class-of-gigabytes": lambda: pickled(
        b"}" + text("w") + b"ctorch\nFloatTensor\n\x8a\5\0\0\0\0\2\x85Rs"
    ),
    "tables-in-tables": lambda: pickled((b"}" + text("model")) * 3000 + b"}" + b"s" * 3000),
    "table-in-itself": lambda: pickled(b"}q\0" + text("model") + b"h\0s"),
    "table-with-hidden-methods": lambda: pickled(
        b"ccollections\nOrderedDict\n)R}("
        + text("get")
        + b"K\1"
        + text("items")
        + b"K\2"
        + text("keys")
        + b"K\3ub"
    ),
    "key-of-lists-in-a-tuple": lambda: pickled(b"}" + b"]" * 500 + b"a" * 499 + b"\x85K\1s"),
    "one-number-repeated": one_number_repeated,
    "one-number-repeated-in-the-old-format": partial(
        one_number_repeated, _use_new_zipfile_serialization=False
    ),
    "sparse": lambda: saved(lambda torch: {"w": torch.eye(3).to_sparse()}),
    "without-data": lambda: saved(lambda torch: {"w": torch.empty(3, device="meta")}),
    "storage-larger-than-its-record": storage_larger_than_its_record,
    "numbers-claimed-in-the-old-format": numbers_claimed_in_the_old_format,
    "bytes-behind-the-end": lambda: saved(lambda torch: {"w": torch.ones(2)}) + b"PK\5\6",
    "global-in-the-name-of-a-key-accepted": lambda: saved(lambda torch: {"cbuiltins.eval": torch.ones(2)}),
}

# ---- programs


def _sizes(value: Any) -> Any:
    return value["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]


def size(expression: str) -> Callable[[], bytes]:
    """The program with another symbolic size of its input."""
    return edited(
        _MODEL,
        lambda value: _sizes(value).__setitem__(0, {"as_expr": {"expr_str": expression, "hint": None}}),
    )


def output_tree(node: object) -> Callable[[], bytes]:
    def change(value: Any) -> None:
        text = node if isinstance(node, str) else json.dumps(node)
        value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = f"[1, {text}]"

    return edited(_MODEL, change)


def nested_graph(depth: int) -> Callable[[], bytes]:
    """A graph as an argument of a node of a graph, and so on."""
    graph: Any = {}
    for _ in range(depth):
        argument = {"name": "", "arg": {"as_graph": {"name": "g", "graph": graph}}, "kind": 1}
        graph = {"nodes": [{"target": "torch.ops.higher_order.cond", "inputs": [argument], "outputs": []}]}
    return edited(_MODEL, lambda value: value["graph_module"].update(graph=graph))


def leaf(kind: object, context: object = None) -> dict[str, object]:
    return {"type": kind, "context": context, "children_spec": []}


def deep_tree(depth: int) -> str:
    """As text: json.dumps itself does not go so deep."""
    head, tail = '{"type":"builtins.list","context":"null","children_spec":[', "]}"
    return head * depth + json.dumps(leaf(None)) + tail * depth


def two_places_of_one_weight(value: Any) -> None:
    value["config"]["layer.bias"]["path_name"] = value["config"]["layer.weight"]["path_name"]
    value["config"]["layer.bias"]["tensor_meta"]["dtype"] = 5


PROGRAMS: dict[str, Callable[[], bytes]] = {
    "size-of-divisions-that-take-minutes": size("FloorDiv(" * 150 + "s0" + "+1,2)" * 150),
    "size-of-remainders-that-take-minutes": size("Mod(" * 150 + "s0" + "*3+s1,s2)" * 150),
    "size-of-a-maximum-that-takes-minutes": size("Max(" + ",".join(f"s{i}" for i in range(600)) + ")"),
    "size-of-towers": size("9**9**9**9"),
    "size-of-brackets": size("(" * 1900 + "s0" + ")" * 1900),
    "size-of-signs": size("-" * 3900 + "1"),
    "size-opens-a-file": size(f"open('{MARK}', 'w')"),
    "size-calls-a-method": size("s0.__class__"),
    "size-not-ascii": size("\uff530"),
    "tree-kind-is-a-list": output_tree(leaf([])),
    "tree-kind-is-an-object": output_tree(leaf({})),
    "tree-of-an-enum": output_tree(
        leaf("builtins.dict", json.dumps({"__enum__": True, "fqn": "os:path", "name": "x"}))
    ),
    "tree-of-300-lists-accepted": output_tree(deep_tree(300)),
    "tree-of-3000-lists": output_tree(deep_tree(3000)),
    "tree-of-a-number": output_tree(7),
    "graphs-in-graphs": nested_graph(60),
    "weight-of-5000-ones": edited(
        _WEIGHTS,
        lambda value: value["config"]["layer.weight"]["tensor_meta"].update(
            sizes=[{"as_int": 2**62}] * 5000, strides=[{"as_int": 0}] * 5000
        ),
    ),
    "weight-of-65-dimensions": edited(
        _WEIGHTS,
        lambda value: value["config"]["layer.weight"]["tensor_meta"].update(
            sizes=sizes(*[1] * 63, 2, 3), strides=sizes(*[0] * 63, 3, 1)
        ),
    ),
    "weight-of-two-dtypes": edited(_WEIGHTS, two_places_of_one_weight),
    "constant-config-key-twice": lambda: _with_text(_CONSTANTS, '{"config": {}, "config": {}}'),
    "graph-of-millions-of-lists": lambda: _with_text(_MODEL, "[" + "[]," * 9_000_000 + "[]]"),
    "graph-not-utf8-but-utf16": lambda: _with_text(_MODEL, "{}", "utf-16"),
}


def _with_text(name: str, text: str, encoding: str = "utf-8") -> bytes:
    return zipped({**members(), name: text.encode(encoding)}, deflate=True)


# ---- headers and data

_ZEROS = 256 << 20

OTHERS: dict[str, Callable[[], bytes]] = {
    "npz/member-of-more-than-it-states": lambda: restated(
        zeros_zipped("inputs.npy", npy_head((64,)), _ZEROS), 1000, npy_head((64,)) + bytes(872)
    ),
    "program/member-of-more-than-it-states": lambda: restated(
        zipped({_MODEL: bytes(_ZEROS)} | {k: v for k, v in members().items() if k != _MODEL}, deflate=True),
        1000,
        bytes(1000),
    ),
    "safetensors_header/200000-names-and-the-last-one-twice": lambda: header(
        "{" + ",".join([f'"{i}":0' for i in range(200_000)] + ['"199999":0']) + "}"
    ),
    "safetensors_header/millions-of-lists": lambda: header("[" + "[]," * 3_000_000 + "[]]"),
    "safetensors_header/shape-of-100000-huge-sizes": lambda: header(
        '{"w":{"dtype":"F32","shape":['
        + ",".join(["4611686018427387904"] * 100_000)
        + '],"data_offsets":[0,0]}}'
    ),
    "safetensors_data/shape-of-65-ones": lambda: header(
        '{"w":{"dtype":"U8","shape":[' + ",".join(["1"] * 65) + '],"data_offsets":[0,1]}}', b"\0"
    ),
    "safetensors_index/millions-of-lists": lambda: b'{"weight_map": [' + b"[]," * 3_000_000 + b"[]]}",
    "checkpoint_config/millions-of-lists": lambda: b'{"a": [' + b"[]," * 3_000_000 + b"[]]}",
    "manifest/millions-of-lists": lambda: b'{"files": [' + b"[]," * 3_000_000 + b"[]]}",
    "metrics/millions-of-lists": lambda: b'{"layers": [' + b"[]," * 3_000_000 + b"[]]}",
    "pointer/millions-of-lists": lambda: b'{"digest": [' + b"[]," * 3_000_000 + b"[]]}",
    "record/millions-of-lists": lambda: b'{"result": [' + b"[]," * 3_000_000 + b"[]]}",
    "spec/longer-than-any-fleet": lambda: b"#" * (17 << 20),
    "spec/20000-unknown-keys": lambda: b"".join(b"k%d: 1\n" % i for i in range(20_000)),
}

BOMBS: dict[str, Callable[[], bytes]] = (
    {f"state_dict/{name}": make for name, make in STATE_DICTS.items()}
    | {f"program/{name}": make for name, make in PROGRAMS.items()}
    | OTHERS
)
