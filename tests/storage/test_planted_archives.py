"""Archives with a payload in every place from which loading or running a program could execute it."""

import copy
import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fleetpress_test_archive_members import (  # by this name conftest.py loads archive_members.py
    CONSTANTS_CONFIG,
    MODEL,
    PLAIN,
    WEIGHTS_CONFIG,
    Members,
    X,
    edit,
    packed,
    unpacked,
)

from fleetpress.storage.errors import UnsafeModelFile
from fleetpress.storage.programs import load_program


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
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)
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
