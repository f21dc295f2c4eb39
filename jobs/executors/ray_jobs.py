"""The job server of a Ray cluster (`http://head:8265`), through Ray's own client: submit, look, follow, stop.

Ray's client would let RAY_ADDRESS overrule an address that was given, wait for ever for a head that hangs, and repeat
whole HTTP pages in its errors; here the given address counts, every request ends, and errors are those of this package.
The token comes from RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token, as everywhere in Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from fleetpress.storage.uri import without_userinfo

from ..errors import ClusterUnreachable, UsageError
from .job_state import JobState

_REQUEST_SECONDS = (10.0, 60.0)  # to connect, and for an answer
_QUIET_SECONDS = 120.0  # without a word in a log, then its job is looked at
_PATIENCE_SECONDS = 30.0  # with a head that does not answer while a log is followed
_LOOK_SECONDS = 1.0
_TOKEN_FILE = Path(".ray", "auth_token")  # in the home folder
_OVERRULING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TAKEN = re.compile(r"Job with submission_id \S+ already exists")
_GONE = re.compile(r"status code 404\b")

for _chatty in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)  # they tell of every package


class _Client(JobSubmissionClient):
    """Ray's client whose requests end."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, **{"timeout": _REQUEST_SECONDS, **kwargs})

    def versions(self) -> dict[str, str]:
        """Of the cluster: `ray`, and `python` if it tells."""
        found = {"ray": str(self._do_request("GET", "/api/version").json()["ray_version"])}
        answer = self._do_request("GET", "/api/v0/cluster_metadata")
        python = answer.json().get("data", {}).get("pythonVersion") if answer.status_code == 200 else None
        return {**found, "python": str(python)} if python else found


class _Broken(Exception):
    """A log's connection is."""


class JobServer:
    """The jobs of one cluster. Raises UsageError for what is no address, ClusterUnreachable for everything else."""

    def __init__(self, address: str) -> None:
        self._url = _url(address)
        self.address = without_userinfo(self._url)
        headers = _token_header()
        self._has_token = bool(headers)
        with self._asking(), _given_address():
            self._client = _Client(self._url, headers=headers)

    def versions(self) -> dict[str, str]:
        """Of the cluster: `ray`, and `python` if it tells."""
        with self._asking():
            return self._client.versions()

    def submit(
        self, job: str, entrypoint: str, *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> bool:
        """Start the job; False if there is one of this id already, ended or not."""
        with self._asking():
            try:
                self._client.submit_job(
                    submission_id=job,
                    entrypoint=entrypoint,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                if _TAKEN.search(str(error)):
                    return False
                raise
        return True

    def state(self, job: str) -> JobState | None:
        """How a job stands; None if the cluster does not know it."""
        with self._asking():
            try:
                told = self._client.get_job_info(job)
                return _state(told) if told.submission_id else None
            except RuntimeError as error:
                if _GONE.search(str(error)):
                    return None
                raise

    def states(self) -> list[JobState]:
        """Every submitted job that the cluster remembers, in the order in which they were submitted."""
        with self._asking():
            found = [_state(told) for told in self._client.list_jobs() if told.submission_id]
        return sorted(found, key=lambda state: (state.submitted_at or 0.0, state.job))

    def stop(self, job: str) -> bool:
        """Ask a job to end: SIGTERM, and SIGKILL some seconds later. False if it had ended, or never was."""
        with self._asking():
            try:
                return bool(self._client.stop_job(job))
            except RuntimeError as error:
                if _GONE.search(str(error)):
                    return False
                raise

    def log(self, job: str) -> str:
        """What the job has printed so far, both its streams together."""
        with self._asking():
            return str(self._client.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], object]) -> JobState:
        """Hand on what the job prints until it ends. A connection that breaks is taken up where it was left.

        Raises ClusterUnreachable when the head stays silent, UsageError when it does not know the job (any more).
        """
        seen, silent_since = 0, 0.0
        while True:
            is_broken = False
            try:
                for text in self._news(job, seen):
                    seen += len(text)
                    write(text)
            except _Broken:  # or there is a proxy that lets no websocket through
                is_broken = True
            try:
                state = self.state(job)
                rest = self.log(job)[seen:] if is_broken and state is not None else ""
            except ClusterUnreachable as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _PATIENCE_SECONDS:
                    raise ClusterUnreachable(f"{error}; job {job} may be going on") from None
            else:
                silent_since = 0.0
                if state is None:
                    raise UsageError(
                        f"the cluster at {self.address} does not know job {job}; was it started anew?"
                    )
                seen += len(rest)
                write(rest)
                if state.is_over:
                    return state
            time.sleep(_LOOK_SECONDS)

    def _news(self, job: str, skip: int) -> Iterator[str]:
        """What a job prints, after the first `skip` signs, until it ends or has been quiet for long."""
        tail: Any = self._client.tail_job_logs(job)  # an asynchronous generator
        with asyncio.Runner() as runner:
            try:
                while True:
                    try:
                        text = runner.run(_next(tail))
                    except (RuntimeError, aiohttp.ClientError, OSError) as error:
                        raise _Broken from error
                    if text is None:
                        return
                    fresh, skip = text[skip:], max(0, skip - len(text))
                    if fresh:
                        yield fresh
            finally:
                runner.run(tail.aclose())

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Ray's errors as ours, without the pages of text that they repeat."""
        start = "start the cluster, or correct --address (the dashboard's, http://host:8265)"
        try:
            yield
        except AuthenticationError:
            refusal = "refuses this token" if self._has_token else "asks for a token"
            raise ClusterUnreachable(
                f"the cluster at {self.address} {refusal}; give the one that it was started with in RAY_AUTH_TOKEN, or "
                "its file in RAY_AUTH_TOKEN_PATH"
            ) from None
        except (requests.exceptions.Timeout, requests.exceptions.ConnectionError, ConnectionError):
            raise ClusterUnreachable(f"no Ray job server answers at {self.address}; {start}") from None
        except (requests.exceptions.RequestException, ValueError, KeyError, TypeError):
            raise ClusterUnreachable(
                f"what answers at {self.address} is no Ray job server; {start}"
            ) from None
        except RuntimeError as error:
            raise ClusterUnreachable(
                f"the job server at {self.address} refused: {_last_line(str(error))}; look at its dashboard"
            ) from None


async def _next(tail: AsyncIterator[str]) -> str | None:
    """None at the end, and after a long silence: the head may be gone without a word."""
    try:
        return await asyncio.wait_for(anext(tail, None), _QUIET_SECONDS)
    except TimeoutError:
        return None


def _url(address: str) -> str:
    """`http://host:port` of a job server; a bare `host:port` is one, too."""
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url.rstrip("/"))
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or not url.isprintable() or " " in url:
        raise UsageError(
            f"{without_userinfo(address)!r} is no address of a Ray job server; give its dashboard's, http://host:8265"
        )
    return url.rstrip("/")


@contextmanager
def _given_address() -> Iterator[None]:
    """Keep Ray's variables from overruling the address that was given."""
    before = {name: os.environ.pop(name) for name in _OVERRULING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _token_header() -> dict[str, str]:
    """The header with the token; empty if there is none. Raises UsageError for a file that cannot be read."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / _TOKEN_FILE
    if not token and (named or path.exists()):
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UsageError(
                f"RAY_AUTH_TOKEN_PATH: {path} cannot be read: {why}; name the token's file"
            ) from None
    if not token.isprintable() or not token.isascii():
        raise UsageError("the token of the Ray cluster has unprintable characters in it; copy it again")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _last_line(text: str) -> str:
    lines = [line.strip(" .\\n") for line in text.splitlines() if line.strip(" .\\n")]
    return lines[-1][:300] if lines else "without a reason"


def _state(told: Any) -> JobState:
    return JobState(
        job=str(told.submission_id),
        state=told.status.value.lower(),
        driver_exit_code=told.driver_exit_code,
        error=str(told.error_type or ""),
        reason=_last_line(told.message or "") if told.status.value == "FAILED" else "",
        metadata=dict(told.metadata or {}),
        submitted_at=None if told.start_time is None else told.start_time / 1000,
        ended_at=None if told.end_time is None else told.end_time / 1000,
    )
