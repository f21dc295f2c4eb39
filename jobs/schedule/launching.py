"""What can begin, watch and stop the job of a fire; jobs have ids, so that a second begin joins the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fleetpress.storage.store import ObjectStore

from .file import Schedule
from .records import JobState


class Launcher(Protocol):
    """Begins the jobs of one schedule. Raises FleetpressError and StorageError, and nothing else."""

    def launch(self, spec: str, job_id: str) -> None:
        """Begin to run a spec, unless there is a job of this id already."""
        ...

    def state(self, job_id: str) -> JobState:
        """How the job stands; `unknown` if nobody knows of it (any more)."""
        ...

    def stop(self, job_id: str) -> None:
        """Ask the job to end, keeping what is done; returns at once. One that has ended is no error."""
        ...


LauncherOf = Callable[[Schedule, ObjectStore], Launcher]


def launcher_of(schedule: Schedule, store: ObjectStore) -> Launcher:
    """Ray's Jobs API if the schedule names its address, else a process of this machine."""
    if schedule.is_submitted:
        from .cluster_jobs import ClusterLauncher

        return ClusterLauncher(schedule)
    from .local_jobs import LocalLauncher

    return LocalLauncher(store, schedule)


def here(schedule: Schedule, store: ObjectStore) -> Launcher:
    """This very process, on the cluster that it finds itself in: what comes back has ended."""
    from .local_jobs import LocalLauncher

    return LocalLauncher(store, schedule, in_foreground=True)
