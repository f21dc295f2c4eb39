"""One way to write JSON: equal values give equal bytes; and to read it: whatever is wrong is a ValueError."""

import json
from collections.abc import Mapping
from typing import Any

from .json_text import MOST_SIGNS, check_signs


def dumps(value: object) -> bytes:
    """UTF-8 JSON with sorted keys, two spaces of indent and a final newline.

    Raises ValueError for NaN and infinities, which JSON has no words for, and TypeError for what is no JSON value.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def dumps_short(value: Mapping[str, object]) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: a line for each field, and one for each entry of its lists of objects.

    As good to read as `dumps`, in little more than half of the bytes: beside a small model every one counts. Raises as
    `dumps` does.
    """
    fields = (f"{_word(key)}:{_lines(value[key])}" for key in sorted(value))
    return b"{" + ",\n".join(fields).encode() + b"}\n"


def _lines(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(map(_word, value)) + "]"
    return _word(value)


def _word(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def loads(data: bytes, *, most_signs: int = MOST_SIGNS) -> Any:
    """The value in JSON from the store.

    Raises ValueError for what is not UTF-8, not JSON, nested beyond reason, or of more values than `most_signs`.
    """
    check_signs(data, most_signs)
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
