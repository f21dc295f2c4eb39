"""The ledger: records survive, and what is torn or does not hold is as good as absent."""

import hashlib
import logging

import pytest

from fleetpress.jobs.ledger import Ledger
from fleetpress.jobs.tasks import Output, TaskRecord
from fleetpress.storage.errors import StoreUnreachable
from fleetpress.storage.store import ObjectStore, open_store

DATA = b"tensors"


def record(digest: str = "d1", *outputs: Output) -> TaskRecord:
    return TaskRecord(
        task="t",
        model="m",
        kind="collect",
        digest=digest,
        outputs=outputs,
        result={"batches": 3, "scores": [0.5, {"a": None}]},
        seconds=1.5,
        attempts=2,
        fleetpress_version="0.1.0",
    )


def stored_output(store: ObjectStore, key: str = "records/d1.safetensors") -> Output:
    store.put(key, DATA)
    return Output(key=key, bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())


def test_a_record_comes_back_as_it_was_written(store: ObjectStore) -> None:
    written = record("d1", stored_output(store))
    assert Ledger(store).find("d1") is None
    Ledger(store).write(written)
    assert Ledger(store).find("d1") == written


def test_known_lists_records_only_and_once(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(store).write(record("d1", stored_output(store)))
    ledger = Ledger(store)
    assert ledger.known() == {"d1"}
    monkeypatch.setattr(type(store), "list", None)  # a second listing would fail
    ledger.write(record("d2"))
    assert ledger.known() == {"d1", "d2"}


def test_equal_records_are_equal_bytes(store: ObjectStore) -> None:
    ledger = Ledger(store)
    ledger.write(record())
    first = store.get("records/d1.json")
    ledger.write(record())
    assert store.get("records/d1.json") == first


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: data[: len(data) // 2], "is no valid record"),
        (lambda data: b"", "is no valid record"),
        (lambda data: b"\xff\xfe" + data, "is no valid record"),
        (lambda data: b"[]", "must be an object, not list"),
        (lambda data: b"{}", "'task' is missing"),
        (
            lambda data: data.replace(b'"attempts": 2', b'"attempts": "x"'),
            "'attempts' is missing or of the wrong",
        ),
        (lambda data: data.replace(b'"sha256"', b'"sha"'), "an output needs key, bytes and sha256"),
        (lambda data: data.replace(b'"d1"', b'"d9"'), "it is the record of d9"),
    ],
    ids=["torn", "empty", "not utf-8", "a list", "no fields", "wrong type", "bad output", "of another task"],
)
def test_a_damaged_record_counts_as_absent_and_says_why(
    store: ObjectStore, damage, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    Ledger(store).write(record("d1", stored_output(store)))
    damaged = damage(store.get("records/d1.json"))
    store.put("records/d1.json", damaged)
    with caplog.at_level(logging.WARNING):
        assert Ledger(store).find("d1") is None
    assert why in caplog.text


@pytest.mark.parametrize("left", [None, b"tens"], ids=["gone", "cut"])
def test_a_record_whose_objects_are_not_there_in_full_counts_as_absent(
    store: ObjectStore, left: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    output = stored_output(store)
    Ledger(store).write(record("d1", output))
    store.delete(output.key)
    if left is not None:
        store.put(output.key, left)
    assert Ledger(store).find("d1") is None
    assert output.key in caplog.text


def test_a_store_that_does_not_answer_is_not_an_absent_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(StoreUnreachable):
        Ledger(open_store("s3://nowhere")).find("d1")
