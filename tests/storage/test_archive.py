"""Archives from strangers: a payload in every place that could run it, damaged ZIPs, and fuzzing."""

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.storage.archive import clean_archive, write_archive
from fleetpress.storage.errors import InvalidModelFile, UnsafeModelFile
from fleetpress.storage.expressions import is_safe_expression
from fleetpress.storage.operators import is_safe_target
from fleetpress.storage.programs import load_program

Members = dict[str, bytes]


class Net(torch.nn.Module):
    """One layer, a constant and a dynamic batch: every kind of member and a symbolic size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.tensor([1.0, 2.0])


def saved() -> bytes:
    torch.manual_seed(0)
    example = (torch.ones(4, 3),)
    program = torch.export.export(Net().eval(), example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


PLAIN = saved()
X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.5, 0.25, 0.125]])


def unpacked(data: bytes = PLAIN) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}


def packed(members: Members) -> bytes:
    return write_archive({f"archive/{name}": data for name, data in members.items()}, compress=False)


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.mark, "w")


def torch_pickle(mark: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    return buffer.getvalue()


MODEL = "models/model.json"
WEIGHTS_CONFIG = "data/weights/model_weights_config.json"
CONSTANTS_CONFIG = "data/constants/model_constants_config.json"


def edit(members: Members, name: str, change: Callable[[Any], None]) -> None:
    value = json.loads(members[name])
    change(value)
    members[name] = json.dumps(value).encode()


def sample_inputs(members: Members, mark: str) -> None:
    members["data/sample_inputs/model.pt"] = torch_pickle(mark)


def pickled_weight(members: Members, mark: str) -> None:
    members["data/weights/weight_0"] = torch_pickle(mark)
    edit(members, WEIGHTS_CONFIG, lambda v: v["config"]["layer.weight"].update(use_pickle=True))


def pickled_constant(members: Members, mark: str) -> None:
    members["data/constants/tensor_0"] = torch_pickle(mark)
    edit(members, CONSTANTS_CONFIG, lambda v: v["config"]["lifted_tensor_0"].update(use_pickle=True))


def opaque_object(members: Members, mark: str) -> None:
    members["data/constants/opaque_obj_0"] = pickle.dumps(Payload(mark))
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit(members, CONSTANTS_CONFIG, lambda v: v["config"].update(evil=entry))


def custom_object(members: Members, mark: str) -> None:
    members["data/constants/custom_obj_0"] = pickle.dumps(Payload(mark))
    entry = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit(members, CONSTANTS_CONFIG, lambda v: v["config"].update(evil=entry))


def legacy_weights(members: Members, mark: str) -> None:
    members["data/weights/model.pt"] = torch_pickle(mark)


def legacy_constants(members: Members, mark: str) -> None:
    members["data/constants/model.pt"] = torch_pickle(mark)


def graph(change: Callable[[Any, str], None]) -> Callable[[Members, str], None]:
    """A plant in the graph module's JSON."""

    def plant(members: Members, mark: str) -> None:
        edit(members, MODEL, lambda v: change(v["graph_module"], mark))

    return plant


def size_expression(module: Any, mark: str) -> None:
    size = module["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]
    size["expr_str"] = f"open('{mark}','w') and {size['expr_str']}"


def tree_enum(field: str) -> Callable[[Any, str], None]:
    def change(module: Any, _mark: str) -> None:
        context = json.dumps({"__enum__": True, "fqn": "planted_module:Enum", "name": "a"})
        tree = [1, {"type": "builtins.dict", "context": context, "children_spec": []}]
        module["module_call_graph"][0]["signature"][field] = json.dumps(tree)

    return change


def default_dict(module: Any, _mark: str) -> None:
    context = {"default_factory_module": "planted_module", "default_factory_name": "x", "dict_context": []}
    tree = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
    module["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(tree)


def renamed(old: str, code: str) -> Callable[[Members, str], None]:
    """`old` replaced everywhere by a name that is code once it stands in the generated source."""

    def plant(members: Members, mark: str) -> None:
        new = json.dumps(code.format(mark=mark))
        members[MODEL] = members[MODEL].replace(f'"{old}"'.encode(), new.encode())
        members[WEIGHTS_CONFIG] = members[WEIGHTS_CONFIG].replace(f'"{old}"'.encode(), new.encode())

    return plant


def argument_names(module: Any, mark: str) -> None:
    module["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x=open('{mark}','w')"]


def keyword(module: Any, mark: str) -> None:
    node = module["graph"]["nodes"][0]
    node["target"] = "torch.ops.higher_order.wrap"
    node["inputs"][0].update(name=f"a=open('{mark}','w'), b", kind=2)


def target(name: str) -> Callable[[Any, str], None]:
    def change(module: Any, mark: str) -> None:
        node = module["graph"]["nodes"][0]
        node["target"] = name
        node["inputs"] = [
            {"name": "", "arg": {"as_string": mark}, "kind": 1},
            {"name": "", "arg": {"as_string": "w"}, "kind": 1},
        ]

    return change


def operator_argument(module: Any, _mark: str) -> None:
    module["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "torch.load"}


def custom_argument(module: Any, _mark: str) -> None:
    module["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_custom_obj": {"name": "evil", "class_fqn": "evil"}}


def guards(members: Members, mark: str) -> None:
    edit(members, MODEL, lambda v: v.update(guards_code=[f"open('{mark}','w')"]))


def metadata(module: Any, _mark: str) -> None:
    module["graph"]["nodes"][0]["metadata"] = {
        "source_fn_stack": "a,torch.hub.load",
        "from_node": "[{}]",
        "custom": "{}",
    }


def compiled(members: Members, _mark: str) -> None:
    members["data/aotinductor/model/model.so"] = b"\x7fELF"


def second_model(members: Members, _mark: str) -> None:
    members["models/second.json"] = members[MODEL]


# Places that run the payload when plain torch loads and calls the program: what makes the refusal worth testing.
LIVE: dict[str, Callable[[Members, str], None]] = {
    "sample inputs": sample_inputs,
    "pickled weight": pickled_weight,
    "pickled constant": pickled_constant,
    "opaque object": opaque_object,
    "legacy weights": legacy_weights,
    "legacy constants": legacy_constants,
    "size expression": graph(size_expression),
    "enum in input tree": graph(tree_enum("in_spec")),
    "enum in output tree": graph(tree_enum("out_spec")),
    "default dict": graph(default_dict),
    "placeholder name": renamed("x", "x=open('{mark}','w')"),
    "guard code": guards,
}
OTHERS: dict[str, Callable[[Members, str], None]] = {
    "custom object": custom_object,
    "node name": renamed("linear", "a\nopen('{mark}','w')\ndef b():\n    c"),
    "argument names": graph(argument_names),
    "keyword": graph(keyword),
    "weight name": renamed("layer.weight", 'layer.a"), open("{mark}", "w'),
    "operator argument": graph(operator_argument),
    "custom object argument": graph(custom_argument),
    "metadata": graph(metadata),
    "compiled code": compiled,
    "second model": second_model,
    **{
        f"target {name}": graph(target(name))
        for name in (
            "torch.load",
            "torch.hub.load",
            "torch.ops.load_library",
            "torch.ops.aten.from_file.default",
            "torch.ops.aten.save.default",
            "torch.ops.aten.linear.__class__",
            "torch.ops.aten.linear.overloads",
            "torch.ops.higher_order.call_torchbind",
            "torch.serialization.open",
            "_operator.methodcaller",
            "_operator.attrgetter",
            "math.__loader__.load_module",
            "#evil:op",
            "torch.ops.aten.linear.default\n",
        )
    },
}
DROPPED = ("sample inputs", "guard code", "metadata")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that every payload makes; a module that makes it when imported lies on the path."""
    path = tmp_path / "ran"
    (tmp_path / "planted_module.py").write_text(f"open({str(path)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "planted_module", raising=False)
    return path


def planted(name: str, mark: Path) -> bytes:
    members = copy.deepcopy(unpacked())
    before = dict(members)
    {**LIVE, **OTHERS}[name](members, str(mark))
    assert members != before
    return packed(members)


@pytest.mark.parametrize("name", [*LIVE, *OTHERS])
def test_nothing_planted_runs(name: str, mark: Path) -> None:
    data = planted(name, mark)
    if name in DROPPED:
        assert torch.equal(load_program(data).module()(X), load_program(PLAIN).module()(X))
    else:
        with pytest.raises(UnsafeModelFile):
            load_program(data)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in LIVE if name != "guard code"])
def test_the_plants_are_live(name: str, mark: Path) -> None:
    """Plain torch runs each of them, so the test above would see it."""
    with pytest.raises(BaseException):  # noqa: B017, PT011, PT012 - whatever torch says afterwards
        torch.export.load(io.BytesIO(planted(name, mark))).module()(X)
        raise AssertionError
    assert mark.exists()


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


@pytest.mark.parametrize(
    "text",
    [
        "s77",
        "2*s77 + 1",
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))",
        "FloorDiv(s0, 2) % 3 // 4",
        "Pow(Symbol('s77', positive=True, integer=True), Integer(2))",
        "Eq(u0, 3) & ~Ne(s1, 2)",
        "Max(1, s0) <= 7",
        "Float('0.5', precision=53)",
        "Rational(1, 3)",
    ],
)
def test_sizes_that_torch_writes(text: str) -> None:
    assert is_safe_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "__import__('os')",
        "s0.__class__",
        "(lambda: 1)()",
        "[s0]",
        "s0 if s0 else s1",
        "exec",
        "Symbol('s0); open(1)')",
        "Symbol('s0', open('x'))",
        "Symbol('s0', integer=open('x'))",
        "Symbol(open('x'))",
        "9**9**9",
        "Pow(Integer(9), Integer(99999999))",
        "s0**99999999",
        "Float('1e999999999')",
        "Integer(open('x'))",
        "sympify('1')",
        "s0\nopen",
        "s0 #",
        "\uff530",
        "(" * 3000,
        "s0" + "+s0" * 3000,
        "",
    ],
)
def test_sizes_that_are_more_than_arithmetic(text: str) -> None:
    assert not is_safe_expression(text)


def test_operators_of_ordinary_models_are_known() -> None:
    assert is_safe_target("torch.ops.aten.__and__.Tensor")
    assert is_safe_target("torch.ops.aten._native_batch_norm_legit.no_stats")
    assert is_safe_target("torch.ops.higher_order.cond")
    assert is_safe_target("_operator.getitem")


def test_archives_are_a_function_of_their_members() -> None:
    members = {"a/b": bytes(1000), "a/c": b"xyz"}
    data = write_archive(members, compress=True)
    assert data == write_archive(dict(reversed(members.items())), compress=True)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert [i.compress_type for i in archive.infolist()] == [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED]
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {name: archive.read(name) for name in archive.namelist()} == members
