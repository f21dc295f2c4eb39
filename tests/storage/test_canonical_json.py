"""Equal values, equal bytes."""

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.storage.canonical_json import dumps, dumps_short

_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)


def test_form() -> None:
    assert dumps({"b": [1, 2.5], "a": {"ü": None}}) == (
        '{\n  "a": {\n    "ü": null\n  },\n  "b": [\n    1,\n    2.5\n  ]\n}\n'.encode()
    )


def test_short_form() -> None:
    assert dumps_short({"b": [1, 2.5], "a": {"ü": [{}, {}]}, "c": [{"d": 1}, {"d": None}], "e": []}) == (
        '{"a":{"ü":[{},{}]},\n"b":[1,2.5],\n"c":[\n{"d":1},\n{"d":null}],\n"e":[]}\n'.encode()
    )


@pytest.mark.parametrize("write", [dumps, dumps_short])
@given(value=st.dictionaries(st.text("abc", max_size=3), _values, max_size=6))
def test_order_does_not_matter_and_nothing_is_lost(
    write: Callable[[dict[str, object]], bytes], value: dict[str, object]
) -> None:
    backwards = dict(reversed(list(value.items())))
    assert write(value) == write(backwards)
    assert json.loads(write(value)) == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [dumps, dumps_short])
def test_no_number_that_json_lacks(write: Callable[[dict[str, object]], bytes], number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write({"x": number})
