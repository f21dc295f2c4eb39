"""A job of a cluster as its job server tells of it, and what that means as an exit code. No ray."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError

_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_OVER = ("succeeded", "failed", "stopped")
_OURS = (0, 1, 2, 3, 4, 5, 130)  # what `run` leaves with
_INTERRUPTED = (-2, -15, 130, 143)  # a driver that SIGINT or SIGTERM ended before it could say so


@dataclass(frozen=True, kw_only=True)
class JobState:
    """`state` is pending, running, succeeded, failed or stopped; `driver_exit_code` is None where no driver ended."""

    job: str
    state: str
    driver_exit_code: int | None = None
    error: str = ""  # Ray's kind of failure
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    submitted_at: float | None = None  # seconds since 1970
    ended_at: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.state in _OVER

    @property
    def exit_code(self) -> int | None:
        """What `run` on the cluster left with; 130 for a job that was stopped, 5 for one that the cluster lost."""
        if not self.is_over:
            return None
        if self.state == "stopped" or self.driver_exit_code in _INTERRUPTED:
            return 130
        if self.state == "succeeded":
            return 0
        return self.driver_exit_code if self.driver_exit_code in _OURS else 5

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: the documented form of `list --address --json`."""
        return {
            "job": self.job,
            "state": self.state,
            "exit_code": self.exit_code,
            "reason": self.reason or None,
            "name": self.metadata.get("name"),
            "output": self.metadata.get("output"),
            "submitted_at": self.submitted_at,
            "ended_at": self.ended_at,
        }


def valid_job(job: str) -> str:
    """The id itself, if it can be one: it becomes part of URLs, object keys and file names. Raises UsageError."""
    if not _JOB.fullmatch(job):
        raise UsageError(
            f"{job!r} cannot be a job's id; use letters, digits, `.`, `_` and `-`, a letter or digit first, at most 128"
        )
    return job
