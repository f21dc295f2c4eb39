"""S3 through real servers: what goes wrong, by name, and what only objects of some size show."""

import hashlib
import socket
from pathlib import Path

import pytest

from fleetpress.jobs.seaweed import SeaweedFS
from fleetpress.storage.errors import (
    AccessDenied,
    BucketNotFound,
    InvalidUri,
    SourceChanged,
    StorageError,
    StoreUnreachable,
)
from fleetpress.storage.local import FolderStore
from fleetpress.storage.s3 import S3Store
from fleetpress.storage.s3_client import new_client, shared_client

_SECRET = "do-not-show-this-secret"


def _every_action(store: S3Store, *, writes: bool = True) -> dict[str, StorageError]:
    """The error of each action on a place where all of them must fail."""
    actions = {
        "get": lambda: store.get("k"),
        "get_range": lambda: store.get_range("k", 0, 1),
        "read_into": lambda: store.read_into("k", 0, memoryview(bytearray(1))),
        "head": lambda: store.head("k"),
        "list": lambda: store.list("k"),
    }
    if writes:
        actions["put"] = lambda: store.put("k", b"1")
        actions["put_if_absent"] = lambda: store.put_if_absent("k", b"1")
        actions["create_upload"] = lambda: store.create_upload("k")
    errors = {}
    for name, action in actions.items():
        with pytest.raises(StorageError) as caught:
            action()
        errors[name] = caught.value
    return errors


@pytest.mark.parametrize("server", ["s3_uri", "seaweed_uri"])
def test_no_bucket(server: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(server)
    store = S3Store("s3://no-such-bucket-here/prefix")
    for name, error in _every_action(
        store, writes=server == "s3_uri"
    ).items():  # SeaweedFS makes it on a write
        assert type(error) is BucketNotFound, (name, error)
        assert "no-such-bucket-here" in str(error)
        assert "127.0.0.1" in str(error)


def test_probe_without_a_bucket(s3_uri: str) -> None:
    probe = S3Store(f"{s3_uri}-missing").probe()
    assert not probe.reachable
    assert "no such bucket" in probe.problem


def test_wrong_secret(seaweed_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", _SECRET)
    for name, error in _every_action(S3Store(seaweed_uri)).items():
        assert type(error) is AccessDenied, (name, error)
        assert seaweed_uri in str(error)
        assert _SECRET not in str(error)


def test_unknown_key_id(seaweed_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    for name, error in _every_action(S3Store(seaweed_uri)).items():
        assert type(error) is AccessDenied, (name, error)
        assert "AWS_ACCESS_KEY_ID" in str(error)
    assert not S3Store(seaweed_uri).probe().writable


def test_no_credentials(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name, error in _every_action(S3Store(s3_uri)).items():
        assert type(error) is AccessDenied, (name, error)
        assert "no credentials: set AWS_PROFILE" in str(error)


def test_half_the_credentials(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDenied, match="no credentials"):
        S3Store(s3_uri).get("k")


def test_unknown_profile(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessDenied, match="AWS_PROFILE"):
        S3Store(s3_uri).get("k")


def test_profile(moto_server: str, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"[profile team]\nendpoint_url = {moto_server}\nregion = us-east-1\n"
        "aws_access_key_id = moto\naws_secret_access_key = moto-secret\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "team")
    S3Store(s3_uri).put("k", b"by profile")
    assert S3Store(s3_uri).get("k") == b"by profile"


def test_endpoint_down(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{_SECRET}@127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = S3Store(s3_uri)
    for name, error in _every_action(store).items():
        assert type(error) is StoreUnreachable, (name, error)
        assert f"http://127.0.0.1:{port}" in str(error)
        assert _SECRET not in str(error)
    assert not store.probe().reachable


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://bad host:1"])
def test_malformed_endpoint(s3_uri: str, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreUnreachable, match="AWS_ENDPOINT_URL"):
        S3Store(s3_uri).get("k")


def test_bad_bucket_name() -> None:
    with pytest.raises(InvalidUri):
        S3Store("s3://a/b")


@pytest.mark.parametrize("server", ["s3_uri", "seaweed_uri"])
def test_same_etag_as_a_folder(server: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data = bytes((8 << 20) - 1)
    store = S3Store(request.getfixturevalue(server))
    assert store.put("k", data).etag == FolderStore(str(tmp_path)).put("k", data).etag
    assert store.get("k") == data


@pytest.mark.parametrize("server", ["s3_uri", "seaweed_uri"])
def test_one_request_gives_an_md5(server: str, request: pytest.FixtureRequest) -> None:
    data = bytes(17 << 20)  # more than boto3 itself sends in one request
    assert S3Store(request.getfixturevalue(server)).put("k", data).etag == hashlib.md5(data).hexdigest()


@pytest.mark.parametrize("server", ["s3_uri", "seaweed_uri"])
def test_upload_in_parts(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetpress.storage.s3._ONE_REQUEST_BYTES", 20 << 20)
    data = b"0123456789abcdef" * (22 << 16)
    store = S3Store(request.getfixturevalue(server))
    info = store.put("k", data)
    assert info == store.head("k") == store.list()[0]
    assert info.etag.endswith("-5")
    assert store.get("k") == data
    assert store.get_range("k", (5 << 20) - 3, 6, etag=info.etag) == data[(5 << 20) - 3 : (5 << 20) + 3]
    with pytest.raises(SourceChanged):
        store.get_range("k", 0, 6, etag=info.etag.replace("-5", "-6"))


def test_folder_markers_are_left_out(s3_uri: str) -> None:
    client = shared_client()
    for key in ("models/", "models/a/", "models/a/x", "models//y"):
        client.put_object(Bucket=s3_uri.removeprefix("s3://"), Key=key, Body=b"")
    assert [info.key for info in S3Store(s3_uri).list()] == ["models/a/x"]
    assert [info.key for info in S3Store(f"{s3_uri}/models").list()] == ["a/x"]


def test_one_client_for_all(s3_uri: str, seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shared_client()
    assert shared_client() is first
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweedfs.endpoint)
    assert shared_client() is not first
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("endpoint", "style"),
    [
        (None, None),
        ("https://s3.eu-central-1.amazonaws.com", None),
        ("https://s3.example.com", "path"),
        ("http://127.0.0.1:9000", "path"),
    ],
)
def test_bucket_in_the_path_except_on_amazon(endpoint: str | None, style: str | None) -> None:
    client = new_client(endpoint=endpoint, access_key="a", secret_key="b")
    assert (client.meta.config.s3 or {}).get("addressing_style") == style


def test_a_profile_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = new_client(endpoint="https://oss.example.com", access_key="a", secret_key="b")
    assert client.meta.config.s3 == {"addressing_style": "path", "payload_signing_enabled": False}
    (tmp_path / "config").write_text(
        "[default]\ns3 =\n    addressing_style = virtual\n    payload_signing_enabled = true\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    client = new_client(endpoint="https://oss.example.com", access_key="a", secret_key="b")
    assert client.meta.config.s3["addressing_style"] == "virtual"
    assert client.meta.config.s3["payload_signing_enabled"] is True
