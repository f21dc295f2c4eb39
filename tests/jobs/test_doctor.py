"""`doctor` on places that work and places that do not: every finding says what is wrong and what to do."""

import os
import socket
from pathlib import Path

import pytest

from fleetpress.compression import kernels
from fleetpress.jobs.doctor import Finding, examine, memory_bytes
from fleetpress.storage import s3, symbol_kernel
from fleetpress.storage.store import StoreProbe

GOOD = "reachable, writable, conditional writes are honoured"


def _finding(name: str, findings: list[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_versions_and_machine() -> None:
    findings = examine([])
    assert all(finding.ok for finding in findings)
    assert [finding.name for finding in findings] == [
        *("python", "fleetpress", "torch", "ray", "boto3", "compiled kernel", "machine", "ray cluster")
    ]
    assert f"{len(os.sched_getaffinity(0))} CPUs, " in _finding("machine", findings).detail
    assert _finding("fleetpress", findings).detail.count(".") == 2


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("fleetpress.jobs.doctor._CGROUP_LIMIT", limit)
    physical = memory_bytes()
    assert physical == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit.write_text("max\n")
    assert memory_bytes() == physical
    limit.write_text("1048576\n")
    assert memory_bytes() == 1 << 20


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetpress.jobs.doctor._LIBRARIES", ("no-such-library",))
    finding = _finding("no-such-library", examine([]))
    assert finding == Finding(
        name="no-such-library", ok=False, detail="not installed; run: pip install no-such-library"
    )


def test_the_compiled_kernel_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    there = "there: checkpoints are quantized at full speed, without torch"
    assert _finding("compiled kernel", examine([])).detail == there
    with monkeypatch.context() as patch:
        patch.setenv("FLEETPRESS_NO_KERNELS", "1")
        finding = _finding("compiled kernel", examine([]))
    slower = "quantizing checkpoints is slower and needs torch, and archives are read slower"
    assert finding.ok
    assert finding.detail == f"turned off by FLEETPRESS_NO_KERNELS: {slower}"
    for library in (kernels, symbol_kernel):
        with monkeypatch.context() as patch:
            patch.setattr(library, "_library", lambda: None)
            finding = _finding("compiled kernel", examine([]))
        assert finding.ok
        assert finding.detail == f"not built: {slower}; install fleetpress again where there is a C compiler"


def test_a_kernel_of_another_version_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_VERSION", 0)
    monkeypatch.setattr(kernels, "_library", kernels._library.__wrapped__)
    finding = _finding("compiled kernel", examine([]))
    assert not finding.ok
    assert finding.detail.endswith("install fleetpress again")


def test_a_place_that_works(store_uri: str) -> None:
    finding = _finding(store_uri, examine([store_uri]))
    assert finding == Finding(name=store_uri, ok=True, detail=GOOD)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "output")
    finding = _finding(place, examine([place]))
    assert not finding.ok
    assert finding.detail.endswith("cannot be created: a part of its path is a file")


def test_a_missing_bucket_is_one_finding_among_others(s3_uri: str, tmp_path: Path) -> None:
    findings = examine([f"{s3_uri}-missing/out", str(tmp_path), "s3:/typo", ""])
    missing = _finding(f"{s3_uri}-missing/out", findings)
    assert not missing.ok
    assert "there is no such bucket: create it, or correct the uri" in missing.detail
    assert _finding(str(tmp_path), findings).ok
    assert not _finding("", findings).ok
    typo = _finding("s3:/typo", findings)
    assert not typo.ok
    assert "write s3://typo" in typo.detail


def test_a_server_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    finding = _finding("s3://bucket", examine(["s3://bucket"]))
    assert not finding.ok
    assert "check AWS_ENDPOINT_URL and the network" in finding.detail


def test_a_source_that_may_only_be_read(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = StoreProbe(reachable=True, writable=False, conditional_writes=False, problem="access denied")
    monkeypatch.setattr(s3, "probe_store", lambda _: refused)
    finding = _finding(s3_uri, examine([s3_uri]))
    assert not finding.ok
    assert finding.detail == "can be read, which is enough for a source; as an output: access denied"


def test_a_server_that_ignores_conditions(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    careless = StoreProbe(
        reachable=True, writable=True, conditional_writes=False, problem="ignores If-None-Match"
    )
    monkeypatch.setattr(s3, "probe_store", lambda _: careless)
    finding = _finding(s3_uri, examine([s3_uri]))
    assert not finding.ok
    assert finding.detail.endswith("let one run at a time write here, or use another server")


@pytest.mark.parametrize(
    ("variables", "ok", "text"),
    [
        ({}, True, "none in variables or files; a role of this machine may still give them; used at AWS"),
        ({"AWS_PROFILE": "staging"}, True, "from AWS_PROFILE staging"),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/token"}, True, "from AWS_WEB_IDENTITY_TOKEN_FILE"),
        (
            {"AWS_ACCESS_KEY_ID": "KEY-OF-MINE", "AWS_SECRET_ACCESS_KEY": "hush"},
            True,
            "from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        (
            {"AWS_ACCESS_KEY_ID": "KEY-OF-MINE"},
            False,
            "AWS_ACCESS_KEY_ID is set, AWS_SECRET_ACCESS_KEY is not",
        ),
        ({"AWS_SECRET_ACCESS_KEY": "hush"}, False, "AWS_SECRET_ACCESS_KEY is set, AWS_ACCESS_KEY_ID is not"),
    ],
)
def test_credentials_are_named_never_shown(
    variables: dict[str, str], ok: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hush@127.0.0.1:9")
    monkeypatch.delenv("AWS_WEB_IDENTITY_TOKEN_FILE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not variables:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
    findings = examine(["s3://bucket"])
    finding = _finding("credentials", findings)
    assert finding.ok is ok
    assert finding.detail.startswith(text)
    assert not any("hush" in one.detail or "KEY-OF-MINE" in one.detail for one in findings)


def test_credentials_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = KEY-OF-MINE\naws_secret_access_key = hush\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    finding = _finding("credentials", examine(["s3://bucket"]))
    assert finding.detail == f"from {file}; used at the endpoint of AWS_ENDPOINT_URL"


def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    finding = _finding("ray cluster", examine([]))
    assert not finding.ok
    assert finding.detail.startswith("no Ray cluster answers at 127.0.0.1:9")


def test_something_that_accepts_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetpress.jobs.doctor._RAY_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        finding = _finding("ray cluster", examine([], address=f"127.0.0.1:{server.getsockname()[1]}"))
    assert not finding.ok
    assert "joining took more than" in finding.detail


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_answers() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    finding = _finding("ray cluster", examine([], address=address))
    assert finding.ok, finding.detail
    assert finding.detail.startswith(f"{address}: 1 nodes with 2 CPUs and ")
