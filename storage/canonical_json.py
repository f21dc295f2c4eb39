"""One way to write JSON: equal values give equal bytes; and to read it: whatever is wrong is a ValueError."""

import json
from typing import Any

from .json_text import MOST_SIGNS, check_signs


def dumps(value: object) -> bytes:
    """UTF-8 JSON with sorted keys, two spaces of indent and a final newline.

    Raises ValueError for NaN and infinities, which JSON has no words for, and TypeError for what is no JSON value.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def loads(data: bytes, *, most_signs: int = MOST_SIGNS) -> Any:
    """The value in JSON from the store.

    Raises ValueError for what is not UTF-8, not JSON, nested beyond reason, or of more values than `most_signs`.
    """
    check_signs(data, most_signs)
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
