"""Reading YAML with lines: what parses, what does not, and where."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.yaml_lines import (
    Problem,
    dotted,
    read_yaml,
    write_yaml,
)


def test_every_path_has_its_line() -> None:
    document = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - {d: 2,\n       e: 3}\n", "f")
    assert document.data == {"a": {"b": 1, "c": ["x", {"d": 2, "e": 3}]}}
    assert document.line(("a", "c", 1, "e")) == 6
    assert document.line(("a", "c", 1)) == 5
    assert document.line(("a", "c")) == 3
    assert document.line(("a", "nowhere", 7)) == 1


def test_dotted() -> None:
    assert dotted(("models", 1, "recipe")) == "models[1].recipe"
    assert dotted(("recipes", "small", "prune", "ignore", 0)) == "recipes.small.prune.ignore[0]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-1_000", -1000),
        ("1.", 1.0),
        ("012", "012"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("True", True),
        ("~", None),
        ("", None),
        ("2026-13-45", "2026-13-45"),
        ('"3"', "3"),
        ("-.inf", -math.inf),
        ("1e", "1e"),
        ("!!str 3", "3"),
        ("!!float 3", 3.0),
    ],
    ids=str,
)
def test_words(text: str, value: object) -> None:
    document = read_yaml(f"k: {text}", "f")
    assert document.data == {"k": value}
    assert type(document.data["k"]) is type(value)
    assert not document.problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "f:1: not valid YAML, column 5: mapping values are not allowed here"),
        ("a:\n\t- b", "f:2: not valid YAML, column 1: "),
        ("a: 1\n b: 2", "f:2: not valid YAML, column 3: "),
        ("a: [1,\nb: 2", "f:2: not valid YAML, column "),
        ('a: "x\n\n', "f:3: not valid YAML, column 1: "),
        ("a: *b", "f:1: not valid YAML, column 4: found undefined alias 'b'; define it before with `&name`"),
        ("a: 1\n---\nb: 2", "f:2: not valid YAML, column 1: "),
        ("a: 1\nb: \x07", "f:2: not valid YAML: character U+0007 is not text; save the file as UTF-8"),
        ("# nothing\n", "f: the spec is empty; "),
        ('a: "\\U00110000"', "f: not valid YAML: an escape `\\U...` names no character; use single quotes"),
        ("[" * 5000, "f: "),
    ],
    ids=[
        "colon",
        "tab",
        "indent",
        "bracket",
        "quote",
        "alias",
        "documents",
        "bell",
        "empty",
        "escape",
        "deep",
    ],
)
def test_text_that_does_not_parse(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_yaml(text, "f")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: {b: 1,\n  b: 2}", "f:2: a.b: written twice, first on line 1; keep one"),
        ("a: !!set {b, c}", "f:1: a: tag `tag:yaml.org,2002:set` has no meaning in a spec; delete it"),
        ("a: !!int x", "f:1: a: `x` does not fit its tag `tag:yaml.org,2002:int`; delete the tag"),
        ("a: &x [*x]", "f:1: a[0]: an alias that holds itself; write the values out"),
        ("a: &x {<<: *x}", "f:1: a: `<<` takes another mapping, as in `<<: *name`"),
        ("a: {<<: 3}", "f:1: a: `<<` takes another mapping, as in `<<: *name`"),
        ('a: "\\ud800"', "f:1: a: an escape `\\u...` names half a character; write the character itself"),
        ("? [a, b]\n: 1", "f:1: a key is a list or a mapping; keys are names"),
    ],
    ids=[
        "twice",
        "tag",
        "wrong tag",
        "own alias",
        "own merge",
        "merge of a number",
        "surrogate",
        "list as key",
    ],
)
def test_text_that_parses_but_is_wrong(text: str, problem: str) -> None:
    document = read_yaml(text, "f")
    assert [item.render("f") for item in document.problems] == [problem]


def test_a_number_of_endless_digits_is_not_told_in_full() -> None:
    (problem,) = read_yaml("a: " + "9" * 5000, "f").problems
    assert problem.render("f").endswith(
        "...` does not fit its tag `tag:yaml.org,2002:int`; write a smaller number"
    )


def test_whatever_stands_in_it_a_problem_is_one_readable_line() -> None:
    problem = Problem(line=3, path=("a\nb", 1), what="\x1b[2J\u2028 is wrong; delete it")
    assert problem.render("f") == "f:3: a\\nb[1]: \\x1b[2J\\u2028 is wrong; delete it"
    endless = Problem(line=3, path=("a" * 9000,), what=f"`{'b' * 9000}` is wrong; delete it").render("f")
    assert endless.endswith("bbb` is wrong; delete it")
    assert len(endless) < 2000
    with pytest.raises(SpecError, match=r"found undefined alias 'aaa+ \.\.\. aaa+'") as caught:
        read_yaml(f"x: *{'a' * 9000}", "f")
    assert len(str(caught.value)) < 1000


def test_merged_keys_keep_their_own_lines() -> None:
    document = read_yaml("a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  x: 3\n", "f")
    assert document.data["b"] == {"x": 3, "y": 2}
    assert (document.line(("b", "x")), document.line(("b", "y"))) == (6, 3)
    assert not document.problems


def test_aliases_cannot_blow_up() -> None:
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
    with pytest.raises(SpecError, match="more than 500000 values"):
        read_yaml(f"a0: &a0 [1]\n{levels}\n", "f")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), values, max_size=4))
def test_written_values_are_read_again(data: dict[str, object]) -> None:
    text = write_yaml(data)
    assert read_yaml(text, "f").data == data
    assert yaml.safe_load(text) == data
