"""YAML text -> plain values plus the line each of them was written on.

The words are those of YAML 1.2: `1e-3` is a number, `no` is a name, `012` and dates are text. Keys are always text.
Anchors, aliases and merge keys (`<<`) work; tags other than the plain ones are refused.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import SpecError

Path = tuple[str | int, ...]

_MOST_VALUES = 500_000  # aliases can multiply a small file into billions of values
_MOST_MERGES = 100_000  # so can `<<`, without a single new value
_SPEC_NEEDS = "the spec is empty; it needs version, name, output, models and recipes"
_LONGEST_SHOWN = 100
_LONGEST_MESSAGE = 500
_PLAIN = "tag:yaml.org,2002:"
_MERGE = f"{_PLAIN}merge"
_WORDS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": lambda text: int(text.replace("_", "")),
    "float": lambda text: float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")),
    "merge": str,
}
_REMEDIES = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values are not allowed": "put text that holds `: ` in quotes, a space behind the colon of a key, "
    "and check the indentation",
    "could not find expected ':'": "write `key: value`, with a space behind the colon",
    "sequence entries are not allowed": "put every `- ` item on a line of its own",
    "while scanning a quoted scalar": "close the quote",
    "expected <block end>": "check the indentation and the quotes",
    "undefined alias": "define it before with `&name`",
    "expected a single document": "keep one spec per file",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong in a spec: where (`path` and line; line 0 when there is none) and what."""

    line: int
    path: Path
    what: str

    def render(self, name: str) -> str:
        """`file:line: path: what`."""
        place = f"{name}:{self.line}" if self.line else name
        what = told(self.what)
        return f"{place}: {told(dotted(self.path))}: {what}" if self.path else f"{place}: {what}"


@dataclass(frozen=True, kw_only=True)
class Document:
    """The plain values of a YAML text, the line of every path in it, and the problems met while reading."""

    data: Any
    lines: dict[Path, int]
    problems: list[Problem] = field(default_factory=list)

    def line(self, path: Path) -> int:
        """The line of the value at `path`, or of the nearest one around it."""
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, 0)


def dotted(path: Path) -> str:
    """`("models", 1, "recipe")` -> `models[1].recipe`."""
    return "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in path).removeprefix(".")


def told(text: str) -> str:
    """`text` as one line of a message: what is not printable is escaped, and of an endless one the middle left out."""
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text[: 2 * _LONGEST_MESSAGE])
    if len(text) > _LONGEST_MESSAGE:  # what to do stands at its end
        line = f"{line[: _LONGEST_MESSAGE // 2]} ... {told(text[-_LONGEST_MESSAGE // 2 :])}"
    return line


def shortened(text: str) -> str:
    """`text`, cut where a message would become unreadable."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def read_yaml(text: str, name: str, *, needs: str = _SPEC_NEEDS) -> Document:
    """Read one YAML document. `name` is the file's name for messages, `needs` what an empty one is said to lack.

    Raises SpecError when the text does not parse; problems that still leave a readable document (a key
    written twice, a tag) are returned in it.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = told(" ".join(part for part in (error.context, error.problem) if part))
        remedy = next((f"; {remedy}" for sign, remedy in _REMEDIES.items() if sign in what), "")
        begun = error.context_mark.line + 1 if error.context_mark else 0
        if mark and 0 < begun <= mark.line:
            what += f" (begun on line {begun})"
        place = f":{mark.line + 1}" if mark else ""
        column = f", column {mark.column + 1}" if mark else ""
        raise SpecError(f"{name}{place}: not valid YAML{column}: {what}{remedy}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"character U+{ord(text[error.position]):04X} is not text"
        raise SpecError(f"{name}:{line}: not valid YAML: {what}; save the file as UTF-8") from None
    except (ValueError, OverflowError):  # PyYAML lets an escape such as "\U00110000" run into chr()
        raise SpecError(
            f"{name}: not valid YAML: an escape `\\U...` names no character; use single quotes"
        ) from None
    except RecursionError:
        raise SpecError(
            f"{name}: lists and mappings are nested too deeply; a spec needs five levels"
        ) from None
    if node is None:
        raise SpecError(f"{name}: {needs}")
    reader = _Reader(name)
    try:
        data = reader.read(node, ())
    except RecursionError:  # aliases nest what is flat in the file
        raise SpecError(f"{name}: aliases are nested too deeply; a spec needs five levels") from None
    return Document(data=data, lines=reader.lines, problems=reader.problems)


def write_yaml(value: object) -> str:
    """Plain values as YAML text that `read_yaml` and every other reader take for the same values."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False))


def write_yaml_blocks(value: object) -> str:
    """The same with texts of several lines as blocks, and no anchors: for people to read."""
    return str(yaml.dump(value, Dumper=_BlockDumper, sort_keys=False, width=120))


class _Loader(yaml.SafeLoader):
    """PyYAML with the words of YAML 1.2 in place of those of 1.1."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""


class _BlockDumper(_Dumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(f"{_PLAIN}str", text, style="|" if "\n" in text else None)


_BlockDumper.add_representer(str, _represent_text)

for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"{_PLAIN}{_kind}", re.compile(f"(?:{_pattern})$"), _first)


class _Reader:
    """Walks the nodes of one document once, into values, lines and problems."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []
        self._merges = 0
        self._open: set[int] = set()  # nodes being read: meeting one again means an alias to its own parent

    def read(self, node: yaml.Node, path: Path, line: int | None = None) -> Any:
        self.lines[path] = line or node.start_mark.line + 1
        if len(self.lines) > _MOST_VALUES:
            raise self._endless()
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._check_tag(node, path, ("map", "seq"))
        if id(node) in self._open:
            self._problem(path, "an alias that holds itself; write the values out")
            return None
        self._open.add(id(node))
        value: Any = None
        if isinstance(node, yaml.SequenceNode):
            value = [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            value = self._mapping(node, path)
        self._open.remove(id(node))
        return value

    def _endless(self) -> SpecError:
        return SpecError(
            f"{self.name}: more than {_MOST_VALUES} values; use source patterns, or fewer aliases"
        )

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._problem(path, "a key is a list or a mapping; keys are names", line)
            elif key.value in value:
                first = self.lines[(*path, key.value)]
                self._problem((*path, key.value), f"written twice, first on line {first}; keep one", line)
            elif key.tag != _MERGE:
                value[key.value] = self.read(item, (*path, key.value), line)
        for key, item in self._merged(node, path, {id(node)}):
            if key.value not in value:
                value[key.value] = self.read(item, (*path, key.value), key.start_mark.line + 1)
        return value

    def _merged(
        self, node: yaml.MappingNode, path: Path, seen: set[int]
    ) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Keys and values that `<<` brings into a mapping, the nearest first."""
        for item in [item for key, item in node.value if key.tag == _MERGE]:
            for part in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                self._merges += 1
                if self._merges > _MOST_MERGES:
                    raise self._endless()
                if not isinstance(part, yaml.MappingNode) or id(part) in seen:
                    line = item.start_mark.line + 1
                    self._problem(path, "`<<` takes another mapping, as in `<<: *name`", line)
                    continue
                yield from ((key, value) for key, value in part.value if key.tag != _MERGE)
                yield from self._merged(part, path, seen | {id(part)})

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text = str(node.value)
        self._check_tag(node, path, ("str", *_WORDS))
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            self._problem(path, "an escape `\\u...` names half a character; write the character itself")
            return ""
        try:
            return _WORDS.get(node.tag.removeprefix(_PLAIN), str)(text)
        except (ValueError, KeyError):
            remedy = "delete the tag" if len(text) <= _LONGEST_SHOWN else "write a smaller number"
            self._problem(path, f"`{shortened(text)}` does not fit its tag `{node.tag}`; {remedy}")
            return text

    def _check_tag(self, node: yaml.Node, path: Path, plain: tuple[str, ...]) -> None:
        if node.tag.removeprefix(_PLAIN) not in plain:
            self._problem(path, f"tag `{node.tag}` has no meaning in a spec; delete it")

    def _problem(self, path: Path, what: str, line: int | None = None) -> None:
        self.problems.append(Problem(line=line or self.lines[path], path=path, what=what))
