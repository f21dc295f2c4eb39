"""What goes along into a cluster: the schedule file and its specs, as one ConfigMap beside which nothing is needed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fleetpress.storage.uri import is_s3

from ...errors import SpecError, UsageError
from ...spec.fleet_spec import (
    Spec,
    parse_spec,
    read_spec,
)
from ..file import ScheduleFile, parse_schedules

FOLDER = "/etc/fleetpress"

_MOST_BYTES = 900_000  # a ConfigMap may have a mebibyte
_NOT_OF_A_KEY = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A schedule file, the specs it names, and the texts of those that lie on this machine, by relative path."""

    path: str
    file: ScheduleFile
    specs: dict[str, Spec]
    texts: dict[str, str]

    @property
    def place(self) -> str:
        """Where the schedule file is inside of a pod."""
        return self.path if is_s3(self.path) else f"{FOLDER}/{os.path.basename(self.path)}"

    def keys(self) -> dict[str, str]:
        """Keys of the ConfigMap by relative path; no key may have a slash."""
        found: dict[str, str] = {}
        for path in self.texts:
            key = _NOT_OF_A_KEY.sub("_", path)
            found[path] = key if key not in found.values() else f"{len(found)}_{key}"
        return found

    def config(self) -> dict[str, str]:
        """The data of the ConfigMap."""
        return {key: self.texts[path] for path, key in self.keys().items()}

    def volume(self) -> dict[str, Any]:
        """The ConfigMap as a folder of a pod, laid out as on this machine."""
        items = [{"key": key, "path": path} for path, key in self.keys().items()]
        return {"name": "fleetpress", "configMap": {"name": "fleetpress-schedules", "items": items}}

    def check_places(self) -> None:
        """UsageError for what a pod cannot see: paths relative to a folder of this machine."""
        problems = [f"{self.path}: output: `{self.file.output}`"] if _is_relative(self.file.output) else []
        for path, spec in self.specs.items():
            problems += [f"{path}: {key}: `{place}`" for key, place in _places(spec) if _is_relative(place)]
        if problems:
            raise UsageError(
                "a pod has no such folder; write s3://..., or the whole path of a mounted one:\n"
                + "\n".join(problems)
            )


def shipped(path: str) -> Shipped:
    """Read a schedule file and its specs. Raises SpecError, UsageError, and StorageError for one in a bucket."""
    text = read_spec(path)
    file = parse_schedules(text, path)
    texts = {} if is_s3(path) else {os.path.basename(path): text}
    specs: dict[str, Spec] = {}
    problems: list[str] = []
    for spec in dict.fromkeys(schedule.spec for schedule in file.schedules):
        place = _place_of(path, spec)
        try:
            found = read_spec(place)
            specs[spec] = parse_spec(found, place)
        except SpecError as error:
            problems += str(error).splitlines()
            continue
        if not is_s3(place):
            texts[spec] = found
    if problems:
        raise SpecError("\n".join(problems))
    if sum(len(one.encode()) for one in texts.values()) > _MOST_BYTES:
        raise UsageError(f"{path}: with its specs more than {_MOST_BYTES} bytes; put the specs into a bucket")
    return Shipped(path=path, file=file, specs=specs, texts=texts)


def memory_mebibytes(spec: Spec, tasks: int) -> int:
    """What a pod for so many tasks at a time needs, Ray's own share included."""
    return math.ceil((spec.resources.memory_per_task_bytes * tasks + (1 << 30)) / (1 << 20))


def _place_of(path: str, spec: str) -> str:
    if is_s3(spec):
        return spec
    if is_s3(path):
        return f"{path.rpartition('/')[0]}/{spec}"
    return spec if os.path.isabs(spec) else os.path.join(os.path.dirname(path), spec)


def _is_relative(place: str) -> bool:
    return not is_s3(place) and not place.startswith(("/", "file:"))


def _places(spec: Spec) -> Iterator[tuple[str, str]]:
    yield "output", spec.output
    for index, model in enumerate(spec.models):
        yield f"models[{index}].source", model.source
    for name, data in spec.data.items():
        for part in ("train", "eval"):
            for place in getattr(data, part) or ():
                yield f"data.{name}.{part}", place
