"""One way to write JSON: equal values give equal bytes."""

import json


def dumps(value: object) -> bytes:
    """UTF-8 JSON with sorted keys, two spaces of indent and a final newline.

    Raises ValueError for NaN and infinities, which JSON has no words for, and TypeError for what is no JSON value.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"
