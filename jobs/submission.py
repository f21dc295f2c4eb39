"""A fleet as a job of a cluster: start it there or join the one that runs, look at it, stop it.

A job's id is made of the spec, the code and fleetpress itself, so that the same again joins what runs. When that has
ended, the same again is the next number, which goes on with what is left. An id that is given is one job for ever.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ClusterUnreachable
from .executors.job_state import JobState, valid_job

if TYPE_CHECKING:
    from .executors.ray_jobs import JobServer
    from .shipment import Shipment

_MOST_NAME = 60  # signs of the spec's name in an id
_DRIVER = "fleetpress.jobs.submitted"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that was started (`is_new`) or joined; `exit_code` is None until it has ended."""

    job: str
    is_new: bool
    state: str
    exit_code: int | None
    name: str
    output: str
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "warnings": list(self.warnings)}


def submit_spec(
    spec_path: Path | str,
    *,
    address: str,
    submission_id: str | None = None,
    allow_code: bool = False,
    code: Sequence[Path | str] = (),
) -> Submitted:
    """Run the spec as a job of the cluster whose job server is at `address`; returns once it is there.

    The same spec again joins its job while that runs, and starts another when it has ended. With `submission_id` there
    is one job of that id for ever: one that has ended is told of, never started again. `code` are the files and folders
    with the factories of the spec. Raises SpecError, UsageError, StorageError (a spec in a bucket), ClusterUnreachable.
    """
    from .executors.ray_jobs import JobServer
    from .shipment import pack

    shipment = pack(str(spec_path), allow_code=allow_code, code=code)
    fixed = None if submission_id is None else valid_job(submission_id)
    server = JobServer(address)
    _check_versions(server)
    state, is_new = _only(server, shipment, fixed) if fixed else _next(server, shipment)
    warnings = list(shipment.warnings)
    if not is_new and state.metadata.get("digest", shipment.digest) != shipment.digest:
        warnings.append(f"job {state.job} was started with another spec, other code or another fleetpress")
    return Submitted(
        job=state.job,
        is_new=is_new,
        state=state.state,
        exit_code=state.exit_code,
        name=shipment.spec.name,
        output=shipment.spec.output,
        warnings=tuple(warnings),
    )


def job_state(address: str, job: str) -> JobState | None:
    """How a job stands; None if the cluster does not know it. Raises ClusterUnreachable."""
    from .executors.ray_jobs import JobServer

    return JobServer(address).state(valid_job(job))


def job_states(address: str) -> list[JobState]:
    """The jobs of fleetpress that the cluster remembers, oldest first. Raises ClusterUnreachable."""
    from .executors.ray_jobs import JobServer

    return [state for state in JobServer(address).states() if "fleetpress" in state.metadata]


def stop_job(address: str, job: str) -> bool:
    """Ask a job to end, at once: some seconds later it is killed. False if it had ended, or never was."""
    from .executors.ray_jobs import JobServer

    return JobServer(address).stop(valid_job(job))


def _only(server: JobServer, shipment: Shipment, job: str) -> tuple[JobState, bool]:
    """The job of this id, started now if there never was one."""
    found = server.state(job)
    if found is not None:
        return found, False
    is_new = _start(server, shipment, job)
    return _known(server, job), is_new


def _next(server: JobServer, shipment: Shipment) -> tuple[JobState, bool]:
    """The job of this shipment that runs, or the one after the last that has ended."""
    first = f"fleetpress-{shipment.spec.name[:_MOST_NAME]}-{shipment.digest}"
    numbered = re.compile(rf"{re.escape(first)}(?:-(\d{{1,9}}))?")
    known = {}
    for state in server.states():
        found = numbered.fullmatch(state.job)
        if found:
            known[int(found[1] or 1)] = state
    last = max(known, default=0)
    if known and not known[last].is_over:
        return known[last], False
    job = first if not last else f"{first}-{last + 1}"
    is_new = _start(server, shipment, job)
    return _known(server, job), is_new


def _start(server: JobServer, shipment: Shipment, job: str) -> bool:
    """False if another submit of the same job was faster."""
    with tempfile.TemporaryDirectory(prefix="fleetpress-submit-") as folder:
        return server.submit(
            job,
            _entrypoint(job, server.address, shipment.allow_code),
            runtime_env=shipment.lay_out(Path(folder)),
            metadata={
                "fleetpress": shipment.version,
                "name": shipment.spec.name,
                "output": shipment.spec.output,
                "digest": shipment.digest,
            },
        )


def _entrypoint(job: str, address: str, allow_code: bool) -> str:
    """A line for the shell of the head. The driver takes the shell's place: signals and exit codes are its own."""
    words = ["-m", _DRIVER, job, "--address", address, *(["--allow-code"] if allow_code else [])]
    return f'exec "$(command -v python || command -v python3)" {shlex.join(words)}'


def _known(server: JobServer, job: str) -> JobState:
    state = server.state(job)
    if state is None:
        raise ClusterUnreachable(
            f"the cluster at {server.address} took job {job} and does not know it; submit again"
        )
    return state


def _check_versions(server: JobServer) -> None:
    """Refuse a cluster whose Ray or Python is none that fleetpress can run on."""
    import platform
    from importlib.metadata import metadata, requires, version

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    there = server.versions()
    asked = {one.name: one.specifier for one in map(Requirement, requires("fleetpress") or ())}
    wanted = {"ray": asked["ray"], "python": SpecifierSet(metadata("fleetpress")["Requires-Python"] or "")}
    here = {"ray": version("ray"), "python": platform.python_version()}
    if "ray" in there and _major(there["ray"]) != _major(here["ray"]):
        wanted["ray"] &= SpecifierSet(f"=={_major(here['ray'])}.*")
    unfit = [name for name, told in there.items() if not wanted[name].contains(told, prereleases=True)]
    if unfit:
        cluster, client = (
            f"Ray {found.get('ray', '?')} and Python {found.get('python', '?')}" for found in (there, here)
        )
        asks = " and ".join(f"{name.capitalize()} {wanted[name]}" for name in wanted)
        raise ClusterUnreachable(
            f"the cluster at {server.address} has {cluster}, this machine {client}: fleetpress "
            f"{version('fleetpress')} runs on {asks}; take a cluster that has them, or a fleetpress that fits it"
        )


def _major(told: str) -> str:
    return told.partition(".")[0]
