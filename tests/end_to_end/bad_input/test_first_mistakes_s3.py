"""The first day with S3: endpoints, credentials, regions, buckets and ports that are not the right ones."""

import os
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleetpress.storage.store import open_store

INLINE = ("--executor", "inline")


ENVIRONMENTS: dict[str, tuple[dict[str, str | None], str]] = {
    "no_scheme": (
        {"AWS_ENDPOINT_URL": "localhost:9000"},
        "is no valid address: expected http(s)://host:port",
    ),
    "https_for_http": ({"AWS_ENDPOINT_URL": "https{rest}"}, "write http:// in AWS_ENDPOINT_URL"),
    "bucket_in_the_address": (
        {"AWS_ENDPOINT_URL": "{endpoint}/models"},
        "a bucket's name belongs into the uri",
    ),
    "half_of_the_key": ({"AWS_SECRET_ACCESS_KEY": None}, "no credentials: set AWS_PROFILE"),
    "profile": ({"AWS_PROFILE": "nobody"}, "AWS_PROFILE or the AWS configuration file names something"),
    "region": ({"AWS_DEFAULT_REGION": "eu west"}, "names no region: write one such as eu-central-1"),
}


@pytest.mark.parametrize("slip", ENVIRONMENTS)
def test_an_environment_that_leads_elsewhere(slip: str, newcomer: Any, s3_uri: str, monkeypatch: Any) -> None:
    variables, says = ENVIRONMENTS[slip]
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            endpoint = os.environ["AWS_ENDPOINT_URL"]
            rest = endpoint.removeprefix("http")
            monkeypatch.setenv(name, value.format(endpoint=endpoint, rest=rest))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    spec = newcomer.wrote(source=f"{s3_uri}/in/*.pt2")
    newcomer.check(newcomer.cli("plan", spec), 5, says)


def test_no_region_at_all_is_no_mistake(newcomer: Any, s3_uri: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    open_store(s3_uri).put("in/good.pt2", (newcomer.place / "in/good.pt2").read_bytes())
    assert newcomer.cli("plan", newcomer.wrote(source=f"{s3_uri}/in/*.pt2")).code == 0


def test_misspelt_buckets(newcomer: Any, s3_uri: str) -> None:
    """`plan` finds out, too, and says by its exit code that it is the storage."""
    spec = newcomer.wrote(source="s3://no-such-bucket-here/in/*.pt2")
    newcomer.check(
        newcomer.cli("plan", spec),
        5,
        "s3://no-such-bucket-here/in/",
        "there is no such bucket: create it, or correct",
    )
    newcomer.check(
        newcomer.cli("plan", newcomer.wrote(output="s3://no-such-bucket-here/out")),
        5,
        "there is no bucket 'no-such-bucket-here'",
    )
    newcomer.check(newcomer.cli("status", "s3://no-such-bucket-here/out"), 5, "there is no such bucket")
    models = [*newcomer.spec["models"], {"source": "s3://no-such-bucket-here/x.pt2", "recipe": "pack"}]
    newcomer.check(newcomer.cli("plan", newcomer.wrote(models=models)), 3, "no bucket 'no-such-bucket-here'")


class _Odd(BaseHTTPRequestHandler):
    """Something else than S3: the class attribute says what it answers."""

    reply = (200, "text/html", b"<!doctype html><p>Sign in</p>")

    def _answer(self) -> None:
        status, kind, body = self.reply
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def odd_server(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server that is no S3, at AWS_ENDPOINT_URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Odd) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield server
        server.shutdown()
        thread.join()


def test_the_port_of_a_web_page(odd_server: Any, newcomer: Any) -> None:
    spec = newcomer.wrote(source="s3://models/in/*.pt2")
    newcomer.check(newcomer.cli("plan", spec), 5, "what answers there is no S3 server", "AWS_ENDPOINT_URL")


EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The token</Message></Error>"


def test_an_expired_token(odd_server: Any, newcomer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(_Odd, "reply", (400, "application/xml", EXPIRED))
    monkeypatch.setenv("AWS_SESSION_TOKEN", "old-token")
    outcome = newcomer.cli("run", newcomer.wrote(output="s3://models/out"), *INLINE)
    newcomer.check(
        outcome, 5, "the credentials have expired: renew them (AWS_SESSION_TOKEN, or sign in again)"
    )
    assert "old-token" not in outcome.err
    spec = newcomer.wrote(source="s3://models/in/good.pt2")  # a HEAD says less
    newcomer.check(newcomer.cli("plan", spec), 5, "they are wrong or have expired")


def _certificate(path: Path) -> Path:
    """A fresh certificate for localhost, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    begin = datetime(2020, 1, 1, tzinfo=UTC)
    builder = builder.serial_number(1).not_valid_before(begin).not_valid_after(begin + timedelta(days=36_500))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signed = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    path.write_bytes(key.private_bytes(*form) + signed)
    return path


def test_http_for_https(odd_server: Any, newcomer: Any) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(newcomer.place / "certificate.pem"))
    odd_server.socket = context.wrap_socket(odd_server.socket, server_side=True)
    newcomer.check(
        newcomer.cli("plan", newcomer.wrote(source="s3://models/in/*.pt2")), 5, "https:// in AWS_ENDPOINT_URL"
    )
