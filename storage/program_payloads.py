"""The members of a program's archive apart: its graph, what its configs say of stored tensors, and their bytes.

Configs that follow from the graph (every stored tensor contiguous, in a member of its own, in the graph's order) need
not be written: `placement` is None for them.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .archive import CONSTANTS, CONSTANTS_CONFIG, WEIGHTS, WEIGHTS_CONFIG
from .array_coding import Array, Layout
from .errors import InvalidModelFile
from .payloads import ITEM_BYTES, read_payloads
from .program_schema import SCHEMA_MAJOR, Json, clean_program

_FLOATS = {6: "<f2", 7: "<f4", 8: "<f8", 13: "<u2"}  # torch's serialized scalar types; NumPy has no bfloat16
_PREFIXES = {WEIGHTS: "weight_", CONSTANTS: "tensor_"}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One member with raw values: the state names that read it, the shape of the first, and how the values lie."""

    member: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    item_bytes: int


@dataclass(frozen=True, kw_only=True)
class Members:
    """A program's graph, configs and raw members; `payloads` lists the members in their order."""

    graph: Json
    weight_config: Json
    constant_config: Json
    payloads: tuple[StoredTensor, ...]
    data: dict[str, Any] = field(default_factory=dict)

    def array(self, payload: StoredTensor) -> Array:
        """The values of a member."""
        return np.frombuffer(self.data[payload.member], payload.layout.dtype).reshape(payload.layout.shape)

    def give(self, payload: StoredTensor, array: Array) -> None:
        """Set the values of a member."""
        self.data[payload.member] = array

    def placement(self) -> Json:
        """Configs and sizes of members as JSON, None if they follow from the graph."""
        derived = _derived(self.graph)
        if derived == (self.weight_config, self.constant_config):
            return None
        sizes = {payload.member: payload.layout.size_bytes for payload in self.payloads}
        return [self.weight_config["config"], self.constant_config["config"], sizes]


def members_of(graph: Json, weight_config: Json, constant_config: Json, data: Mapping[str, bytes]) -> Members:
    """The members of a program that was saved; `data` holds its raw members by name."""
    sizes = {name: len(value) for name, value in data.items()}
    return _members(graph, weight_config, constant_config, sizes, dict(data))


def members_with(graph: Json, placement: Json) -> Members:
    """The members of a program from a file, without values. Every field of the graph and of the configs is checked.

    Raises InvalidModelFile, UnsafeModelFile, and ValueError or LookupError for what is not even of their form.
    """
    graph = clean_program(json.dumps(graph).encode(), "the graph")
    if graph.get("schema_version", {}).get("major") != SCHEMA_MAJOR:
        raise InvalidModelFile(f"the graph has another schema than {SCHEMA_MAJOR}; publish the model again")
    if placement is None:
        weight_config, constant_config = _derived(graph)
        sizes = {**_sizes(weight_config, WEIGHTS), **_sizes(constant_config, CONSTANTS)}
    else:
        weights, constants, sizes = placement
        weight_config, constant_config = {"config": weights}, {"config": constants}
    return _members(graph, weight_config, constant_config, sizes, {})


def _members(
    graph: Json, weight_config: Json, constant_config: Json, sizes: Mapping[str, int], data: dict[str, Any]
) -> Members:
    weight_config, weights = read_payloads(json.dumps(weight_config).encode(), WEIGHTS_CONFIG, sizes)
    constant_config, constants = read_payloads(json.dumps(constant_config).encode(), CONSTANTS_CONFIG, sizes)
    config = {**weight_config["config"], **constant_config["config"]}
    names: dict[str, list[str]] = {}
    for payload in (*weights, *constants):
        names.setdefault(payload.member, []).append(payload.name)
    stored = {payload.member: payload for payload in (*weights, *constants)}
    return Members(
        graph=graph,
        weight_config=weight_config,
        constant_config=constant_config,
        payloads=tuple(
            StoredTensor(
                member=member,
                names=tuple(names[member]),
                shape=_plain(config[payload.name]["tensor_meta"]["sizes"]),
                item_bytes=payload.item_bytes,
                layout=_layout(config[payload.name]["tensor_meta"], payload.item_bytes, payload.size_bytes),
            )
            for member, payload in stored.items()
        ),
        data=data,
    )


def _layout(meta: Json, item_bytes: int, size_bytes: int) -> Layout:
    """The member in the tensor's shape where it is just that tensor, else as a row of numbers."""
    shape = _plain(meta["sizes"])
    steps = zip(shape, _contiguous(shape), _plain(meta["strides"]), strict=True)
    in_order = all(step == own for size, step, own in steps if size > 1)
    if math.prod(shape) * item_bytes != size_bytes or not in_order:
        shape = (size_bytes // item_bytes,)
    if item_bytes == 16:
        shape, item_bytes = (*shape, 2), 8  # a complex number of two doubles
    dtype = _FLOATS.get(meta["dtype"])
    return Layout(shape=shape, dtype=dtype or f"<u{item_bytes}", is_float=dtype is not None)


def _derived(graph: Json) -> tuple[Json, Json]:
    """The configs of a program that stores every tensor of its graph's inputs by itself, contiguous."""
    specs = graph["graph_module"]["signature"]["input_specs"]
    metas = graph["graph_module"]["graph"]["tensor_values"]
    weights: dict[str, Json] = {}
    constants: dict[str, Json] = {}
    for spec in specs:
        ((kind, fields),) = spec.items()
        if kind == "parameter":
            _place(weights, fields["parameter_name"], metas[fields["arg"]["name"]], WEIGHTS, is_param=True)
        elif kind == "buffer":
            into, folder = (weights, WEIGHTS) if fields["persistent"] else (constants, CONSTANTS)
            _place(into, fields["buffer_name"], metas[fields["arg"]["name"]], folder, is_param=False)
        elif kind == "tensor_constant":
            name = fields["tensor_constant_name"]
            _place(constants, name, metas[fields["arg"]["name"]], CONSTANTS, is_param=False)
    return {"config": weights}, {"config": constants}


def _place(config: dict[str, Json], name: str, meta: Json, folder: str, *, is_param: bool) -> None:
    shape = [size["as_int"] for size in meta["sizes"]]
    config[name] = {
        "path_name": f"{_PREFIXES[folder]}{len(config)}",
        "is_param": is_param,
        "use_pickle": False,
        "tensor_meta": {
            **meta,
            "strides": [{"as_int": step} for step in _contiguous(shape)],
            "storage_offset": {"as_int": 0},
        },
    }


def _sizes(config: Json, folder: str) -> dict[str, int]:
    return {
        f"{folder}{entry['path_name']}": math.prod(_plain(entry["tensor_meta"]["sizes"]))
        * ITEM_BYTES[entry["tensor_meta"]["dtype"]]
        for entry in config["config"].values()
    }


def _plain(sizes: Json) -> tuple[int, ...]:
    return tuple(size["as_int"] for size in sizes)


def _contiguous(shape: Iterable[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= max(1, size)
    return tuple(strides[::-1])
