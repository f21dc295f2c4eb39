"""Jobs of a Ray cluster, through its Jobs API: they outlive the machine that began them."""

from __future__ import annotations

from .file import Schedule
from .records import JobState

_INTERRUPTED = 130


class ClusterLauncher:
    """Submits specs with the fire's own id, which the cluster takes once: a second submit joins the first."""

    def __init__(self, schedule: Schedule) -> None:
        self._address = str(schedule.address)
        self._schedule = schedule

    def launch(self, spec: str, job_id: str) -> None:
        """See Launcher."""
        from ..submission import submit_spec

        submit_spec(
            spec,
            address=self._address,
            submission_id=job_id,
            allow_code=self._schedule.allow_code,
            code=self._schedule.code,
        )

    def state(self, job_id: str) -> JobState:
        """See Launcher."""
        from ..submission import job_state

        found = job_state(self._address, job_id)
        if found is None:
            return "unknown"
        if found.exit_code == _INTERRUPTED:
            return "stopped"
        states: dict[str, JobState] = {
            "pending": "pending",
            "running": "running",
            "succeeded": "succeeded",
            "stopped": "stopped",
        }
        return states.get(found.state, "failed")

    def stop(self, job_id: str) -> None:
        """See Launcher."""
        from ..submission import stop_job

        stop_job(self._address, job_id)
