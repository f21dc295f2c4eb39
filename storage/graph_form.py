"""The JSON of a program's graph in a short form: what follows from the rest is left out, names become distances.

`short_form` takes the cleaned `model.json` (see `program_schema`) and `long_form` gives it back, equal in every field.
A node is `[signature, argument ..., shape]`: `signature` is a place in a table of operators with the names of their
arguments; a tensor is 0, the first stored one that no node has used yet, or how many values ago it was made; a shape is
0 where it is that of the first tensor among the arguments. What has no short form stands there as it is, as an object.
"""

import json

from .graph_defaults import (
    GRAPH,
    LISTS,
    META,
    NODE,
    PROGRAM,
    STORED,
    SYMBOL,
    NoShortForm,
    Values,
    last_output,
    made_by,
    natural,
    output_of,
    placeholder,
    plain_call,
    strides,
    without,
)
from .program_schema import Json
from .safetensors_header import MAX_DIMENSIONS

_MOST_SHAPES_BYTES = 64 << 20  # of ten thousand values some three megabytes


def short_form(program: Json) -> Json:
    """The short form, or the program itself where it has none."""
    try:
        short = _Shortener().program(program)
        if long_form(short) == program:
            return short
    except (NoShortForm, KeyError, IndexError, TypeError, ValueError, AttributeError):
        pass
    return program


def long_form(short: Json) -> Json:
    """The program again. ValueError for what is no short form."""
    if isinstance(short, dict):
        return short
    try:
        return _Lengthener().program(short)
    except (NoShortForm, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its graph is no short form ({type(error).__name__})") from None


class _Shortener:
    def __init__(self) -> None:
        self._values = Values()
        self._sizes: list[Json] = []
        self._signatures: list[Json] = []

    def program(self, program: Json) -> Json:
        module = program["graph_module"]
        graph, signature = module["graph"], module["signature"]
        metas = graph["tensor_values"]
        inputs = [self._input(spec, metas) for spec in signature["input_specs"]]
        nodes = [self._node(node, metas) for node in graph["nodes"]]
        rest = {
            **without(program, PROGRAM, ("graph_module", "range_constraints")),
            **without(graph, GRAPH, LISTS),
        }
        ranges = [[name, r["min_val"], r["max_val"]] for name, r in program["range_constraints"].items()]
        outputs = signature["output_specs"]
        call = module["module_call_graph"]
        short = [
            inputs,
            self._signatures,
            nodes,
            self._sizes,
            ranges,
            None if outputs == last_output(self._values) else outputs,
            None if call == plain_call(signature["input_specs"]) else call,
            rest,
        ]
        while not short[-1]:
            short.pop()
        return short

    def _input(self, spec: Json, metas: Json) -> Json:
        (kind,) = spec
        if kind == "user_input":
            name = spec[kind]["arg"]["as_tensor"]["name"]
            self._values.add(name, metas[name])
            return [name, self._shape(metas[name], None)]
        if kind not in STORED:
            raise NoShortForm
        field, prefix = STORED[kind]
        name, arg = spec[kind][field], spec[kind]["arg"]["name"]
        self._values.add(arg, metas[arg], stored=True)
        shape = self._shape(metas[arg], None, grad=kind == "parameter")
        short = [name, shape, kind[0]]
        if kind == "buffer" and not spec[kind]["persistent"]:
            short[2] = "n"
        return [*short, *([] if arg == placeholder(prefix, name) else [arg])]

    def _node(self, node: Json, metas: Json) -> Json:
        names = [item["name"] if item["kind"] == 1 else f"*{item['name']}" for item in node["inputs"]]
        signature = [node["target"], *names]
        if signature not in self._signatures:
            self._signatures.append(signature)
        arguments = [self._argument(item["arg"]) for item in node["inputs"]]
        expected = self._values.next_name(node["target"])
        changed = without(node, NODE, ("inputs", "target", "name", "outputs"))
        if node["name"] != expected:
            changed["name"] = node["name"]
        name = node["name"]
        first = next(
            (item["arg"]["as_tensor"]["name"] for item in node["inputs"] if "as_tensor" in item["arg"]), None
        )
        if node["outputs"] == [{"as_tensor": {"name": name}}]:
            shape = self._shape(metas[name], None if first is None else self._values.metas[first])
            self._values.add(name, metas[name])
        else:
            shape = []
            for output in node["outputs"]:
                for made in made_by(output):
                    shape.append(self._shape(metas[made], None))
                    self._values.add(made, metas[made])
            changed["outputs"] = node["outputs"]
        return [self._signatures.index(signature), *arguments, shape, *([changed] if changed else [])]

    def _argument(self, argument: Json) -> Json:  # noqa: PLR0911 one return a kind reads best
        ((kind, value),) = argument.items()
        if kind == "as_tensor":
            return self._values.reference(value["name"])
        if kind == "as_int":
            return [value]
        if kind == "as_ints" and len(value) != 1:
            return value
        if kind == "as_none":
            return None
        if kind in ("as_bool", "as_string") or (kind == "as_float" and isinstance(value, float)):
            return value
        if kind == "as_tensors":
            return {"t": [self._values.reference(item["name"]) for item in value]}
        return argument

    def _shape(self, meta: Json, like: Json, *, grad: bool = False) -> Json:
        if meta == like:
            return 0
        changed = without(meta, {**META, "requires_grad": grad}, ("sizes", "strides"))
        sizes = [self._size(size) for size in meta["sizes"]]
        if meta["strides"] != strides(meta["sizes"]):
            changed["strides"] = [self._size(stride) for stride in meta["strides"]]
        return {**changed, "sizes": sizes} if changed else sizes

    def _size(self, size: Json) -> int:
        if "as_int" in size and size["as_int"] >= 0:
            return int(size["as_int"])
        short = size
        if "as_expr" in size and (found := SYMBOL.fullmatch(size["as_expr"]["expr_str"])):
            short = [found[1], size["as_expr"]["hint"]["as_int"]]
        if short not in self._sizes:
            self._sizes.append(short)
        return -1 - self._sizes.index(short)


class _Lengthener:
    def __init__(self) -> None:
        self._values = Values()
        self._sizes: list[Json] = []
        self._metas: dict[str, Json] = {}
        self._lengths: dict[int, int] = {}
        self._length = 0

    def program(self, short: Json) -> Json:
        if not 3 <= len(short) <= 8:
            raise NoShortForm
        rest: list[Json] = [[], [], None, None, {}]
        inputs, signatures, nodes, sizes, ranges, outputs, call, others = list(short) + rest[len(short) - 3 :]
        self._sizes = sizes
        specs = [self._input(item) for item in inputs]
        made = [self._node(item, signatures) for item in nodes]
        output_specs = last_output(self._values) if outputs is None else outputs
        graph = {
            **GRAPH,
            **{name: value for name, value in others.items() if name in GRAPH},
            "inputs": [output_of(spec) for spec in specs],
            "outputs": [output_of(spec) for spec in output_specs],
            "nodes": made,
            "tensor_values": self._metas,
        }
        module = {
            "graph": graph,
            "signature": {"input_specs": specs, "output_specs": output_specs},
            "module_call_graph": plain_call(specs) if call is None else call,
        }
        return {
            **PROGRAM,
            **{name: value for name, value in others.items() if name not in GRAPH},
            "graph_module": module,
            "range_constraints": {name: {"min_val": low, "max_val": high} for name, low, high in ranges},
        }

    def _add(self, name: str, meta: Json, *, stored: bool = False) -> None:
        self._metas[name] = meta
        if id(meta) not in self._lengths:
            self._lengths[id(meta)] = len(json.dumps(meta))
        self._length += self._lengths[id(meta)]
        if self._length > _MOST_SHAPES_BYTES:  # a shape that others share is written out for each of them
            raise NoShortForm
        self._values.add(name, meta, stored=stored)

    def _input(self, short: Json) -> Json:
        name, shape, *more = short
        if not more:
            self._add(name, self._meta(shape, None))
            return {"user_input": {"arg": {"as_tensor": {"name": name}}}}
        letter = "b" if more[0] == "n" else more[0]
        kind = {kind[0]: kind for kind in STORED}[letter]
        field, prefix = STORED[kind]
        arg = more[1] if len(more) > 1 else placeholder(prefix, name)
        self._add(arg, self._meta(shape, None, grad=kind == "parameter"), stored=True)
        spec = {"arg": {"name": arg}, field: name}
        if kind == "buffer":
            spec["persistent"] = more[0] != "n"
        return {kind: spec}

    def _node(self, short: Json, signatures: Json) -> Json:
        target, *names = signatures[natural(short[0])]
        arguments = short[1 : 1 + len(names)]
        shape, *more = short[1 + len(names) :]
        changed = dict(more[0]) if more else {}
        inputs = [
            {
                "arg": self._argument(argument),
                "kind": 2 if name[:1] == "*" else 1,
                "name": name.removeprefix("*"),
            }
            for argument, name in zip(arguments, names, strict=True)
        ]
        name = self._values.next_name(target)
        name = changed.pop("name", name)
        node = {**NODE, "target": target, "inputs": inputs, "name": name}
        if "outputs" in changed:
            made = [one for output in changed["outputs"] for one in made_by(output)]
            for one, its_shape in zip(made, shape, strict=True):
                self._add(one, self._meta(its_shape, None))
        else:
            first = next(
                (item["arg"]["as_tensor"]["name"] for item in inputs if "as_tensor" in item["arg"]), None
            )
            self._add(name, self._meta(shape, None if first is None else self._metas[first]))
            node["outputs"] = [{"as_tensor": {"name": name}}]
        return {**node, **changed}

    def _argument(self, short: Json) -> Json:  # noqa: PLR0911 one return a kind reads best
        if short is None:
            return {"as_none": True}
        if isinstance(short, bool):
            return {"as_bool": short}
        if isinstance(short, int):
            return {"as_tensor": {"name": self._values.named(short)}}
        if isinstance(short, float):
            return {"as_float": short}
        if isinstance(short, str):
            return {"as_string": short}
        if isinstance(short, list):
            return {"as_int": short[0]} if len(short) == 1 else {"as_ints": short}
        if "t" in short:
            return {"as_tensors": [{"name": self._values.named(item)} for item in short["t"]]}
        return short

    def _meta(self, short: Json, like: Json, *, grad: bool = False) -> Json:
        if short == 0:
            if like is None:
                raise NoShortForm
            return like
        changed = dict(short) if isinstance(short, dict) else {"sizes": short}
        if len(changed["sizes"]) > MAX_DIMENSIONS:
            raise NoShortForm
        sizes = [self._size(size) for size in changed.pop("sizes")]
        steps = changed.pop("strides", None)
        own = strides(sizes) if steps is None else [self._size(step) for step in steps]
        return {**META, "requires_grad": grad, **changed, "sizes": sizes, "strides": own}

    def _size(self, size: int) -> Json:
        if size >= 0:
            return {"as_int": size}
        found = self._sizes[-1 - size]
        if isinstance(found, dict):
            return found
        name, hint = found
        symbol = f"Symbol('{name}', positive=True, integer=True)"
        return {"as_expr": {"expr_str": symbol, "hint": {"as_int": hint}}}
