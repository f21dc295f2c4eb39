"""The address of a Ray cluster: `host:port`, `ray://host:port` or `auto`; looked at before anything is begun."""

import os

from ..errors import UsageError

_DEFAULT_CLIENT_PORT = 10001


def given_address(address: str | None) -> str | None:
    """The cluster's address, or that of RAY_ADDRESS; None without either."""
    return address or os.environ.get("RAY_ADDRESS") or None


def check_address(address: str | None) -> None:
    """UsageError for what can be no cluster's address; nobody is asked."""
    if address not in (None, "auto"):
        host_and_port(str(address))


def host_and_port(address: str) -> tuple[str, int]:
    """Where the cluster at `address` listens. Raises UsageError."""
    place = address.removeprefix("ray://")
    if "://" in place:
        raise UsageError(
            f"{address!r} is the address of a web page; --address and RAY_ADDRESS of a run name the cluster itself, "
            "such as head:6379 (`submit` takes http://head:8265)"
        )
    host, colon, port = place.rpartition(":")
    if not colon and address != place:
        host, port = place, str(_DEFAULT_CLIENT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(
            f"{address!r} is no address of a Ray cluster; give host:port, ray://host:port or auto"
        )
    return host.strip("[]"), int(port)
