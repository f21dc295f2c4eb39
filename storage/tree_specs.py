"""Tree specs: how a program's inputs and outputs nest, as JSON inside JSON.

torch resolves an `__enum__` in a dict's keys, and a default dict's factory, by importing the module they name; both are
refused. A class of the author's library (a model-output dataclass) becomes the dict it is in all but name, so that the
program loads where that library is not installed.
"""

import json
import re
from typing import Any

_PLAIN = {"builtins.tuple", "builtins.list", "torch.fx.immutable_collections.immutable_list"}
_DICTS = {"builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict"}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
_KEY = re.compile(r"[A-Za-z0-9_.\-/: ]{1,200}")
_PROTOCOL = 1


def clean_tree_spec(text: object, *, is_input: bool) -> str | None:
    """The spec rebuilt from tuples, lists, dicts and leaves; None if it is anything else.

    Keys of inputs become argument names in generated code, so they are identifiers.
    """
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text)
        if not isinstance(value, list) or len(value) != 2 or value[0] != _PROTOCOL:
            return None
        node = _clean(value[1], is_input)
    except (ValueError, RecursionError):
        return None
    return None if node is None else json.dumps([_PROTOCOL, node])


def _clean(node: Any, is_input: bool) -> dict[str, Any] | None:
    if not isinstance(node, dict) or not {"type", "context", "children_spec"} <= node.keys():
        return None
    kind, context, children = node["type"], node["context"], node["children_spec"]
    if not isinstance(children, list) or not isinstance(kind, str | None):
        return None
    cleaned = [_clean(child, is_input) for child in children]
    if any(child is None for child in cleaned):
        return None
    if kind is None:
        plain = context is None and not children
    elif kind in _PLAIN:
        plain = context in ("null", None)
    else:
        keys = _keys(context, is_input)
        plain = keys is not None and len(keys) == len(children)
        if kind not in _DICTS:
            kind, plain = "builtins.dict", plain and not is_input
        context = json.dumps(keys)
    return {"type": kind, "context": context, "children_spec": cleaned} if plain else None


def _keys(context: Any, is_input: bool) -> list[str | int] | None:
    keys = json.loads(context) if isinstance(context, str) else None
    grammar = _IDENTIFIER if is_input else _KEY
    if not isinstance(keys, list):
        return None
    good = all(type(key) is int or (isinstance(key, str) and grammar.fullmatch(key)) for key in keys)
    return keys if good else None
