"""The client of job servers against servers that are none, old, silent or shut; real ones: test_submit.py."""

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fleetpress.jobs.errors import ClusterUnreachable, UsageError
from fleetpress.jobs.executors import ray_jobs
from fleetpress.jobs.executors.ray_jobs import JobServer

Answers = dict[str, tuple[int, Any]]
JOB = {"type": "SUBMISSION", "submission_id": "job", "entrypoint": "x", "status": "RUNNING"}


class PlayedServer(ThreadingHTTPServer):
    """Answers by path; everything else is not found."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: Answers = {"/api/version": (200, {"ray_version": "2.60.0"})}
        self.headers: list[Mapping[str, str]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: PlayedServer

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.headers.append(dict(self.headers))
        status, value = self.server.answers.get(self.path, (404, "not found"))
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - named by http.server

    def log_message(self, *_: object) -> None:
        """No log."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedServer]:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")  # would overrule in Ray's own client
    with PlayedServer() as played:
        threading.Thread(target=played.serve_forever, args=(0.01,), daemon=True).start()
        yield played
        played.shutdown()


def test_versions_with_and_without_what_newer_clusters_tell(server: PlayedServer) -> None:
    assert JobServer(server.address).versions() == {"ray": "2.60.0"}
    assert JobServer(server.address.replace("//", "//user:planted@")).address == server.address
    server.answers["/api/v0/cluster_metadata"] = (200, {"data": {"pythonVersion": "3.11.7"}})
    assert JobServer(f"127.0.0.1:{server.server_port}").versions() == {"ray": "2.60.0", "python": "3.11.7"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "<html>sign in</html>"), "is no Ray job server"),
        ((200, {"hello": "world"}), "is no Ray job server"),
        ((200, []), "is no Ray job server"),
        ((500, "oops"), "is no Ray job server"),
        ((404, "nothing here"), "refused: Version check returned 404"),
        ((200, {"ray_version": "1.8.0"}), "Ray version 1.8.0 is running on the cluster"),
        ((401, "page"), "refuses this token; give the one"),
        ((403, "page"), "refuses this token; give the one"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_usable_job_server_is_named(
    server: PlayedServer, answer: tuple[int, Any], message: str
) -> None:
    server.answers["/api/version"] = answer
    with pytest.raises(ClusterUnreachable, match=message) as caught:
        JobServer(server.address)
    assert server.address in str(caught.value)
    assert "page" not in str(caught.value)


def test_jobs_that_are_there_taken_unknown_and_refused(server: PlayedServer) -> None:
    server.answers |= {
        "/api/jobs/job": (200, JOB),
        "/api/jobs/": (
            400,
            "Traceback ...\nValueError: Job with submission_id job already exists. Use another.",
        ),
        "/api/jobs/job/stop": (500, "Traceback ...\nOSError: no\n"),
        "/api/jobs/01000000": (200, {**JOB, "type": "DRIVER", "submission_id": None}),
    }
    client = JobServer(server.address)
    state = client.state("job")
    assert state is not None
    assert (state.state, state.is_over) == ("running", False)
    assert client.state("other") is None
    assert client.state("01000000") is None  # someone's driver, which nobody submitted
    assert client.stop("other") is False
    assert client.submit("job", "x", runtime_env={}, metadata={}) is False
    with pytest.raises(ClusterUnreachable, match=r"refused: OSError: no; look at its dashboard"):
        client.stop("job")
    with pytest.raises(UsageError, match="does not know job other"):
        client.follow("other", print)


def test_a_server_that_falls_silent_is_not_waited_for_without_end(
    server: PlayedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(ray_jobs, "_LOOK_SECONDS", 0.1)
    client = JobServer(server.address)
    server.answers["/api/jobs/job"] = (500, "gone")
    with pytest.raises(ClusterUnreachable, match=r"status code 500: gone; .*; job job may be going on"):
        client.follow("job", print)


def test_an_address_where_nobody_answers() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ClusterUnreachable, match=f"no Ray job server answers at http://{address}; start"):
            JobServer(f"http://user:planted@{address}/")


def test_a_log_comes_without_websockets_too(server: PlayedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_LOOK_SECONDS", 0.01)
    server.answers["/api/jobs/job"] = (200, JOB)
    server.answers["/api/jobs/job/logs"] = (200, {"logs": "first\n"})
    client = JobServer(server.address)
    heard: list[str] = []

    def write(text: str) -> None:
        if text:
            heard.append(text)
            server.answers["/api/jobs/job"] = (200, {**JOB, "status": "FAILED", "driver_exit_code": 3})
            server.answers["/api/jobs/job/logs"] = (200, {"logs": "first\nlast\n"})

    assert client.follow("job", write).exit_code == 3
    assert heard == ["first\n", "last\n"]


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_REQUEST_SECONDS", (0.5, 0.5))
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        pytest.raises(ClusterUnreachable, match="no Ray job server answers at"),
    ):
        JobServer(f"http://127.0.0.1:{listening.getsockname()[1]}")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "http://",
        "ray://head:10001",
        "os://user:planted@x",
        "http://head:99999",
        "http://head:0",
        "http://a b",
        "//x",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="is no address of a Ray job server") as caught:
        JobServer(address)
    assert "planted" not in str(caught.value)


def test_the_token_comes_from_the_variable_its_file_or_the_home_folder(
    server: PlayedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def sent() -> str | None:
        JobServer(server.address)
        return server.headers[-1].get("Authorization")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(
        UsageError, match="token cannot be read: No such file or directory; name the token's file"
    ):
        JobServer(server.address)
    (tmp_path / "token").write_text("from-file\n")
    assert sent() == "Bearer from-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
    assert sent() == "Bearer from-variable"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "two\nlines")
    with pytest.raises(UsageError, match="unprintable"):
        JobServer(server.address)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home")
    assert sent() == "Bearer from-home"
