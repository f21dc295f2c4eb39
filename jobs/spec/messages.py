"""pydantic's errors -> problems in words, with the line in the YAML text and the nearest valid key."""

import re
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import SpecError
from .fields import nearest
from .yaml_lines import (
    Document,
    Path,
    Problem,
    shortened,
)

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of names to values",
    "tuple_type": "a list",
}
_SOURCE = re.compile(r"\.(pt2|safetensors|pt|pth|bin)$|/$")
_PLAIN_WORD = re.compile(r"true|false|[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)

_Model = TypeVar("_Model", bound=BaseModel)
_MOST_PROBLEMS = 1_000


def understood(
    kind: type[_Model], document: Document, contradictions: Iterable[Problem], name: str
) -> _Model:
    """The values of a document. Raises SpecError with all that is wrong with it, in the order of its lines.

    `contradictions` are what no single value tells; `name` is what messages call the file.
    """
    problems = list(document.problems)
    model = None
    try:
        model = kind.model_validate(document.data)
    except ValidationError as error:
        problems += explain(error, kind, document)
    problems += contradictions
    if not problems and model is not None:
        return model
    ordered = sorted(problems, key=lambda problem: problem.line)
    lines = list(dict.fromkeys(problem.render(name) for problem in ordered))
    more = [f"{name}: and {len(lines) - _MOST_PROBLEMS} more problems"] if len(lines) > _MOST_PROBLEMS else []
    raise SpecError("\n".join(lines[:_MOST_PROBLEMS] + more))


def explain(error: ValidationError, root: type[BaseModel], document: Document) -> Iterator[Problem]:
    """One problem per error of validating `document.data` as `root`."""
    for detail in error.errors(include_url=False):
        path = _real(detail["loc"], document.data, missing=detail["type"] == "missing")
        yield Problem(line=document.line(path), path=path, what=_what(detail, root))


def _what(detail: ErrorDetails, root: type[BaseModel]) -> str:
    kind, value, loc = detail["type"], detail["input"], detail["loc"]
    if kind == "spec":
        return detail["msg"]
    if kind == "missing":
        return "is missing; add `version: 1`" if loc == ("version",) else "is missing; add it"
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(str(loc[-1]), _keys(root, loc[:-1]))}"
    if kind in ("too_short", "string_too_short"):
        return "is empty; name at least one, or delete the key"
    if kind == "literal_error":
        words = str(detail["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return f"should be {' or '.join(words)}, not {_shown(value)}" + _hint(loc, value, words)
    what = _EXPECTED.get(kind)
    expected = f"should be {what}" if what else detail["msg"].replace("Input should", "should")
    return f"{expected}, not {_shown(value)}{_remedy(kind, value) or _as_model(kind, value)}"


def _hint(loc: tuple[int | str, ...], value: object, words: list[str]) -> str:
    if loc == ("version",) and isinstance(value, int) and value > 1:
        return "; the spec is for a newer fleetpress: install that, or write version: 1"
    if value in words:
        return "; write it without quotes"
    hint = nearest(value, words) if isinstance(value, str) else ""
    return f"; {hint}" if hint.startswith("did you mean") else ""


def _remedy(kind: str, value: object) -> str:
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return "; write it in quotes"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "float_type" and isinstance(value, str) and value.endswith("%"):
        return "; write 0.5 for 50%"
    if kind == "bool_type" and value in ("yes", "no", "on", "off"):
        return f"; write {str(value in ('yes', 'on')).lower()}"
    if (
        kind in ("int_type", "float_type", "bool_type")
        and isinstance(value, str)
        and _PLAIN_WORD.fullmatch(value)
    ):
        return "; write it without quotes"
    return ""


def _as_model(kind: str, value: object) -> str:
    is_source = kind == "model_type" and isinstance(value, str) and _SOURCE.search(value)
    return f"; write {{source: {shortened(str(value))}, recipe: NAME}}" if is_source else ""


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, (list, tuple)) else shortened(repr(value))


def _real(loc: tuple[int | str, ...], data: Any, *, missing: bool) -> Path:
    """The part of pydantic's path that is in the text; it also names defaults and branches of a union."""
    path: list[int | str] = []
    for word in loc:
        inside = word in data if isinstance(data, dict) else isinstance(data, list) and isinstance(word, int)
        if inside:
            data = data[word]
            path.append(word)
    return (*path, loc[-1]) if missing else tuple(path)


def _keys(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the spec knows at `loc`."""
    kind: Any = root
    for word in loc:
        fields = getattr(kind, "model_fields", {})
        if fields:
            kind = next(
                _plain(field.annotation) for key, field in fields.items() if (field.alias or key) == word
            )
        else:  # a list or mapping of models: every position holds the same kind
            kind = _plain(next(arg for arg in reversed(get_args(kind)) if arg is not ...))
    return [field.alias or key for key, field in kind.model_fields.items()]


def _plain(annotation: Any) -> Any:
    """The annotation without `| None` and without validators."""
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    return annotation
