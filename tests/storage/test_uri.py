"""Names of places: one spelling each, and no key that leaves its root."""

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetpress.storage.errors import InvalidUri
from fleetpress.storage.uri import basename, is_s3, is_valid_key, join, normalize, split, validate_key

_segments = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="/\\\x7f"),
    min_size=1,
    max_size=20,
).filter(lambda text: text not in (".", ".."))
_keys = st.lists(_segments, min_size=1, max_size=5).map("/".join)
_roots = st.sampled_from(["s3://bucket", "s3://bucket/a/b", "/", "/data", "models", ".", "../up"])


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("file:///data/models/", "/data/models"),
        ("file://localhost/data", "/data"),
        ("file:///with%20space", "/with space"),
        ("/data//models/./x", "/data/models/x"),
        ("//data", "/data"),
        ("models/", "models"),
        ("./a/../b", "b"),
        (".", "."),
    ],
)
def test_one_spelling(uri: str, place: str) -> None:
    assert normalize(uri) == place
    assert normalize(place) == place


@pytest.mark.parametrize(
    "uri",
    ["", "s3://", "s3:///key", "s3://b", "s3://bucket//a", "s3://bucket/a/../b", "s3://bucket/a//", "s3://-bad/x",
     "s3:/bucket/x", "s3:bucket/x", "s3//bucket/x", "S3:/bucket", "gs:/bucket", "C:/models",
     "s3://user:secret@bucket", "http://host/x", "gs://bucket/x", "file://host/x", "file:relative", "a\0b",
     "a\nb", "/a\x1b[2Jb", "file:///a%0Db", "/a\x9b2J", "/a\u2028b", "/a\u2029", "/a\ud800"],
)  # fmt: skip
def test_malformed(uri: str) -> None:
    with pytest.raises(InvalidUri):
        normalize(uri)


@pytest.mark.parametrize(
    ("uri", "root", "key"),
    [
        ("s3://bucket/m/a.pt2", "s3://bucket/m", "a.pt2"),
        ("s3://bucket/a.pt2", "s3://bucket", "a.pt2"),
        ("s3://bucket", "s3://bucket", ""),
        ("/m/a.pt2", "/m", "a.pt2"),
        ("/a.pt2", "/", "a.pt2"),
        ("a.pt2", ".", "a.pt2"),
        ("m/a.pt2", "m", "a.pt2"),
        ("/", "/", ""),
        ("..", "..", ""),
    ],
)
def test_split(uri: str, root: str, key: str) -> None:
    assert split(uri) == (root, key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "..",
        "a/../b",
        "a/..",
        ".",
        "./a",
        "a\\b",
        "a\nb",
        "a\0",
        "\x7f",
        "\x85",
        "a\u2028b",
        "a\u2029b",
        "\ud800",
        "k" * 1025,
    ],
)
def test_unusable_keys(key: str) -> None:
    assert not is_valid_key(key)
    with pytest.raises(InvalidUri):
        validate_key(key)


@pytest.mark.parametrize(
    "key", ["a", "a/b", "..a", "a..", "...", "a b", "ä/ü", "k" * 1024, ".hidden/x", "a:b?c*"]
)
def test_usable_keys(key: str) -> None:
    assert validate_key(key) == key


@given(st.text(max_size=30))
def test_no_valid_key_leaves_its_root(key: str) -> None:
    if is_valid_key(key):
        assert posixpath.normpath(f"/root/{key}") == f"/root/{key}"


@given(_keys)
def test_every_list_of_names_is_a_key(key: str) -> None:
    assert validate_key(key) == key


@given(_roots, _keys)
def test_split_undoes_join(root: str, key: str) -> None:
    place = join(root, key)
    parent, name = split(place)
    assert name == key.rpartition("/")[2] == basename(place)
    assert join(parent, name) == place
    assert is_s3(place) == is_s3(root)


@pytest.mark.parametrize("part", ["..", "/etc/passwd", "", "a/../../b"])
@pytest.mark.parametrize("root", ["s3://bucket/a", "/data"])
def test_join_refuses_to_leave(root: str, part: str) -> None:
    with pytest.raises(InvalidUri):
        join(root, part)
