"""The boto3 client: one per process and AWS environment, safe to share between threads."""

import os
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from .errors import StoreUnreachable
from .s3_errors import s3_errors
from .uri import without_userinfo

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
)

_clients: dict[tuple[object, ...], "S3Client"] = {}
_lock = threading.Lock()


def shared_client() -> "S3Client":
    """The client for what the AWS_* variables and profiles say now. Raises AccessDenied, StoreUnreachable."""
    key = (os.getpid(), *(os.environ.get(name) for name in _SETTINGS))
    with _lock:  # making a client is not thread-safe, using it is
        client = _clients.get(key)
        if client is None:
            client = _clients[key] = new_client()
        return client


def new_client(
    *, endpoint: str | None = None, access_key: str | None = None, secret_key: str | None = None
) -> "S3Client":
    """A client of its own; what is not given comes from the AWS_* variables and profiles."""
    asked = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"

    try:
        with s3_errors("connect", "to S3", asked):
            session = boto3.session.Session(aws_access_key_id=access_key, aws_secret_access_key=secret_key)
            plain = session.client("s3", endpoint_url=endpoint, config=_config())
            chosen = getattr(plain.meta.config, "s3", None) or {}  # by a profile, which has the last word
            settings: Any = {**_settings(plain.meta.endpoint_url), **chosen}
            if "@" in urlsplit(plain.meta.endpoint_url).netloc:  # nothing uses it, and errors would repeat it
                endpoint = without_userinfo(plain.meta.endpoint_url)
            return session.client("s3", endpoint_url=endpoint, config=_config().merge(Config(s3=settings)))
    except ValueError as error:  # botocore's word for a malformed endpoint
        raise StoreUnreachable(
            f"AWS_ENDPOINT_URL {without_userinfo(asked)!r} is no valid address: expected http(s)://host:port"
        ) from error


def _config() -> Config:
    config = Config(connect_timeout=5, read_timeout=60, max_pool_connections=32)
    if "AWS_MAX_ATTEMPTS" not in os.environ:  # botocore lets the argument win over the variable
        config = config.merge(Config(retries={"mode": "standard", "max_attempts": 4}))
    return config


def _settings(endpoint: str) -> dict[str, Any]:
    """Uploads carry a CRC-32 of their bytes in a signed header; to sign a SHA-256 as well would double their cost."""
    settings: dict[str, Any] = {"payload_signing_enabled": False}
    if not _is_amazon(endpoint):  # few servers other than AWS answer to bucket names in the host
        settings["addressing_style"] = "path"
    return settings


def _is_amazon(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
