"""JSON from strangers: strictly UTF-8, no key twice, and no more values than the memory of a task can take."""

import json
from typing import Any

from .quoting import one_line, quoted

MOST_SIGNS = 4_000_000  # a value takes some 100 bytes, however little its text; so this is about 400 MB
_STRUCTURE = b",:[{"


def check_signs(data: bytes, most_signs: int = MOST_SIGNS) -> None:
    """ValueError for JSON of more values than that: commas, colons and brackets are counted, and nothing is built."""
    signs = sum(map(data.count, (bytes([sign]) for sign in _STRUCTURE)))
    if signs > most_signs:
        raise ValueError(f"it has about {signs} values and keys, more than {most_signs}")


def parse_json(data: bytes, *, most_signs: int = MOST_SIGNS) -> Any:
    """The value that `data` holds. ValueError says in one line why there is none; `most_signs` as for check_signs."""
    check_signs(data, most_signs)
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(one_line(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{quoted(name)} stands in it twice")
            seen.add(name)
    return table
