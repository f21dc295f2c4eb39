"""What works on this machine and what does not, each with its remedy: versions, compiled code, memory, storage, Ray."""

import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

from fleetpress.compression import kernels
from fleetpress.storage import symbol_kernel
from fleetpress.storage.errors import ObjectNotFound, StorageError
from fleetpress.storage.store import ObjectStore, StoreProbe, open_store
from fleetpress.storage.uri import is_s3, without_userinfo

from .errors import FleetpressError
from .executors.address import check_address, given_address
from .runs.figures import sized

_LIBRARIES = ("fleetpress", "torch", "ray", "boto3")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_RAY_SECONDS = 45.0  # importing Ray and joining a cluster takes a few


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at: whether it is as a run needs it, and what was seen or what to do."""

    name: str
    ok: bool
    detail: str


def examine(places: Sequence[str], address: str | None = None) -> list[Finding]:
    """Look at this machine, at every place (outputs and sources), and at the Ray cluster if one is given.

    Writes and removes one small object in every place. Never raises for what is wrong: that is a finding.
    """
    findings = [*_software(), _kernel(), _machine()]
    if any(is_s3(place) for place in places):
        findings.append(_credentials())
    findings.extend(_place(place) for place in places)
    findings.append(_cluster(given_address(address)))
    return findings


def _software() -> Iterator[Finding]:
    yield Finding(name="python", ok=True, detail=f"{platform.python_version()} ({sys.executable})")
    for library in _LIBRARIES:
        try:
            yield Finding(name=library, ok=True, detail=version(library))
        except PackageNotFoundError:
            yield Finding(name=library, ok=False, detail=f"not installed; run: pip install {library}")


def _kernel() -> Finding:
    """A hint, no failure: without the compiled code torch and NumPy give the same bytes."""
    name, without = (
        "compiled kernel",
        "quantizing checkpoints is slower and needs torch, and archives are read slower",
    )
    try:
        there = kernels.available() and symbol_kernel.available()
    except ImportError as error:
        return Finding(name=name, ok=False, detail=str(error))
    if there:
        return Finding(
            name=name, ok=True, detail="there: checkpoints are quantized at full speed, without torch"
        )
    if os.environ.get("FLEETPRESS_NO_KERNELS", "0") not in ("", "0"):
        return Finding(name=name, ok=True, detail=f"turned off by FLEETPRESS_NO_KERNELS: {without}")
    remedy = "install fleetpress again where there is a C compiler"
    return Finding(name=name, ok=True, detail=f"not built: {without}; {remedy}")


def _machine() -> Finding:
    memory = memory_bytes()
    size = "memory unknown" if memory is None else f"{sized(memory)} of memory"
    return Finding(
        name="machine", ok=True, detail=f"{_cpu_count()} CPUs, {size}, {platform.platform(terse=True)}"
    )


def _cpu_count() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Memory of the machine, or of the container where that has less; None where it cannot be known."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(physical, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return physical


def _credentials() -> Finding:
    """Where AWS credentials come from, in the order in which they are looked for; never what they are."""
    key, secret = (bool(os.environ.get(name)) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    if key != secret:
        missing, given = "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"
        if secret:
            missing, given = given, missing
        return Finding(
            name="credentials", ok=False, detail=f"{given} is set, {missing} is not: set both or neither"
        )
    if key:
        source = "from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif profile:
        source = f"from AWS_PROFILE {profile}"
    elif os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        source = "from AWS_WEB_IDENTITY_TOKEN_FILE"
    else:
        file = next((path for path in _credential_files() if path.is_file()), None)
        source = (
            f"from {file}"
            if file
            else "none in variables or files; a role of this machine may still give them"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    used_at = "the endpoint of AWS_ENDPOINT_URL" if endpoint else "AWS, or the endpoint that a profile names"
    return Finding(name="credentials", ok=True, detail=f"{source}; used at {used_at}")


def _credential_files() -> Iterator[Path]:
    for variable, default in (
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        ("AWS_CONFIG_FILE", "~/.aws/config"),
    ):
        yield Path(os.environ.get(variable) or default).expanduser()


def _place(place: str) -> Finding:
    try:
        store = open_store(place)
        probe = store.probe()
        as_source = probe.reachable and not probe.writable and _is_readable(store)
    except StorageError as error:
        return Finding(name=without_userinfo(place), ok=False, detail=str(error))
    return Finding(name=place, ok=not probe.problem, detail=_meaning(probe, as_source))


def _is_readable(store: ObjectStore) -> bool:
    """Whether a look at an object that is not there is answered with just that."""
    try:
        store.head("fleetpress-doctor-looks-for-nothing")
    except ObjectNotFound:
        return is_s3(store.uri) or os.path.isdir(store.uri)
    except StorageError:
        return False
    return True


def _meaning(probe: StoreProbe, as_source: bool) -> str:
    if not probe.problem:
        return "reachable, writable, conditional writes are honoured"
    if as_source:
        return f"can be read, which is enough for a source; as an output: {probe.problem}"
    if probe.writable:
        return f"reachable and writable, but {probe.problem}; let one run at a time write here, or use another server"
    return probe.problem


def _cluster(address: str | None) -> Finding:
    name = "ray cluster"
    if address is None:
        return Finding(
            name=name, ok=True, detail="none given (--address or RAY_ADDRESS): a run starts one here"
        )
    try:
        check_address(address)
    except FleetpressError as error:
        return Finding(name=name, ok=False, detail=str(error))
    # A process of its own: it can be ended whatever Ray waits for, and leaves no connection behind.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_ask_cluster, args=(address, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        ok, detail = ours.recv() if ours.poll(_RAY_SECONDS) else (False, _no_answer(address))
    except EOFError:
        ok, detail = False, f"Ray ended without an answer when it joined {address}; {_RAY_REMEDY}"
    finally:
        process.kill()
        process.join()
        ours.close()
    return Finding(name=name, ok=ok, detail=detail)


_RAY_REMEDY = "check that driver and cluster have the same Ray and Python versions, and RAY_AUTH_TOKEN"


def _no_answer(address: str) -> str:
    return f"{address} accepts connections, but joining took more than {_RAY_SECONDS:.0f} s; {_RAY_REMEDY}"


def _ask_cluster(address: str, answer: Connection) -> None:
    """What the cluster offers, or why it cannot be joined, as (ok, detail)."""
    from .executors.ray_cluster import connect, rooms

    try:
        connect(address)
    except FleetpressError as error:
        answer.send((False, str(error)))
        return
    found = rooms()
    cpus, memory = sum(room.cpus for room in found), sum(room.memory_bytes for room in found)
    answer.send(
        (True, f"{address}: {len(found)} nodes with {cpus} CPUs and {sized(memory)} of memory for tasks")
    )
