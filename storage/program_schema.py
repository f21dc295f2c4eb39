"""The JSON of an exported program's graph, checked field by field and rebuilt from nothing but known-good fields.

`torch.export.load` is not meant for files from strangers. Besides its pickles it evaluates size expressions
(`sympy.sympify`), imports modules named in tree specs (enum and default-dict contexts), resolves operator names by
`getattr`, and writes node, argument and weight names, and `guards_code`, into Python source that it executes. So every
field has a type here, every string a grammar, and what is not in the table (stack traces, source paths, guard code,
custom metadata) does not survive. The table follows torch/_export/serde/schema.py, schema version 8.
"""

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import InvalidModelFile, UnsafeModelFile
from .expressions import is_safe_expression
from .json_text import parse_json as parsed
from .operators import is_safe_target
from .tree_specs import clean_tree_spec

Json = Any  # a parsed JSON value; its type is what this file is there to find out

SCHEMA_MAJOR = 8
_MOST_JSON_SIGNS = 16_000_000  # a graph of ten thousand nodes has some two million


class Many(NamedTuple):
    """A list of one kind."""

    item: "Kind"


class Table(NamedTuple):
    """An object whose keys are data: `key` names the grammar of the keys."""

    key: str
    value: "Kind"


class Maybe(NamedTuple):
    """The kind, or null."""

    value: "Kind"


Kind = str | Many | Table | Maybe

# Objects with fixed fields. Fields that are not listed are dropped, which is what torch does with them as well.
STRUCTS: dict[str, dict[str, Kind]] = {
    "ExportedProgram": {
        "graph_module": "GraphModule",
        "opset_version": Table("name", "int"),
        "range_constraints": Table("expression", "RangeConstraint"),
        "schema_version": "SchemaVersion",
        "verifiers": Many("name"),
        "torch_version": "version",
    },
    "SchemaVersion": {"major": "int", "minor": "int"},
    "RangeConstraint": {"min_val": Maybe("int"), "max_val": Maybe("int")},
    "GraphModule": {
        "graph": "Graph",
        "signature": "GraphSignature",
        "module_call_graph": "ModuleCallGraph",
    },
    "Graph": {
        "inputs": Many("Argument"),
        "outputs": Many("Argument"),
        "nodes": Many("Node"),
        "tensor_values": Table("name", "ValueMeta"),
        "sym_int_values": Table("name", "SymInt"),
        "sym_bool_values": Table("name", "SymBool"),
        "is_single_tensor_return": "bool",
        "custom_obj_values": Table("name", "CustomObject"),
        "sym_float_values": Table("name", "SymFloat"),
    },
    "Node": {
        "target": "target",
        "inputs": Many("NamedArgument"),
        "outputs": Many("Argument"),
        "metadata": "dropped",
        "is_hop_single_tensor_return": Maybe("bool"),
        "name": Maybe("name"),
    },
    "NamedArgument": {"name": "name_or_empty", "arg": "Argument", "kind": Maybe("int")},
    "TensorMeta": {
        "dtype": "int",
        "sizes": Many("SymInt"),
        "requires_grad": "bool",
        "device": "Device",
        "strides": Many("SymInt"),
        "storage_offset": "SymInt",
        "layout": "strided",
    },
    "ValueMeta": {
        "dtype": "int",
        "sizes": Many("SymInt"),
        "requires_grad": "bool",
        "device": "Device",
        "strides": Many("SymInt"),
        "storage_offset": "no_offset",
        "layout": "strided",
    },
    "Device": {"type": "cpu", "index": Maybe("int")},
    "SymExpr": {"expr_str": "expression", "hint": Maybe("SymExprHint")},
    "TensorArgument": {"name": "name"},
    "TokenArgument": {"name": "name"},
    "GraphArgument": {"name": "name", "graph": "Graph"},
    "ComplexValue": {"real": "float", "imag": "float"},
    "GraphSignature": {"input_specs": Many("InputSpec"), "output_specs": Many("OutputSpec")},
    "UserInputSpec": {"arg": "Argument"},
    "InputToParameterSpec": {"arg": "TensorArgument", "parameter_name": "path"},
    "InputToBufferSpec": {"arg": "TensorArgument", "buffer_name": "path", "persistent": "bool"},
    "InputToTensorConstantSpec": {"arg": "TensorArgument", "tensor_constant_name": "path"},
    "InputToConstantInputSpec": {"name": "name", "value": "ConstantValue"},
    "InputTokenSpec": {"arg": "TokenArgument"},
    "UserOutputSpec": {"arg": "Argument"},
    "LossOutputSpec": {"arg": "TensorArgument"},
    "BufferMutationSpec": {"arg": "TensorArgument", "buffer_name": "path"},
    "ParameterMutationSpec": {"arg": "TensorArgument", "parameter_name": "path"},
    "GradientToParameterSpec": {"arg": "TensorArgument", "parameter_name": "path"},
    "GradientToUserInputSpec": {"arg": "TensorArgument", "user_input_name": "name"},
    "UserInputMutationSpec": {"arg": "TensorArgument", "user_input_name": "name"},
    "OutputTokenSpec": {"arg": "TokenArgument"},
    "ModuleCallEntry": {"fqn": "path_or_empty", "signature": Maybe("ModuleCallSignature")},
    "ModuleCallSignature": {
        "inputs": Many("Argument"),
        "outputs": Many("Argument"),
        "in_spec": "input_tree",
        "out_spec": "output_tree",
        "forward_arg_names": Maybe(Many("name")),
    },
    "PayloadMeta": {
        "path_name": "member",
        "is_param": "bool",
        "use_pickle": "not_pickled",
        "tensor_meta": "TensorMeta",
    },
    "PayloadConfig": {"config": Table("path", "PayloadMeta")},
}

# Objects with exactly one of these fields.
UNIONS: dict[str, dict[str, Kind]] = {
    "SymInt": {"as_expr": "SymExpr", "as_int": "int"},
    "SymFloat": {"as_expr": "SymExpr", "as_float": "float"},
    "SymBool": {"as_expr": "SymExpr", "as_bool": "bool"},
    "SymExprHint": {"as_int": "int", "as_bool": "bool", "as_float": "float"},
    "SymIntArgument": {"as_name": "name", "as_int": "int"},
    "SymFloatArgument": {"as_name": "name", "as_float": "float"},
    "SymBoolArgument": {"as_name": "name", "as_bool": "bool"},
    "OptionalTensorArgument": {"as_tensor": "TensorArgument", "as_none": "bool"},
    "ConstantValue": {
        "as_none": "bool",
        "as_int": "int",
        "as_float": "float",
        "as_string": "word",
        "as_bool": "bool",
    },
    "Argument": {
        "as_none": "bool",
        "as_tensor": "TensorArgument",
        "as_tensors": Many("TensorArgument"),
        "as_int": "int",
        "as_ints": Many("int"),
        "as_float": "float",
        "as_floats": Many("float"),
        "as_string": "text",
        "as_strings": Many("text"),
        "as_sym_int": "SymIntArgument",
        "as_sym_ints": Many("SymIntArgument"),
        "as_scalar_type": "int",
        "as_memory_format": "int",
        "as_layout": "int",
        "as_device": "Device",
        "as_bool": "bool",
        "as_bools": Many("bool"),
        "as_sym_bool": "SymBoolArgument",
        "as_sym_bools": Many("SymBoolArgument"),
        "as_graph": "GraphArgument",
        "as_optional_tensors": Many("OptionalTensorArgument"),
        "as_custom_obj": "CustomObject",
        "as_operator": "target",
        "as_sym_float": "SymFloatArgument",
        "as_sym_floats": Many("SymFloatArgument"),
        "as_optional_tensor": "OptionalTensorArgument",
        "as_complex": "ComplexValue",
        "as_nested_tensors": Many(Many("TensorArgument")),
        "as_int_lists": Many(Many("int")),
        "as_string_to_argument": Table("word", "Argument"),
        "as_float_lists": Many(Many("float")),
    },
    "InputSpec": {
        "user_input": "UserInputSpec",
        "parameter": "InputToParameterSpec",
        "buffer": "InputToBufferSpec",
        "tensor_constant": "InputToTensorConstantSpec",
        "custom_obj": "CustomObject",
        "token": "InputTokenSpec",
        "constant_input": "InputToConstantInputSpec",
    },
    "OutputSpec": {
        "user_output": "UserOutputSpec",
        "loss_output": "LossOutputSpec",
        "buffer_mutation": "BufferMutationSpec",
        "gradient_to_parameter": "GradientToParameterSpec",
        "gradient_to_user_input": "GradientToUserInputSpec",
        "user_input_mutation": "UserInputMutationSpec",
        "token": "OutputTokenSpec",
        "parameter_mutation": "ParameterMutationSpec",
    },
}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,1000}")
_PATH = re.compile(r"(?!__)[\w\-/:@ ]{1,500}(\.(?!__)[\w\-/:@ ]{1,500}){0,100}")
_WORD = re.compile(r"[A-Za-z0-9_.\-/: ]{0,200}")
_MEMBER = re.compile(r"(weight|tensor)_[0-9]{1,9}")
_VERSION = re.compile(r"[A-Za-z0-9_.+\-<=]{1,100}")
_INFINITE = ("Infinity", "-Infinity", "NaN")


def _matches(pattern: re.Pattern[str]) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_float(value: Json) -> bool:
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    return is_number or value in _INFINITE


SCALARS: dict[str, Callable[[Json], bool]] = {
    "int": lambda value: type(value) is int and -(2**63) <= value < 2**63,
    "bool": lambda value: type(value) is bool,
    "float": _is_float,
    "name": _matches(_NAME),
    "name_or_empty": lambda value: value == "" or _matches(_NAME)(value),
    "path": _matches(_PATH),
    "path_or_empty": lambda value: value == "" or _matches(_PATH)(value),
    "word": _matches(_WORD),
    "text": lambda value: isinstance(value, str) and len(value) <= 10_000 and value.isprintable(),
    "member": _matches(_MEMBER),
    "version": _matches(_VERSION),
    "strided": lambda value: type(value) is int and value == 7,
    "cpu": lambda value: value == "cpu",
    "not_pickled": lambda value: value is False,
    "target": lambda value: isinstance(value, str) and is_safe_target(value),
    "expression": lambda value: isinstance(value, str) and is_safe_expression(value),
}

_UNSAFE = {
    "target": "the operator {} is not on the list of known ones; export the model without custom operators",
    "expression": "the size expression {} is not plain arithmetic on symbols; export the model again",
    "not_pickled": "a pickled tensor (use_pickle is {}); export the model from plain tensors, no tensor subclasses",
    "CustomObject": "a custom object ({}), which would be unpickled; export the model without it",
    "name": "the name {} is not a plain identifier",
    "path": "the weight or module name {} has characters that do not belong in a name",
    "name_or_empty": "the argument name {} is not a plain identifier",
    "path_or_empty": "the module name {} has characters that do not belong in a name",
    "cpu": "the device {} instead of cpu; move the model to the CPU and export it again",
    "input_tree": "an input structure of types other than tuple, list and dict: {}",
    "output_tree": "an output structure of types other than tuple, list and dict: {}",
}
_NOT_DANGEROUS = ("cpu",)


class _Refused(Exception):
    """A value that is not what its field takes; `trail` grows from the value up to the root."""

    def __init__(self, kind: str, value: Json) -> None:
        super().__init__(kind)
        self.kind, self.value = kind, value
        self.trail: list[str] = []


def parse_json(data: bytes, where: str) -> Json:
    """The JSON value in `data`; InvalidModelFile names `where`."""
    try:
        return parsed(data, most_signs=_MOST_JSON_SIGNS)
    except ValueError as error:
        raise InvalidModelFile(f"{where} is not valid JSON ({error}); save the model again") from None


def clean_struct(kind: str, value: Json, where: str) -> dict[str, Json]:
    """`value` rebuilt as the struct `kind`, of known fields only; UnsafeModelFile/InvalidModelFile name the field."""
    try:
        cleaned: dict[str, Json] = _clean(kind, value)
    except RecursionError:
        raise InvalidModelFile(f"{where} is nested too deeply; save the model again") from None
    except _Refused as refused:
        raise _error(refused, where) from None
    return cleaned


def clean_program(data: bytes, where: str) -> dict[str, Json]:
    """The parsed, checked `model.json`: no metadata, no guard code, only the root of the module call graph."""
    program = parse_json(data, where)
    return clean_struct("ExportedProgram", program, where)


def _error(refused: _Refused, where: str) -> InvalidModelFile:
    shown = repr(refused.value)
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    place = where + "".join(reversed(refused.trail))
    if refused.kind in _UNSAFE:
        kind = InvalidModelFile if refused.kind in _NOT_DANGEROUS else UnsafeModelFile
        return kind(f"{place} holds {_UNSAFE[refused.kind].format(shown)}")
    return InvalidModelFile(f"{place} should be {refused.kind}, not {shown}; save the model again")


def _clean(kind: Kind, value: Json) -> Json:  # noqa: PLR0911 one return a kind reads best
    if isinstance(kind, Maybe):
        return None if value is None else _clean(kind.value, value)
    if isinstance(kind, Many):
        return _clean_list(kind, value)
    if isinstance(kind, Table):
        return _clean_table(kind, value)
    if kind in SCALARS:
        if not SCALARS[kind](value):
            raise _Refused(kind, value)
        return value
    if kind in UNIONS:
        return _clean_union(kind, value)
    if kind in STRUCTS:
        return _clean_fields(kind, value)
    return SPECIAL[kind](value)


def _clean_list(kind: Many, value: Json) -> Json:
    if not isinstance(value, list):
        raise _Refused("a list", value)
    return [_step(kind.item, item, "[{}]", index) for index, item in enumerate(value)]


def _clean_table(kind: Table, value: Json) -> Json:
    if not isinstance(value, dict):
        raise _Refused("an object", value)
    for key in value:
        if not SCALARS[kind.key](key):
            raise _Refused(kind.key, key)
    return {key: _step(kind.value, value[key], ".{}", key) for key in value}


def _clean_union(kind: str, value: Json) -> Json:
    if not isinstance(value, dict) or len(value) != 1:
        raise _Refused(f"a {kind} (an object with one field)", value)
    (field,) = value
    if field not in UNIONS[kind]:
        raise _Refused(f"a {kind}", field)
    return {field: _step(UNIONS[kind][field], value[field], ".{}", field)}


def _clean_fields(kind: str, value: Json) -> Json:
    if not isinstance(value, dict):
        raise _Refused(f"a {kind}", value)
    return {
        name: _step(field, value[name], ".{}", name) for name, field in STRUCTS[kind].items() if name in value
    }


def _step(kind: Kind, value: Json, form: str, key: object) -> Json:
    try:
        return _clean(kind, value)
    except _Refused as refused:
        refused.trail.append(form.format(key))
        raise


def _custom_object(value: Json) -> Json:
    raise _Refused("CustomObject", value)


def _module_call_graph(value: Json) -> Json:
    if not isinstance(value, list) or not value:
        raise _Refused("a list that starts with the root module", value)
    return [
        _step("ModuleCallEntry", value[0], "[{}]", 0)
    ]  # the rest names classes and modules of the source code


def _tree(kind: str, *, is_input: bool) -> Callable[[Json], Json]:
    def clean(value: Json) -> Json:
        cleaned = clean_tree_spec(value, is_input=is_input)
        if cleaned is None:
            raise _Refused(kind, value)
        return cleaned

    return clean


SPECIAL: dict[str, Callable[[Json], Json]] = {
    "dropped": lambda _value: {},
    "no_offset": lambda _value: {"as_int": 0},  # torch does not read a graph value's offset back
    "CustomObject": _custom_object,
    "ModuleCallGraph": _module_call_graph,
    "input_tree": _tree("input_tree", is_input=True),
    "output_tree": _tree("output_tree", is_input=False),
}
