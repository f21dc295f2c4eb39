"""What a field of a graph is unless a file says otherwise, and how values of a graph are named and counted.

These are part of the format of coded models: a change of any makes another format.
"""

import json
import re

from .program_schema import Json

PROGRAM = {
    "opset_version": {"aten": 10},
    "schema_version": {"major": 8, "minor": 20},
    "torch_version": "2.13.0+cpu",
    "verifiers": ["TRAINING"],
}
META = {
    "device": {"index": None, "type": "cpu"},
    "dtype": 7,
    "layout": 7,
    "requires_grad": False,
    "storage_offset": {"as_int": 0},
}
NODE: Json = {"is_hop_single_tensor_return": None, "metadata": {}}
LISTS = ("inputs", "outputs", "nodes", "tensor_values")
GRAPH = {
    "custom_obj_values": {},
    "is_single_tensor_return": False,
    "sym_bool_values": {},
    "sym_float_values": {},
    "sym_int_values": {},
}
_LEAF: Json = {"type": None, "context": None, "children_spec": []}
SYMBOL = re.compile(r"Symbol\('(\w+)', positive=True, integer=True\)")


class NoShortForm(Exception):
    """The program has a field that the short form does not know; it is written as it is."""


class Values:
    """Values in the order in which they are made, the stored ones that wait for their first use, and all shapes."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places: dict[str, int] = {}
        self.waiting: list[str] = []
        self.metas: dict[str, Json] = {}
        self._bases: dict[str, int] = {}

    def add(self, name: str, meta: Json, *, stored: bool = False) -> None:
        self.places[name] = len(self.names)
        self.names.append(name)
        self.metas[name] = meta
        if stored:
            self.waiting.append(name)

    def reference(self, name: str) -> int:
        if self.waiting and self.waiting[0] == name:
            self.waiting.pop(0)
            return 0
        return len(self.names) - self.places[name]

    def named(self, reference: int) -> str:
        if reference == 0:
            return self.waiting.pop(0)
        if not 0 < reference <= len(self.names):
            raise NoShortForm
        return self.names[-reference]

    def next_name(self, target: str) -> str:
        """The name that torch gives to a node: the operator's, numbered from the second one on."""
        base = target.split(".")[3] if target.count(".") > 2 else target.rsplit(".", maxsplit=1)[-1]
        count = self._bases.get(base, 0)
        self._bases[base] = count + 1
        return f"{base}_{count}" if count else base


STORED = {
    "parameter": ("parameter_name", "p_"),
    "buffer": ("buffer_name", "b_"),
    "tensor_constant": ("tensor_constant_name", "c_"),
}


def placeholder(prefix: str, name: str) -> str:
    """The name that torch gives to the graph input of a stored tensor."""
    return prefix + re.sub(r"[^A-Za-z0-9]", "_", name)


def natural(number: Json) -> int:
    """A whole number that is not negative; NoShortForm for anything else."""
    if type(number) is not int or number < 0:
        raise NoShortForm
    return number


def without(fields: Json, expected: Json, known: tuple[str, ...]) -> Json:
    """The fields that are not `known` and not as expected."""
    if missing := expected.keys() - fields.keys():
        raise NoShortForm(missing)
    return {
        name: value
        for name, value in fields.items()
        if name not in known and (name not in expected or value != expected[name])
    }


def made_by(output: Json) -> list[str]:
    """The tensors of one output of a node."""
    ((kind, value),) = output.items()
    if kind == "as_tensor":
        return [value["name"]]
    if kind == "as_tensors":
        return [item["name"] for item in value]
    return []


def output_of(spec: Json) -> Json:
    """How the graph lists what a specification is about."""
    ((_, fields),) = spec.items()
    argument = fields["arg"]
    return {"as_tensor": argument} if "name" in argument else argument


def last_output(values: Values) -> Json:
    """A program that gives the value it made last."""
    return [{"user_output": {"arg": {"as_tensor": {"name": values.names[-1]}}}}]


def plain_call(specs: Json) -> Json:
    """A call with tensors one after the other, which gives one tensor."""
    names = [spec["user_input"]["arg"]["as_tensor"]["name"] for spec in specs if "user_input" in spec]
    nothing = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    given = {"type": "builtins.tuple", "context": "null", "children_spec": [_LEAF] * len(names)}
    both = {"type": "builtins.tuple", "context": "null", "children_spec": [given, nothing]}
    signature = {
        "forward_arg_names": names,
        "in_spec": json.dumps([1, both]),
        "inputs": [],
        "out_spec": json.dumps([1, _LEAF]),
        "outputs": [],
    }
    return [{"fqn": "", "signature": signature}]


def strides(sizes: Json) -> Json:
    """Strides of a contiguous tensor, as far as sizes behind a dimension are plain numbers."""
    strides: list[Json] = []
    step = 1
    for size in reversed(sizes):
        strides.append({"as_int": step})
        if "as_int" not in size:
            step = step if len(strides) == len(sizes) else -1
        else:
            step *= max(1, size["as_int"])
    return strides[::-1]
