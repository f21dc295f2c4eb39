"""The schedule file: which spec is to run when. As strict as a spec, with every problem of the file told at once."""

from __future__ import annotations

import os
import re
import zoneinfo
from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fleetpress.storage.uri import is_s3

from ..errors import SpecError
from ..spec.fields import (
    Duration,
    Output,
    Place,
    Places,
    mistake,
    nearest,
    tuple_of,
)
from ..spec.fleet_spec import load_spec, read_spec
from ..spec.messages import understood
from ..spec.recipe import Strict
from ..spec.yaml_lines import (
    Document,
    Problem,
    read_yaml,
)
from .fires import CronMistake, Times, five_fields, zone_of

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_NEEDS = "the schedule file is empty; it needs version, output and schedules"
_ADDRESS = re.compile(r"(https?://[^\s/@]+(:\d+)?(/[^\s@]*)?|auto|[^\s/@:]+:\d+)")
_LONGEST_JITTER_SECONDS = 86_400.0


def _name(value: str) -> str:
    # It becomes a part of keys, of a job's id, and of the names that Kubernetes and systemd know.
    if not _NAME.fullmatch(value):
        raise mistake(
            f"`{value}` cannot be a schedule's name; use lower-case letters, digits and `-`,"
            " a letter or digit first and last, at most 40"
        )
    return value


def _cron(value: str) -> str:
    try:
        return five_fields(value)
    except CronMistake as error:
        raise mistake(str(error)) from None


def _timezone(value: str) -> str:
    try:
        zone_of(value)
    except (KeyError, ValueError, OSError):
        hint = nearest(value, zoneinfo.available_timezones())
        remedy = hint if hint.startswith("did you mean") else "such as UTC or Europe/Berlin"
        raise mistake(f"there is no time zone `{value}`; {remedy}") from None
    return value


def _address(value: str) -> str:
    if not _ADDRESS.fullmatch(value):
        raise mistake("should be http://head:8265 (Ray's Jobs API) or head:6379 (a cluster to join)")
    return value


def _jitter(value: float) -> float:
    if value > _LONGEST_JITTER_SECONDS:
        raise mistake("is more than a day; spread the cron lines instead")
    return value


class Schedule(Strict):
    """One spec and when it is to run. A fire is on time within `grace`, and was missed after it.

    `address` is that of Ray's Jobs API (http://head:8265); without it the run's driver works on the machine of the
    tick, with `executor` as `fleetpress run` knows it. `code` is what `fleetpress submit --code` takes along.
    """

    name: Annotated[str, AfterValidator(_name)]
    spec: Place
    cron: Annotated[str, AfterValidator(_cron)]
    timezone: Annotated[str, AfterValidator(_timezone)] = "UTC"
    concurrency: Literal["allow", "forbid", "replace"] = "forbid"
    misfire: Literal["skip", "run_once"] = "run_once"
    misfire_deadline_seconds: Duration = Field(default=86_400.0, alias="misfire_deadline")
    grace_seconds: Duration = Field(default=600.0, alias="grace")
    jitter_seconds: Annotated[Duration, AfterValidator(_jitter)] = Field(default=0.0, alias="jitter")
    deadline_seconds: Duration | None = Field(default=None, alias="deadline")
    address: Annotated[str, AfterValidator(_address)] | None = None
    executor: Literal["ray", "inline"] = "ray"
    allow_code: bool = False
    code: Places = ()

    @property
    def times(self) -> Times:
        """When it fires."""
        jitter = timedelta(seconds=self.jitter_seconds)
        return Times(name=self.name, cron=self.cron, zone=zone_of(self.timezone), jitter=jitter)

    @property
    def is_submitted(self) -> bool:
        """Whether its runs go to a cluster's Jobs API, so that they outlive the machine of the tick."""
        return self.address is not None and self.address.startswith("http")

    @property
    def latest_start(self) -> timedelta:
        """How late after its release a fire may still be begun."""
        caught_up = self.misfire_deadline_seconds if self.misfire == "run_once" else 0.0
        return timedelta(seconds=max(self.grace_seconds, caught_up))


class ScheduleFile(Strict):
    """Schedules, and the output in which their claims lie (that of a spec will do)."""

    version: Literal[1]
    output: Output
    schedules: Annotated[tuple[Schedule, ...], BeforeValidator(tuple_of), Field(min_length=1)]

    def named(self, name: str) -> Schedule:
        """The schedule of a name. Raises SpecError."""
        known = {schedule.name: schedule for schedule in self.schedules}
        if name not in known:
            raise SpecError(f"there is no schedule `{name}`; {nearest(name, known)}")
        return known[name]


def load_schedules(path: str) -> ScheduleFile:
    """The schedules in a file or at an `s3://` uri; their specs are places that lead there from anywhere.

    Raises SpecError, and StorageError as `load_spec` does.
    """
    file = parse_schedules(read_spec(path), path)
    folder = path.rpartition("/")[0] if is_s3(path) else os.path.dirname(os.path.abspath(path))
    found = [
        schedule.model_copy(update={"spec": _beside(folder, schedule.spec)}) for schedule in file.schedules
    ]
    return file.model_copy(update={"schedules": tuple(found)})


def _beside(folder: str, spec: str) -> str:
    """A relative place counts from the folder of the schedule file: cron and systemd begin anywhere."""
    return spec if is_s3(spec) or spec.startswith(("/", "file:")) else f"{folder}/{spec}"


def parse_schedules(text: str, name: str) -> ScheduleFile:
    """The schedules in a YAML text; `name` is what messages call the file.

    Raises SpecError with all problems, one per line: `name:line: path: what; remedy`.
    """
    document = read_yaml(text, name, needs=_NEEDS)
    return understood(ScheduleFile, document, _contradictions(document), name)


def check_specs(file: ScheduleFile) -> list[str]:
    """What is wrong with the specs that the schedules name, one line a problem. Raises the store's errors."""
    problems: dict[str, None] = {}
    for path in dict.fromkeys(schedule.spec for schedule in file.schedules):
        try:
            load_spec(path)
        except SpecError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    return list(problems)


def _contradictions(document: Document) -> Iterator[Problem]:
    """What no single value tells; reads the plain values, so that it also works where others are wrong."""
    root = document.data if isinstance(document.data, dict) else {}
    entries = root.get("schedules")
    first: dict[str, int] = {}
    for index, raw in enumerate(entries if isinstance(entries, list) else []):
        entry: dict[str, Any] = raw if isinstance(raw, dict) else {}
        for key, what in _mistakes(entry, index, first):
            path = ("schedules", index, key)
            yield Problem(line=document.line(path), path=path, what=what)


def _mistakes(entry: dict[str, Any], index: int, first: dict[str, int]) -> Iterator[tuple[str, str]]:
    name = entry.get("name")
    if isinstance(name, str) and first.setdefault(name, index) != index:
        yield "name", f"`{name}` is also the name of schedules[{first[name]}]; rename one"
    if entry.get("misfire") == "skip" and "misfire_deadline" in entry:
        yield "misfire_deadline", "has no meaning with misfire: skip; delete it, or take run_once"
    address = entry.get("address")
    if isinstance(address, str) and entry.get("executor") == "inline":
        yield "executor", "inline works without a cluster; delete it, or the address"
    if entry.get("code") and not (isinstance(address, str) and address.startswith("http")):
        yield (
            "code",
            "goes along to a cluster's Jobs API only; delete it, or give its address, http://head:8265",
        )
    if isinstance(entry.get("spec"), str) and "*" in entry["spec"]:
        yield "spec", "a schedule has one spec, not a pattern; write an entry for each"
