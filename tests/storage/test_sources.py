"""What a source names: files, folders and patterns, in folders and in S3 alike, without reading a model."""

from pathlib import Path

import pytest

from fleetpress.storage.errors import BucketNotFound, InvalidUri, ObjectNotFound
from fleetpress.storage.sources import find_models
from fleetpress.storage.store import ObjectStore

KEYS = [
    "lenet5/model.pt2",
    "lenet5/README.md",
    "crepe/weights.pth",
    "fleet/a.pt2",
    "fleet/b.safetensors",
    "fleet/c.bin",
    "fleet/notes.txt",
    "fleet/.hidden.pt2",
    "llm/tiny/config.json",
    "llm/tiny/model.safetensors",
    "llm/tiny/tokenizer.json",
    "llm/tiny/pytorch_model.bin",
    "llm/big/config.json",
    "llm/big/model.safetensors.index.json",
    "llm/big/one.safetensors",
    "llm/empty/readme.md",
    "llm/.cache/model.pt2",
    "several/x.pt2",
    "several/y.pt2",
]


@pytest.fixture
def fleet(store: ObjectStore) -> str:
    for key in KEYS:
        store.put(key, b"never read")
    return store.uri


FOUND = {
    "lenet5/model.pt2": [("lenet5", "program", "lenet5/model.pt2")],
    "lenet5": [("lenet5", "program", "lenet5/model.pt2")],
    "lenet5/": [("lenet5", "program", "lenet5/model.pt2")],
    "crepe/weights.pth": [("weights", "module", "crepe/weights.pth")],
    "crepe": [("crepe", "module", "crepe/weights.pth")],
    "llm/tiny": [("tiny", "checkpoint", "llm/tiny")],
    "llm/tiny/model.safetensors": [("tiny", "checkpoint", "llm/tiny/model.safetensors")],
    "llm/*/": [("big", "checkpoint", "llm/big"), ("tiny", "checkpoint", "llm/tiny")],
    "llm/*": [("big", "checkpoint", "llm/big"), ("tiny", "checkpoint", "llm/tiny")],
    "fleet/*": [
        ("a", "program", "fleet/a.pt2"),
        ("b", "checkpoint", "fleet/b.safetensors"),
        ("c", "module", "fleet/c.bin"),
    ],
    "fleet/*.pt2": [("a", "program", "fleet/a.pt2")],
    "fleet/[ab].*": [("a", "program", "fleet/a.pt2"), ("b", "checkpoint", "fleet/b.safetensors")],
    "*/model.pt2": [("lenet5", "program", "lenet5/model.pt2")],
    "*/?.pt2": [
        ("a", "program", "fleet/a.pt2"),
        ("x", "program", "several/x.pt2"),
        ("y", "program", "several/y.pt2"),
    ],
    "*": [("crepe", "module", "crepe/weights.pth"), ("lenet5", "program", "lenet5/model.pt2")],
}


@pytest.mark.parametrize("source", FOUND)
def test_what_a_source_names(source: str, fleet: str) -> None:
    found = find_models(f"{fleet}/{source}")
    assert [(m.name, m.kind, m.uri) for m in found] == [
        (n, k, f"{fleet}/{uri}") for n, k, uri in FOUND[source]
    ]


def test_files_pin_the_whole_model(fleet: str) -> None:
    (model,) = find_models(f"{fleet}/llm/tiny")
    assert model.root == model.uri
    assert [file.path for file in model.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all(file.bytes == len(b"never read") and file.etag for file in model.files)
    (model,) = find_models(f"{fleet}/lenet5/model.pt2")
    assert (model.root, [file.path for file in model.files]) == (f"{fleet}/lenet5", ["model.pt2"])


@pytest.mark.parametrize(
    "source", ["none.pt2", "none", "none/*.pt2", "llm/empty", "fleet/notes.txt", "several", "llm/*/*.onnx"]
)
def test_sources_that_match_nothing(source: str, fleet: str) -> None:
    with pytest.raises(ObjectNotFound) as raised:
        find_models(f"{fleet}/{source}")
    assert source.rsplit("/", maxsplit=1)[-1] in str(raised.value)


def test_a_missing_bucket_is_not_a_missing_model(s3_uri: str) -> None:
    for source in (
        "s3://no-such-bucket-here/m.pt2",
        "s3://no-such-bucket-here/*/",
        "s3://no-such-bucket-here/m",
    ):
        with pytest.raises(BucketNotFound):
            find_models(source)


@pytest.mark.parametrize("source", ["s3://mod*/a.pt2", "s3://*", "models/**/a.pt2"])
def test_patterns_that_are_none(source: str) -> None:
    with pytest.raises(InvalidUri):
        find_models(source)


def test_a_model_in_the_working_folder_is_named_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lenet"
    folder.mkdir()
    (folder / "model.pt2").write_bytes(b"x")
    monkeypatch.chdir(folder)
    assert [found.name for source in ("model.pt2", ".", "./model.pt2") for found in find_models(source)] == [
        "lenet"
    ] * 3
