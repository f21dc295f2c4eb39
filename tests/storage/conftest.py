"""One store of each kind: what all of them promise is tested with all of them. And a server that tests answer for."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loading import load

from fleetpress.storage.s3 import S3Store
from fleetpress.storage.s3_client import new_client
from fleetpress.storage.store import ObjectStore, open_store
from fleetpress.storage.uri import join

HERE = Path(__file__).parent
_MODULE = load("fleetpress_test_fake_s3", HERE / "fake_s3.py")
FakeS3, SECRET = _MODULE.FakeS3, _MODULE.SECRET
load("fleetpress_test_watched", HERE / "watched.py")
load("fleetpress_test_archive_members", HERE / "archive_members.py")


@pytest.fixture(params=["folder", "moto", "seaweedfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    fixture = {"moto": "s3_uri", "seaweedfs": "seaweed_uri"}.get(request.param)
    return str(request.getfixturevalue(fixture)) if fixture else str(tmp_path / "not-yet-there")


@pytest.fixture
def any_store(place: str) -> ObjectStore:
    return open_store(join(place, "root"))


@pytest.fixture
def server() -> Iterator["FakeS3"]:
    fake = FakeS3()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield fake
    fake.shutdown()
    thread.join()
    fake.server_close()


@pytest.fixture
def fake_store(server: "FakeS3", monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    return S3Store("s3://bucket/root", new_client(endpoint=endpoint, access_key="a", secret_key=SECRET))


@pytest.fixture
def patient_store(server: "FakeS3", monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """Its client tries again, as clients do, but at once."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    return S3Store("s3://bucket", new_client(endpoint=endpoint, access_key="a", secret_key=SECRET))
